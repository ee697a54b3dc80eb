"""How a convolution's kernel moves over x: one hashable value that every backend takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

Triple = tuple[int, int, int]


class Window(NamedTuple):
    """Of a convolution ``[N, C, T, H, W] -> [N, K, T', H', W']``; every triple is (t, h, w).

    Attributes:
        before, after: padding, of zeros or, with ``replicate``, of the border's values.
        transposed: the convolution whose gradient by its input is this one, as ``F.conv_transpose3d``; the padding is
            taken from its result and ``output_padding`` added to the end.
    """

    kernel: Triple
    stride: Triple = (1, 1, 1)
    before: Triple = (0, 0, 0)
    after: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    replicate: bool = False
    transposed: bool = False
    output_padding: Triple = (0, 0, 0)

    def output(self, sizes: Sequence[int]) -> list[int]:
        """[T', H', W'] of [T, H, W]; an axis too short gives less than 1."""
        each = zip(
            sizes, self.kernel, self.stride, self.before, self.after, self.dilation, self.output_padding,
            strict=True,
        )  # fmt: skip
        if self.transposed:
            return [(n - 1) * s - b - a + d * (k - 1) + o + 1 for n, k, s, b, a, d, o in each]
        return [(n + b + a - d * (k - 1) - 1) // s + 1 for n, k, s, b, a, d, _ in each]

    @property
    def symmetric(self) -> bool:
        """Whether ATen's convolution can pad so by itself."""
        return self.before == self.after and not (self.replicate and any(self.before))

    def filters(self, weight: Sequence[int]) -> int:
        """K of a weight's shape."""
        return weight[1] * self.groups if self.transposed else weight[0]


def _of(
    kernel: Any, stride: Any, padding: Any, replicate: bool, dilation: Any, groups: int, transposed: bool,
    output_padding: Any,
) -> Window:  # fmt: skip
    return Window(
        kernel, stride, padding[:3], padding[3:], dilation, groups, replicate, transposed, output_padding
    )  # fmt: skip


_cached = functools.lru_cache(maxsize=4096)(_of)


def of_schema(
    weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], replicate: bool,
    dilation: Sequence[int], groups: int, transposed: bool, output_padding: Sequence[int],
) -> Window:  # fmt: skip
    """From the registered op's arguments; ``padding`` holds what is before, then what is after."""
    fields = (
        tuple(weight[2:]), tuple(stride), tuple(padding), replicate, tuple(dilation), groups, transposed,
        tuple(output_padding),
    )  # fmt: skip
    try:
        return _cached(*fields)
    except TypeError:  # a symbolic size: no key for a cache
        return _of(*fields)
