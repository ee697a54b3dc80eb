"""Small models and small videos for the tests of ``sora_models``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sora_models

TINY: dict[str, dict[str, Any]] = {
    "crnn": {"channels": (4, 6), "hidden_size": 5, "num_classes": 3},
    "vaegan": {
        "channels": (4, 6),
        "time_strides": (1, 2),
        "latent_channels": 2,
        "critic_channels": (4,),
        "critic_hidden": 8,
        "num_classes": 3,
    },
    "pyramid_transformer": {
        "patch_size": (1, 2, 2),
        "dim": 8,
        "scales": (1, 3),
        "times": (1, 2),
        "num_heads": 2,
        "window_size": (2, 2, 2),
        "mlp_ratio": 2,
        "hidden_size": 6,
        "num_classes": 3,
    },
    "enhancer": {"channels": (4,), "hidden_size": 5, "stack": (6,), "num_classes": 3},
    "autoencoder": {"channels": (4, 6), "num_blocks": 1, "latent_size": 5, "num_classes": 3},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """``tiny(name, backend="torch", **config)``: a small model of that name, seeded."""

    def build(name: str, backend: str = "torch", **config: Any) -> Any:
        torch.manual_seed(0)
        return sora_models.build(name, backend, **TINY[name] | config)

    return build


@pytest.fixture
def write_video(tmp_path: Path) -> Callable[..., Path]:
    """``write_video(frames, name, codec, format)``: a file of uint8 frames [T, H, W, 3]."""
    av = pytest.importorskip("av")

    def write(
        frames: torch.Tensor, name: str = "clip.mp4", codec: str = "mpeg4", format: str = "yuv420p"
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = format
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture
def moving_square() -> torch.Tensor:
    """12 frames of 32 x 48: a bright square that walks over a dark ramp, uint8 [T, H, W, 3]."""
    frames = torch.zeros(12, 32, 48, 3, dtype=torch.uint8)
    frames += torch.arange(48, dtype=torch.uint8).view(1, 1, 48, 1)
    for t in range(12):
        frames[t, 8:20, 3 * t : 3 * t + 10] = torch.tensor([230, 180, 60], dtype=torch.uint8)
    return frames
