"""What the modules around a convolution share: the activation by name or module, padding in normal form, BatchNorm's
part of a call.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

ACTIVATIONS: dict[str, Any] = {"relu": nn.ReLU, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU}
PADDING_MODES = ("zeros", "replicate")


class ActivatedConv(nn.Module):
    """A child ``conv``, an activation and a backend; the base of the public modules."""

    conv: nn.Conv3d | nn.ConvTranspose3d
    padding: Any

    def _set(
        self, conv: nn.Module, activation: str | None, negative_slope: float, backend: str | None
    ) -> None:
        if activation not in (*ACTIVATIONS, None):
            raise ValueError(
                f"activation: expected one of {(*ACTIVATIONS, None)}, got {activation!r}"
            )
        self.conv = conv  # type: ignore[assignment]
        self.activation = activation
        self.negative_slope = negative_slope
        self.backend = backend

    @classmethod
    def _over(cls, conv: nn.Module, act: nn.Module | None, backend: str | None) -> Any:
        """A module around a convolution that exists, without the constructor's own."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._set(conv, *activation_of(act), backend)
        return module

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        chosen = f", backend={self.backend!r}" if self.backend else ""
        return f"activation={self.activation!r}{slope}{chosen}"


def are_pairs(padding: Any) -> bool:
    """Whether padding is ((t0, t1), (h0, h1), (w0, w1)), which ``nn.Conv3d`` does not take."""
    return not isinstance(padding, (int, str)) and any(not isinstance(p, int) for p in padding)


def padding_of(conv: nn.Conv3d) -> Any:
    """As the operator takes it."""
    if not isinstance(conv.padding, str):
        return conv.padding
    # nn.Conv3d keeps "same" as a word and its sides, innermost first, in a private list.
    sides = conv._reversed_padding_repeated_twice
    return tuple((sides[i], sides[i + 1]) for i in (4, 2, 0))


def check_padding_mode(name: str, padding_mode: str) -> None:
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"{name}'zeros' or 'replicate', got {padding_mode!r}")


def activation_of(act: nn.Module | None) -> tuple[str | None, float]:
    """Name and slope of an activation module; None or ``nn.Identity``: no activation."""
    if act is None or isinstance(act, nn.Identity):
        return None, 0.01
    for name, kind in ACTIVATIONS.items():
        if isinstance(act, kind):
            return name, getattr(act, "negative_slope", 0.01)
    raise TypeError(f"act: expected ReLU, SiLU, LeakyReLU or None, got {act!r}")


def check_modules(
    conv: nn.Module, kind: type[nn.Module], bn: nn.Module | None, out_channels: int | None = None
) -> None:
    """What ``from_modules`` takes."""
    if not isinstance(conv, kind):
        raise TypeError(f"conv: expected nn.{kind.__name__}, got {type(conv).__name__}")
    check_padding_mode("conv: expected padding_mode ", conv.padding_mode)  # type: ignore[arg-type]
    if bn is None:
        return
    if not isinstance(bn, (nn.BatchNorm3d, nn.SyncBatchNorm)):
        raise TypeError(f"bn: expected nn.BatchNorm3d, got {type(bn).__name__}")
    if bn.num_features != conv.out_channels:
        raise ValueError(f"bn: expected {conv.out_channels} features, got {bn.num_features}")


def held(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)`` of a parameter, buffer or child: nn.Module's own look-up costs a microsecond or two."""
    for there in (module._parameters, module._buffers, module._modules):
        if name in there:
            return there[name]
    return getattr(module, name)


def batch_norm(bn: nn.BatchNorm3d | nn.SyncBatchNorm) -> dict[str, Any]:
    """The operator's arguments that stand for a call of ``bn``; counts the batch."""
    training = bn.training and bn.track_running_stats
    momentum = bn.momentum
    if training and (count := held(bn, "num_batches_tracked")) is not None:
        count.add_(1)
        if momentum is None:
            # A cumulative average needs its count on the host; nn.BatchNorm3d reads it too.
            momentum = 1.0 / float(count)
    tracked = training or not bn.training
    return {
        "bn_weight": held(bn, "weight"),
        "bn_bias": held(bn, "bias"),
        "running_mean": held(bn, "running_mean") if tracked else None,
        "running_var": held(bn, "running_var") if tracked else None,
        "training": bn.training,
        "momentum": 0.0 if momentum is None else momentum,
        "eps": bn.eps,
        "process_group": _process_group(bn) if bn.training else None,
    }


def _process_group(bn: nn.Module) -> Any:
    """Whose ranks share the statistics: SyncBatchNorm's group, all ranks where it names none."""
    if not isinstance(bn, nn.SyncBatchNorm):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return bn.process_group or dist.group.WORLD
