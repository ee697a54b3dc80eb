"""Two builds of a model on one clip: do they agree, and what does each cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sora_models.demo import dispatch, measure
from sora_models.models import CRNN
from sora_models.registry import build


@dataclass(frozen=True)
class Pair:
    """The same weights in two builds, and in fp64 and fp32 plain PyTorch as truth and yardstick."""

    backends: tuple[str, str]
    models: tuple[CRNN, CRNN]
    plain: CRNN
    truth: CRNN


@dataclass(frozen=True)
class Comparison:
    """Of one clip; pairs hold what belongs to build a, then build b.

    Attributes:
        error: largest error of logits and features against fp64.
        seconds: median time of a warm call.
        features: [T, hidden_size], of build a, on the CPU.
        operators: operator -> the backends it took, with reasons.
        disagreement: empty where both builds keep the 2x rule.
    """

    error: tuple[float, float]
    seconds: tuple[float, float]
    features: Tensor
    operators: dict[str, list[str]]
    disagreement: str


def build_pair(backend_a: str, backend_b: str, seed: int, device: torch.device) -> Pair:
    """Seeded weights, loaded from build to build through the state_dict."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = _crnn("torch")
    models = []
    for backend in (backend_a, backend_b):
        model = _crnn(backend)
        model.load_state_dict(plain.state_dict())
        models.append(model.to(device).eval())
    plain = plain.to(device).eval()
    return Pair(
        (backend_a, backend_b), (models[0], models[1]), plain, copy.deepcopy(plain).double()
    )


@torch.no_grad()
def calibrate(pair: Pair, clips: list[Tensor]) -> None:
    """Takes BatchNorm's running statistics from the clips, the same in every build."""
    norms = [m for m in pair.plain.modules() if isinstance(m, nn.BatchNorm3d)]
    momenta = [norm.momentum for norm in norms]
    pair.plain.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the clips
    for clip in clips:
        pair.plain(clip)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    pair.plain.eval()
    for model in (*pair.models, pair.truth):
        model.load_state_dict(pair.plain.state_dict())


@torch.no_grad()
def compare(
    pair: Pair, clip: Tensor, rounds: int, step: Callable[[str], None] = lambda what: None
) -> Comparison:
    """Runs both builds on ``clip`` [1, 3, T, H, W]; ``step`` hears what is being done."""
    step("fp64 truth")
    truth = _outputs(pair.truth, clip.double())
    plain = _outputs(pair.plain, clip)
    step("check")
    got = tuple(_outputs(model, clip) for model in pair.models)
    errors = tuple(
        max(_largest(ours.double() - want) for ours, want in zip(outputs, truth, strict=True))
        for outputs in got
    )
    verdicts = (
        _disagreement(backend, outputs, plain, truth)
        for backend, outputs in zip(pair.backends, got, strict=True)
    )
    runs = [partial(model, clip) for model in pair.models]
    operators: dict[str, list[str]] = {}
    for backend, run in zip(pair.backends, runs, strict=True):
        if backend != "torch":
            operators |= dispatch.operators_used(run)
    step("time")
    seconds = measure.median_seconds(runs, rounds, clip.device)
    return Comparison(
        error=(errors[0], errors[1]),
        seconds=(seconds[0], seconds[1]),
        features=got[0][1][0].cpu(),
        operators=operators,
        disagreement="; ".join(filter(None, verdicts)),
    )


def _crnn(backend: str) -> CRNN:
    model = build("crnn", backend)
    assert isinstance(model, CRNN)
    return model


def _outputs(model: CRNN, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [1, num_classes] and features [1, T, hidden_size]."""
    features = model.features(clip)
    return model.fc(features[:, -1]), features


def _largest(error: Tensor) -> float:
    return error.abs().max().item()


def _disagreement(
    backend: str, outputs: tuple[Tensor, ...], plain: tuple[Tensor, ...], truth: tuple[Tensor, ...]
) -> str:
    from sora_kernels.testing import assert_within_2x

    for name, ours, other, want in zip(("logits", "features"), outputs, plain, truth, strict=True):
        try:
            assert_within_2x(ours, other, want, name=f"{backend} {name}")
        except AssertionError as error:
            return str(error)
    return ""
