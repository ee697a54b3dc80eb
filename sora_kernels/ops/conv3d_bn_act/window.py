"""How a convolution's kernel moves over x: one hashable value that every backend takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Triple = tuple[int, int, int]


class Window(NamedTuple):
    """Of a convolution ``[N, C, T, H, W] -> [N, K, T', H', W']``; every triple is (t, h, w).

    Attributes:
        before, after: padding, of zeros or, with ``replicate``, of the border's values.
    """

    kernel: Triple
    stride: Triple = (1, 1, 1)
    before: Triple = (0, 0, 0)
    after: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    replicate: bool = False

    def output(self, sizes: Sequence[int]) -> list[int]:
        """[T', H', W'] of [T, H, W]; an axis too short gives less than 1."""
        return [
            (n + b + a - d * (k - 1) - 1) // s + 1
            for n, k, s, b, a, d in zip(
                sizes, self.kernel, self.stride, self.before, self.after, self.dilation, strict=True
            )
        ]

    @property
    def symmetric(self) -> bool:
        """Whether ATen's convolution can pad so by itself."""
        return self.before == self.after and not (self.replicate and any(self.before))
