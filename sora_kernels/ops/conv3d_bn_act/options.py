"""What follows the convolution: one hashable value that every backend takes."""

from __future__ import annotations

from typing import NamedTuple

BATCH, RUNNING, NONE = "batch", "running", "none"
NORMS = (BATCH, RUNNING, NONE)


class Options(NamedTuple):
    """``z = activation(normalised(y) + residual)``.

    Attributes:
        norm: "batch": by y's own statistics; "running": by the given ones; "none": ``y + bias``.
        activation: "relu", "silu", "leaky_relu" or "" for the identity.
        group: name of the process group whose ranks share statistics, "" for this process alone.
    """

    norm: str
    activation: str
    negative_slope: float
    momentum: float
    eps: float
    group: str = ""

    @property
    def signed(self) -> bool:
        """Whether z's sign says all that the activation's derivative needs."""
        return self.activation in ("", "relu") or (
            self.activation == "leaky_relu" and self.negative_slope > 0
        )

    @property
    def keeps_y(self) -> bool:
        """Whether backward reads the convolution's result: else z and the weight say enough (see the README)."""
        return self.norm == BATCH or not self.signed
