"""ATen's convolution (cuDNN, oneDNN) for any window: what it cannot pad by itself is padded as a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Window

# Where torch has a binding of its own, as for torch.convolution, it is several us faster than torch.ops.aten's.
_convolution_backward = torch.ops.aten.convolution_backward.default
_replication_pad_backward = torch.ops.aten.replication_pad3d_backward.default
_NONE = (0, 0, 0)


def convolve(x: Tensor, weight: Tensor, window: Window, bias: Tensor | None = None) -> Tensor:
    """y ``[N, K, T', H', W']``, in the layout that ATen chooses."""
    padding = window.before
    if not window.symmetric:
        x, padding = pad(x, window), _NONE
    return torch.convolution(
        x, weight, bias, window.stride, padding, window.dilation, window.transposed,
        window.output_padding, window.groups,
    )  # fmt: skip


def convolve_backward(
    dy: Tensor, x: Tensor, weight: Tensor, window: Window, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias for ``needs`` (None where not needed)."""
    if not needs[1] or not window.symmetric or not is_misread(x, window):
        return gradients(dy, x, weight, window, needs)
    dx, _, dbias = gradients(dy, x, weight, window, (needs[0], False, needs[2]))
    unpadded = window._replace(before=_NONE, after=_NONE, replicate=False)
    _, dweight, _ = gradients(dy, pad(x, window), weight, unpadded, (False, True, False))
    return dx, dweight, dbias


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, window: Window, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """ATen's gradients as they are. x is padded again: the copy is not kept."""
    padded, padding = x, window.before
    if not window.symmetric:
        padded, padding = pad(x, window), _NONE
    dx, dweight, dbias = _convolution_backward(
        dy, padded, weight, [window.filters(weight.shape)], window.stride, padding, window.dilation,
        window.transposed, window.output_padding, window.groups, list(needs),
    )  # fmt: skip
    if needs[0] and padded is not x:
        dx = _unpad(dx, x, window)
    return dx, dweight, dbias


def is_misread(x: Tensor, window: Window) -> bool:
    """Whether oneDNN's gradient of the weight may be wrong, or write past its memory, on a padded axis that is no
    longer than the kernel: in bf16, and with two frames of padding or more (7 taps, stride 2, padding 3 of 5 to 7
    frames). Of x that is padded as a tensor it is right.
    """
    if not x.is_cpu or window.transposed or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    axes = zip(x.shape[2:], window.kernel, window.dilation, window.before, strict=True)
    covered = [p if d * (k - 1) + 1 >= n else 0 for n, k, d, p in axes]
    return max(covered) > 0 if x.dtype == torch.bfloat16 else covered[0] > 1


def layout(t: Tensor) -> torch.memory_format:
    """Channels-last where t is that and not contiguous too, else contiguous."""
    last = t.is_contiguous(memory_format=torch.channels_last_3d) and not t.is_contiguous()
    return torch.channels_last_3d if last else torch.contiguous_format


def pad(x: Tensor, window: Window) -> Tensor:
    """x with the window's padding, in x's layout."""
    padded = F.pad(x, _sides(window), "replicate" if window.replicate else "constant")
    return padded.contiguous(memory_format=layout(x))


def _unpad(dx: Tensor, x: Tensor, window: Window) -> Tensor:
    """The gradient by x of the gradient by ``pad(x)``, in x's layout."""
    if window.replicate:
        # 16-bit sums over the border would round at every step.
        wide = dx.to(torch.promote_types(dx.dtype, torch.float32)).contiguous()
        dx = _replication_pad_backward(wide, x.to(wide.dtype), _sides(window)).to(dx.dtype)
    else:
        for axis, (before, size) in enumerate(zip(window.before, x.shape[2:], strict=True)):
            dx = dx.narrow(2 + axis, before, size)
    return dx.contiguous(memory_format=layout(x))


def _sides(window: Window) -> list[int]:
    return [
        side
        for b, a in zip(window.before[::-1], window.after[::-1], strict=True)
        for side in (b, a)
    ]
