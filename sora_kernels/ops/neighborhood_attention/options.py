"""What a call asks for, beside its tensors: one hashable value that every backend takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .geometry import Axis, Size3


class Options(NamedTuple):
    """Attributes as the arguments of :func:`sora_kernels.neighborhood_attention3d`."""

    window: Size3
    stride: Size3
    dilation: Size3
    causal_t: bool
    scale: float

    def axes(self, size: Sequence[int]) -> tuple[Axis, Axis, Axis]:
        """Of a map ``(T, H, W)``."""
        from .geometry import axis  # numpy, which importing the library does not wait for

        t, h, w = (
            axis(n, window, stride, dilation, self.causal_t and k == 0)
            for k, (n, window, stride, dilation) in enumerate(
                zip(size, self.window, self.stride, self.dilation, strict=True)
            )
        )
        return t, h, w

    def sees_all(self, size: Sequence[int]) -> bool:
        """Whether every token of a map sees every other."""
        covered = all(
            n <= w and d == 1 for n, w, d in zip(size, self.window, self.dilation, strict=True)
        )
        return covered and not (self.causal_t and size[0] > 1)

    @property
    def rows(self) -> int:
        """Of the bias table."""
        t, h, w = self.window
        return (2 * t - 1) * (2 * h - 1) * (2 * w - 1)

    @property
    def steps(self) -> Size3:
        """Rows of the bias table from one offset along t, h, w to the next: the row of a query and a key is
        ``middle`` plus the steps times (query - key), in units of the dilation.
        """
        _, h, w = self.window
        return (2 * h - 1) * (2 * w - 1), 2 * w - 1, 1

    @property
    def middle(self) -> int:
        """The row of offset zero."""
        return sum((n - 1) * s for n, s in zip(self.window, self.steps, strict=True))
