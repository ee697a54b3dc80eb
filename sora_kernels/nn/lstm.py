"""``LSTM``: ``torch.nn.LSTM`` through :func:`sora_kernels.lstm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._recurrent import Recurrent


class LSTM(Recurrent):
    """Drop-in ``torch.nn.LSTM``: its constructor, attributes, parameters, state dict,
    initialisation, errors and repr.

    Beyond it: ``torch.compile(fullgraph=True)`` without a recompilation for another T or B,
    ``torch.func`` (ensembles by vmap, per-sample gradients, jvp), double backward, backward in
    ``eval()`` on every device, ragged and resetting rows without packing, every cell state.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as ``torch.nn.LSTM``.
        backend, memory: as :func:`sora_kernels.lstm`; not part of the state dict.
        int8: keep a copy of each ``w_hh`` as int8 numbers with a scale a gate row, and use it where no
            gradient is wanted, on the CPU, in fp32 or bf16, for few rows and many units: B <= 8 and
            hidden_size >= max(192, 64 B). y is then off by about 1e-3 of its size. Parameters and
            state dict stay as they are; torch.compile and torch.func use them.

    Shape:
        input ``[T, B, I]``, ``[B, T, I]`` if ``batch_first``, ``[T, I]`` unbatched, or a
        ``PackedSequence``; hx ``(h_0, c_0)`` or None -> ``(output, (h_n, c_n))``, as
        ``torch.nn.LSTM``. A PackedSequence whose batch is not that of hx is an error, where torch
        may run with hx's first rows.

        lengths, reset, return_cells (``forward``, by keyword): as :func:`sora_kernels.lstm`, for
        input that is not packed; with ``return_cells`` also the last layer's cell states, shaped
        (packed) as output, of width D*H.

    A graph of ``torch.compile(fullgraph=True)`` takes a PackedSequence made with
    ``enforce_sorted=False``, or with hx.

    Example:
        >>> lstm = sora_kernels.nn.LSTM(128, 256, num_layers=2, batch_first=True)
        >>> output, (h_n, c_n) = lstm(torch.randn(8, 30, 128))
    """

    torch_class = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        memory: str = "save",
        int8: bool = False,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype, backend=backend, memory=memory, int8=int8,
        )  # fmt: skip

    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def forward(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
    ) -> Any:
        return self._run(input, hx, lengths, reset, return_cells)
