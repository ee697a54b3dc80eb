"""Decoding video files with PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sora_models._extras import require


class VideoError(ValueError):
    """A file that cannot be decoded. The message is ``path: what is wrong``."""

    def __init__(self, path: str | Path, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path, self.what = Path(path), what


class VideoInfo(NamedTuple):
    """What the container says of its first video stream.

    ``frames`` is 0 where the container does not say; ``fps`` is None where it does not.
    """

    frames: int
    height: int
    width: int
    fps: float | None
    codec: str


def probe(path: str | Path) -> VideoInfo:
    """Reads a file's header. Raises :class:`VideoError`."""
    with _open(path) as (container, stream):
        rate = stream.average_rate
        return VideoInfo(
            frames=stream.frames,
            height=stream.height,
            width=stream.width,
            fps=float(rate) if rate else None,
            codec=stream.codec_context.name,
        )


def iter_frames(
    path: str | Path,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    stride: int = 1,
) -> Iterator[Tensor]:
    """Decodes lazily: yields uint8 RGB frames [H, W, 3] in the order they are shown.

    Args:
        path: of the file.
        frames: the most frames to yield; None for all.
        size: (height, width) to scale each frame to, by area; None keeps the file's.
        stride: yields frames 0, stride, 2 stride, ... . The frames between are decoded, not
        converted.

    Rotation tags and non-square pixels are not applied.

    Raises:
        VideoError: missing, not a video, no frame in it, or broken part way; names the path.
        ImportError: PyAV is not installed.
    """
    for name, value in (("stride", stride), ("frames", 1 if frames is None else frames)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1; got {value}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: expected (height, width) of at least 1; got {size!r}")
    return _iter_frames(path, frames, size, stride)


def decode(
    path: str | Path,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    stride: int = 1,
) -> Tensor:
    """Decodes into one uint8 RGB tensor [T, H, W, 3]; T is at most ``frames``.

    Arguments and errors as :func:`iter_frames`.
    """
    return torch.stack(list(iter_frames(path, frames, size, stride)))


def to_clip(frames: Tensor) -> Tensor:
    """uint8 frames [T, H, W, 3] -> a model's input, float32 [1, 3, T, H, W] in [0, 1]."""
    if frames.dim() != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            f"frames: expected uint8 [T, H, W, 3]; got {frames.dtype} {list(frames.shape)}"
        )
    return frames.permute(3, 0, 1, 2).unsqueeze(0).to(torch.float32).div(255).contiguous()


def _iter_frames(
    path: str | Path, frames: int | None, size: tuple[int, int] | None, stride: int
) -> Iterator[Tensor]:
    av = _av()
    scale: dict[str, Any] = {"format": "rgb24"}
    if size is not None:
        scale |= {"height": size[0], "width": size[1], "interpolation": "AREA"}
    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        pictures = container.decode(stream)
        for index in count():
            try:
                picture = next(pictures, None)
            except (av.FFmpegError, EOFError) as error:
                what = f"broken after {index} frames: {_reason(error)}"
                raise VideoError(path, what) from error
            if picture is None:
                if index == 0:
                    raise VideoError(path, "has a video stream without a single frame")
                return
            if size is None and (picture.height, picture.width) != (stream.height, stream.width):
                what = f"frame {index} changes to {picture.height}x{picture.width}; give a size"
                raise VideoError(path, what)
            if index % stride == 0:
                yield torch.from_numpy(picture.to_ndarray(**scale))
                if frames is not None and index // stride + 1 == frames:
                    return


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream, closed at the end."""
    av = _av()
    file = Path(path)
    if not file.exists():
        raise VideoError(path, "no such file")
    if not file.is_file():
        raise VideoError(path, "not a file")
    if file.stat().st_size == 0:
        raise VideoError(path, "the file is empty")
    try:
        container = av.open(str(file))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, f"not a video that FFmpeg can open: {_reason(error)}") from error
    with container:
        if not container.streams.video:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no"
            raise VideoError(path, f"no video in it ({kinds} streams)")
        yield container, container.streams.video[0]


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _av() -> ModuleType:
    return require("av", "decoding video")
