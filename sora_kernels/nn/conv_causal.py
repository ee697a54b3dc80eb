"""``CausalConvBNAct3d``: a block that looks at no later frame, and runs frame by frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .conv import ConvBNAct3d, Ints


class CausalConvBNAct3d(ConvBNAct3d):
    """:class:`ConvBNAct3d` whose padding in time lies before the first frame.

    Args:
        padding: int, (h, w) or ((h0, h1), (w0, w1)), of each frame. In time ``dilation * (kernel_size - 1)`` frames of
            zeros, or of copies of the first frame with ``padding_mode="replicate"``, go before the clip.

    The other arguments, the children and the state dict are those of :class:`ConvBNAct3d`.

    :meth:`step` takes a clip in pieces, of a frame or more, and gives in evaluation what :meth:`forward` gives for the
    whole::

        cache = None
        for frames in stream:  # [N, C, t, H, W]
            z, cache = block.step(frames, cache)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Any = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        **options: Any,
    ) -> None:
        of_frame = (padding, padding) if isinstance(padding, int) else tuple(padding)
        if len(of_frame) != 2:
            raise ValueError(
                f"padding: expected an int, (h, w) or ((h0, h1), (w0, w1)) of each frame, got {padding!r}"
            )
        kt = kernel_size if isinstance(kernel_size, int) else kernel_size[0]
        dt = dilation if isinstance(dilation, int) else dilation[0]
        h, w = ((p, p) if isinstance(p, int) else tuple(p) for p in of_frame)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, ((dt * (kt - 1), 0), h, w), dilation,
            groups, bias, padding_mode, **options,
        )  # fmt: skip

    @classmethod
    def from_modules(cls, *args: Any, **kwargs: Any) -> ConvBNAct3d:
        """Not for this block: ``nn.Conv3d`` pads both ends of time."""
        raise TypeError(f"{cls.__name__}: an nn.Conv3d pads both ends of time; load its state dict")

    def step(
        self, x: Tensor, cache: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next frames ``[N, C, t, H, W]`` -> their result and the frames to remember.

        Args:
            x: t must be a multiple of the stride in time.
            cache: what the step before returned; None at the beginning of a clip.

        Returns:
            z ``[N, K, t / stride, H', W']``, and the cache ``[N, C, dilation * (kernel_size - 1), H, W]``.
        """
        if self.training:
            raise RuntimeError(
                "step: expected evaluation mode, where frames do not meet in statistics"
            )
        before, stride = self.padding[0][0], self.conv.stride[0]
        if x.dim() != 5 or x.shape[2] == 0 or x.shape[2] % stride:
            raise ValueError(
                f"x: expected [N, C, T, H, W] with T a multiple of the stride {stride}, got {tuple(x.shape)}"
            )
        if cache is None:
            shape = (*x.shape[:2], before, *x.shape[3:])
            replicate = self.conv.padding_mode == "replicate"
            cache = x[:, :, :1].expand(shape) if replicate else x.new_zeros(shape)
        elif cache.shape != (*x.shape[:2], before, *x.shape[3:]):
            raise ValueError(
                f"cache: expected {(*x.shape[:2], before, *x.shape[3:])}, got {tuple(cache.shape)}"
            )
        frames = torch.cat([cache, x], 2)
        z = self._run(frames, residual, ((0, 0), *self.padding[1:]))
        # A copy: a view would keep all of x alive.
        return z, frames[:, :, frames.shape[2] - before :].clone()
