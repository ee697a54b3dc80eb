"""What a call asks for, beside its tensors: one hashable value that every backend takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .geometry import BORDERS, Size3, WindowPlan, plan
from .position import INDICES, Codes, codes

PADS = ("kv", "mask")


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
        return plan(tuple(size), self.window, self.shift, self.border)

    def codes(self, window: Size3) -> Codes:
        """Of the window that a plan uses."""
        return codes(window, self.table_window, self.bias_index)


def check_names(bias_index: str, border: str, pad: str) -> None:
    for name, value, known in (
        ("bias_index", bias_index, INDICES), ("border", border, BORDERS), ("pad", pad, PADS)
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
