"""What a call asks for, beside its tensors: one hashable value that every backend takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .geometry import WindowPlan
    from .position import Codes

Size3 = tuple[int, int, int]

BORDERS = ("cyclic", "ragged", "grid")
INDICES = ("torchvision", "exact")
PADS = ("kv", "mask")


def fit(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[Size3, Size3]:
    """The window clipped to the map, and no shift on the axes that it covers whole."""
    clipped = tuple(min(n, w) for n, w in zip(size, window, strict=True))
    kept = tuple(0 if n <= w else s for n, w, s in zip(size, window, shift, strict=True))
    return clipped, kept  # type: ignore[return-value]


def table_rows(window: Size3) -> int:
    """Of a bias table: one for every offset in a window."""
    t, h, w = window
    return (2 * t - 1) * (2 * h - 1) * (2 * w - 1)


class Options(NamedTuple):
    """Attributes as the arguments of :func:`sora_kernels.window_attention3d`; ``dropout_p`` is 0 in evaluation."""

    num_heads: int
    window: Size3
    shift: Size3
    table_window: Size3
    bias_index: str
    border: str
    pad: str
    causal_t: bool
    scale: float
    dropout_p: float

    @classmethod
    def of_schema(cls, num_heads, window, shift, table_window, *others) -> Options:
        """From the registered op's arguments, whose sizes are lists."""
        return cls(num_heads, tuple(window), tuple(shift), tuple(table_window), *others)

    @property
    def pads_take_part(self) -> bool:
        return self.pad == "kv" and self.border != "ragged"

    def plan(self, size: Sequence[int]) -> WindowPlan:
        """Of a map ``(T, H, W)``."""
        from .geometry import plan  # numpy, which importing the library does not wait for

        return plan(tuple(size), self.window, self.shift, self.border)

    def codes(self, window: Size3) -> Codes:
        """Of the window that a plan uses."""
        from .position import codes

        return codes(window, self.table_window, self.bias_index)


def check_names(bias_index: str, border: str, pad: str) -> None:
    for name, value, known in (
        ("bias_index", bias_index, INDICES), ("border", border, BORDERS), ("pad", pad, PADS)
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
