"""``sora demo``: real clips through ``crnn`` in two builds, one table, one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sora_models._extras import require
from sora_models._text import table
from sora_models.data import SAMPLE_CLIPS, VideoInfo, decode, find_clip, probe, to_clip
from sora_models.demo import figure, memory
from sora_models.demo.compare import Comparison, build_pair, calibrate, compare

PICTURE = "demo.png"


@dataclass(frozen=True)
class DemoOptions:
    """Options of ``sora demo``; ``size`` is (height, width)."""

    clips: Sequence[str]
    frames: int = 32
    stride: int = 3
    size: tuple[int, int] = (64, 64)
    backends: tuple[str, str] = ("torch", "sora")
    out: Path = Path("out")
    device: str = "cpu"
    seed: int = 0
    rounds: int = 5


@dataclass(frozen=True)
class Clip:
    name: str
    path: Path
    info: VideoInfo
    frames: Tensor


def run(options: DemoOptions) -> bool:
    """Runs the demo, prints it, and tells whether the builds agree on every clip.

    Raises VideoError before anything is computed where a clip cannot be decoded.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: torch sees no CUDA device here; got {options.device!r}")
    paths = [find_clip(clip) for clip in options.clips]
    steps = ("fp64 truth", "check", "time")
    bar = require("tqdm", "the demo").tqdm(
        total=len(paths) * (1 + len(steps)) + 2, unit="step", leave=False
    )

    def step(name: str, what: str) -> None:
        bar.set_description(f"{name}: {what}")
        bar.update()

    with bar:
        clips = []
        for given, path in zip(options.clips, paths, strict=True):
            name = given if given in SAMPLE_CLIPS else path.stem
            step(name, "decode")
            frames = decode(path, options.frames, options.size, options.stride)
            clips.append(Clip(name, path, probe(path), frames))
        inputs = [to_clip(clip.frames).to(device) for clip in clips]
        pair = build_pair(*options.backends, options.seed, device)
        calibrate(pair, inputs)
        results = [
            compare(pair, tensor, options.rounds, partial(step, clip.name))
            for clip, tensor in zip(clips, inputs, strict=True)
        ]
        step("all", "memory")
        shapes = [tensor.shape for tensor in inputs]
        of_backend = {b: memory.peaks(b, shapes, options.device) for b in set(options.backends)}
        step("all", "picture")
        picture = options.out / PICTURE
        figure.draw(
            [_panel(clip, result, options) for clip, result in zip(clips, results, strict=True)],
            picture,
            title="What a Sora CRNN carries from frame to frame",
            footnote=(
                "Rows: the LSTM's hidden units after each frame, ranked over the clip and ordered "
                f"by when they are high. Untrained weights, seed {options.seed}."
            ),
        )

    peaks = [of_backend[backend] for backend in options.backends]
    rows = [row(*of_clip) for of_clip in zip(clips, results, *peaks, strict=True)]
    print(table(header(options.backends), rows))
    print(
        f"\nerror: largest of logits and features, against plain PyTorch in fp64; "
        f"time: median of {options.rounds} warm interleaved runs on {_machine(device)}; "
        f"peak memory: {memory.METHODS.get(device.type, 'not measured')}"
    )
    for operator, taken in _operators(results).items():
        print(f"{operator} ran on {', '.join(taken)}")
    print(f"picture: {picture}")
    disagreements = [
        f"{clip.name}: {result.disagreement}"
        for clip, result in zip(clips, results, strict=True)
        if result.disagreement
    ]
    print("\n".join(disagreements) or "the builds agree on every clip (2x rule)")
    return not disagreements


def header(backends: tuple[str, str]) -> list[str]:
    a, b = backends if backends[0] != backends[1] else (f"{backends[0]} a", f"{backends[1]} b")
    return [
        "clip", "frames", f"error {a}", f"error {b}", f"{a} ms", f"{b} ms", f"{a} / {b}",
        f"{a} MiB", f"{b} MiB",
    ]  # fmt: skip


def row(clip: Clip, result: Comparison, *peaks: int | None) -> list[str]:
    t, h, w, _ = clip.frames.shape
    first, second = result.seconds
    return [
        clip.name,
        f"{t} x {h} x {w}",
        *(f"{error:.1e}" for error in result.error),
        f"{first * 1e3:.1f}",
        f"{second * 1e3:.1f}",
        f"{first / second:.2f}x",
        *("-" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks),
    ]


def _operators(results: Sequence[Comparison]) -> dict[str, list[str]]:
    merged: dict[str, dict[str, None]] = {}
    for result in results:
        for operator, taken in result.operators.items():
            merged.setdefault(operator, {}).update(dict.fromkeys(taken))
    return {operator: list(taken) for operator, taken in merged.items()}


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def _panel(clip: Clip, result: Comparison, options: DemoOptions) -> figure.Panel:
    t, h, w, _ = clip.frames.shape
    fps = clip.info.fps
    return figure.Panel(
        title=clip.name,
        note=f"{clip.info.width} x {clip.info.height}, {t} frames read at {w} x {h}",
        thumbnails=figure.thumbnails(clip.path, t, options.stride),
        features=result.features,
        seconds_per_frame=options.stride / fps if fps else None,
    )
