"""``PyramidPool3d``: :func:`sora_kernels.pyramid_pool3d` as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops.pyramid_pool import pyramid_pool3d
from ..ops.pyramid_pool.backends import OPERATOR
from ..ops.pyramid_pool.levels import Given, parse
from ..ops.pyramid_pool.op import check_names


class PyramidPool3d(nn.Module):
    """Adaptive pools of several levels over time, height and width, side by side. No parameters.

    Args:
        levels, mode, output, data_format, backend: as :func:`sora_kernels.pyramid_pool3d`.

    Shape:
        x ``[B, C, T, H, W]`` (``[B, T, H, W, C]`` for "NDHWC"), valid_size int ``[B, 3]`` or None ->
        ``[B, out_features(C)]`` for "flat", a list of maps for "maps".

    Example:
        >>> pool = sora_kernels.nn.PyramidPool3d((1, 2, 4))
        >>> head = torch.nn.Linear(pool.out_features(96), 10)
        >>> head(pool(torch.randn(8, 96, 8, 14, 14))).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        levels: Sequence[Given] = (1, 2, 4),
        *,
        mode: str = "max",
        output: str = "flat",
        data_format: str = "NCDHW",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_names(mode, output, data_format)
        parsed = parse(levels, output)
        OPERATOR.check_name(backend)
        self.levels = tuple((t or None, h or None, w or None) for t, h, w in parsed)
        self.mode, self.output, self.data_format = mode, output, data_format
        self.backend = backend

    def forward(self, x: Tensor, valid_size: Tensor | None = None) -> Tensor | list[Tensor]:
        return pyramid_pool3d(
            x, self.levels, mode=self.mode, output=self.output, data_format=self.data_format,
            valid_size=valid_size, backend=self.backend,
        )  # fmt: skip

    def out_features(self, channels: int) -> int:
        """Width of the flat result, or of all maps' bins and channels together where no axis is whole."""
        bins = 0
        for level in self.levels:
            count = channels * (2 if self.mode == "maxavg" else 1)
            for o in level:
                if o is None:
                    raise ValueError(
                        f"out_features: expected levels with numbers of bins, got {level}"
                    )
                count *= o
            bins += count
        return bins

    def extra_repr(self) -> str:
        backend = f", backend={self.backend!r}" if self.backend else ""
        return (
            f"levels={self.levels}, mode={self.mode!r}, output={self.output!r}, "
            f"data_format={self.data_format!r}{backend}"
        )
