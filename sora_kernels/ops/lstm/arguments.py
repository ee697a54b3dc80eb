"""Checks and casts of ``lstm``'s arguments: the part that depends on shapes, and on no backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

States = tuple[Tensor, Tensor] | None


class Sizes(NamedTuple):
    """Of one layer."""

    directions: int
    hidden_size: int
    proj_size: int

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    @classmethod
    def of_layer(cls, x: Tensor, weights: Sequence[Tensor], bias: bool) -> Sizes:
        """From a flat list: 2 entries a direction, 2 more with biases, 1 more with a projection."""
        plain = 4 if bias else 2
        directions = 1 if len(weights) <= plain + 1 else 2
        projects = len(weights) > plain * directions
        return cls(directions, weights[1].shape[0] // 4, weights[1].shape[1] if projects else 0)

    def states(
        self, x: Tensor, h0: Tensor | None, c0: Tensor | None, num_layers: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The given states, zeros where there are none. x is [T, B, I]."""
        count, batch = num_layers * self.directions, x.shape[1]
        if h0 is None:
            h0 = x.new_zeros(count, batch, self.output_size)
        if c0 is None:
            c0 = x.new_zeros(count, batch, self.hidden_size)
        return h0, c0


def casts(x: Tensor) -> bool:
    """Whether autocast is on for x's device (meta has none)."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor, hx: Any, weights: Sequence[Tensor]) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """Everything in autocast's dtype where it is on and x is not fp64."""
    if not casts(x) or x.dtype == torch.float64:
        return x, hx, weights
    dtype = torch.get_autocast_dtype(x.device.type)
    hx = None if hx is None else (hx[0].to(dtype), hx[1].to(dtype))
    return x.to(dtype), hx, [w.to(dtype) for w in weights]


def validate(
    x: Tensor, hx: States, weights: Sequence[Tensor], bias: bool, num_layers: int,
    bidirectional: bool, batch_first: bool, proj_size: int, dropout: float, lengths: Tensor | None,
    reset: Tensor | None, memory: str, precision: str | None,
) -> None:  # fmt: skip
    """Raises one error that names the argument, what was expected and what came."""
    if memory != "save":
        if memory == "recompute":
            raise NotImplementedError(
                "lstm: memory='recompute' is not there yet; use memory='save'"
            )
        raise ValueError(f"lstm: memory must be 'save' or 'recompute', got {memory!r}")
    if precision not in (None, "tf32", "ieee"):
        raise ValueError(f"lstm: precision must be None, 'tf32' or 'ieee', got {precision!r}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"lstm: dropout must be in [0, 1], got {dropout}")
    if num_layers < 1:
        raise ValueError(f"lstm: num_layers must be at least 1, got {num_layers}")
    sizes, dtype, device = x.shape, x.dtype, x.device
    if len(sizes) != 3:
        axes = "[B, T, I]" if batch_first else "[T, B, I]"
        raise ValueError(f"lstm: x must be {axes}, got {tuple(x.shape)}")
    if not dtype.is_floating_point:
        raise ValueError(f"lstm: x must be floating point, got {x.dtype}")
    T, B, width = sizes
    if batch_first:
        T, B = B, T
    if T == 0:
        raise ValueError(f"lstm: x must have at least one step, got {tuple(x.shape)}")
    directions = 2 if bidirectional else 1
    per = (4 if bias else 2) + (1 if proj_size else 0)
    if len(weights) != num_layers * directions * per:
        raise ValueError(
            f"lstm: weights must be {num_layers} layers x {directions} directions x {per} tensors "
            f"for bias={bias}, proj_size={proj_size}, got {len(weights)}"
        )
    recurrent = weights[1].shape
    if len(recurrent) != 2 or recurrent[0] % 4:
        raise ValueError(f"lstm: weights[1] (w_hh) must be [4*H, H], got {tuple(recurrent)}")
    H = recurrent[0] // 4
    if not 0 <= proj_size < max(H, 1):
        raise ValueError(
            f"lstm: proj_size must be in 0..hidden_size - 1 = {H - 1}, got {proj_size}"
        )
    P = proj_size or H
    count = num_layers * directions
    own: list[tuple[int, ...]] = [(4 * H, width), (4 * H, P)]
    if bias:
        own += [(4 * H,), (4 * H,)]
    if proj_size:
        own.append((P, H))
    for k, w in enumerate(weights):
        if k == per * directions:
            own[0] = (4 * H, directions * P)
        if w.shape != own[k % per] or w.dtype != dtype or w.device != device:
            raise _mismatch(f"weights[{k}]", w, own[k % per], x)
    if hx is not None:
        if len(hx) != 2:
            raise ValueError(f"lstm: hx must be (h_0, c_0) or None, got {len(hx)} tensors")
        for name, t, size in (("h_0", hx[0], P), ("c_0", hx[1], H)):
            if t.shape != (count, B, size) or t.dtype != dtype or t.device != device:
                raise _mismatch(name, t, (count, B, size), x)
    if lengths is not None:
        if lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"lstm: lengths must be int32 or int64 [{B}], "
                f"got {lengths.dtype} {tuple(lengths.shape)}"
            )
    if reset is not None:
        if reset.shape != x.shape[:2] or reset.dtype != torch.bool or reset.device != x.device:
            raise ValueError(
                f"lstm: reset must be bool {tuple(x.shape[:2])} on {x.device}, "
                f"got {reset.dtype} {tuple(reset.shape)} on {reset.device}"
            )


def _mismatch(name: str, t: Tensor, shape: tuple[int, ...], x: Tensor) -> ValueError:
    return ValueError(
        f"lstm: {name} must be {shape} {x.dtype} on {x.device}, "
        f"got {tuple(t.shape)} {t.dtype} on {t.device}"
    )
