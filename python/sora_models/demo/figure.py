"""The demo's picture: for each clip sampled frames, and below them the features over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_models._extras import require
from sora_models.data import iter_frames, probe

STRIP = 8
_THUMB_HEIGHT = 180
_PAPER, _INK, _SOFT = "#0d1117", "#e6edf3", "#8b949e"


@dataclass(frozen=True)
class Panel:
    """One clip: its name, a line about it, thumbnails and features [T, channels]."""

    title: str
    note: str
    thumbnails: list[Tensor]
    features: Tensor
    seconds_per_frame: float | None


def thumbnails(path: str | Path, frames: int, stride: int) -> list[Tensor]:
    """Frames from the middles of equal parts of the first ``frames`` * ``stride``, uint8 RGB."""
    info = probe(path)
    count = min(STRIP, frames)
    wanted = [(2 * k + 1) * frames // (2 * count) for k in range(count)]
    size = (_THUMB_HEIGHT, max(1, round(_THUMB_HEIGHT * info.width / info.height)))
    pictures = enumerate(iter_frames(path, frames=wanted[-1] + 1, size=size, stride=stride))
    return [picture for index, picture in pictures if index in wanted]


def draw(panels: Sequence[Panel], path: Path, title: str, footnote: str) -> None:
    """Writes a PNG. Raises ImportError where matplotlib is not installed."""
    agg = require("matplotlib.backends.backend_agg", "drawing")
    matplotlib_figure = require("matplotlib.figure", "drawing")

    width, left, right = 12.0, 0.85, 1.0
    span = width - left - right
    strips = [_strip_height(panel, span) for panel in panels]
    head, heat, gap, foot = 1.05, 1.75, 0.95, 0.1
    height = head + sum(strip + heat + gap for strip in strips) + foot
    figure = matplotlib_figure.Figure(figsize=(width, height), dpi=150, facecolor=_PAPER)
    agg.FigureCanvasAgg(figure)

    def axes(x: float, y: float, w: float, h: float) -> Any:
        """Axes by inches from the top left."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    def text(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, words, va="baseline", **style)

    text(left, 0.42, title, color=_INK, fontsize=17, fontweight="bold")
    y = head
    for panel, strip in zip(panels, strips, strict=True):
        text(left, y - 0.12, panel.title, color=_INK, fontsize=12.5, fontweight="bold")
        text(left + span, y - 0.12, panel.note, color=_SOFT, fontsize=9.5, ha="right")
        _draw_strip(axes(left, y, span, strip), panel)
        heat_axes = axes(left, y + strip + 0.05, span, heat)
        image = _draw_heat(heat_axes, panel)
        scale = figure.colorbar(image, cax=axes(left + span + 0.14, y + strip + 0.05, 0.12, heat))
        _style(scale.ax)
        scale.set_ticks([0, 0.5, 1], labels=["lowest", "median", "highest"])
        y += strip + heat + gap
    text(left, height - 0.22, footnote, color=_SOFT, fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor=_PAPER)


def _strip(panel: Panel) -> Tensor:
    """The thumbnails side by side, a thin edge between them, uint8 [H, W, 3]."""
    paper = [int(_PAPER[i : i + 2], 16) for i in (1, 3, 5)]
    edge = torch.tensor(paper, dtype=torch.uint8).expand(_THUMB_HEIGHT, 4, 3)
    return torch.cat([part for picture in panel.thumbnails for part in (picture, edge)][:-1], 1)


def _strip_height(panel: Panel, span: float) -> float:
    high, wide, _ = _strip(panel).shape
    return min(2.4, span * high / wide)


def _draw_strip(axes: Any, panel: Panel) -> None:
    axes.imshow(_strip(panel).numpy(), interpolation="lanczos")
    axes.set_anchor("W")
    axes.set_axis_off()


def _draw_heat(axes: Any, panel: Panel) -> Any:
    """Each feature's moments ranked from lowest to highest, rows ordered by when they are high.

    Ranks, because the start-up from a zero state is so much larger than what follows it.
    """
    features = panel.features.float()
    steps = len(features)
    ranks = features.argsort(0).argsort(0) / max(1, steps - 1)
    weights = ranks.pow(6)
    centre = (weights * torch.arange(steps)[:, None]).sum(0) / weights.sum(0).clamp_min(1e-12)
    ordered = ranks[:, centre.argsort(stable=True)].T
    unit = panel.seconds_per_frame or 1.0
    image = axes.imshow(
        ordered.numpy(),
        aspect="auto",
        cmap="magma",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(0, steps * unit, features.shape[1], 0),
    )
    axes.set_xlabel("time, s" if panel.seconds_per_frame else "frame", fontsize=9.5)
    axes.set_ylabel("feature", fontsize=9.5)
    axes.set_yticks([])
    _style(axes)
    return image


def _style(axes: Any) -> None:
    axes.set_facecolor(_PAPER)
    axes.tick_params(colors=_SOFT, labelsize=8.5, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_SOFT)
    for spine in axes.spines.values():
        spine.set_visible(False)
