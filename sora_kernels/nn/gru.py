"""``GRU``: ``torch.nn.GRU`` through :func:`sora_kernels.gru`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._recurrent import Recurrent, refuse_projection


class GRU(Recurrent):
    """Drop-in ``torch.nn.GRU``: its constructor, attributes, parameters, state dict,
    initialisation, errors and repr.

    Beyond it: all that :class:`sora_kernels.nn.LSTM` adds, but for the cell states.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as ``torch.nn.GRU``.
        backend, memory: as :func:`sora_kernels.gru`; not part of the state dict.
        int8: keep a copy of each ``w_hh`` as int8 numbers with a scale a gate row, and use it where no
            gradient is wanted, on the CPU, in fp32 or bf16, for few rows and many units: B <= 8 and
            hidden_size >= max(192, 64 B). y is then off by about 1e-3 of its size. Parameters and
            state dict stay as they are; torch.compile and torch.func use them.

    Shape:
        input ``[T, B, I]``, ``[B, T, I]`` if ``batch_first``, ``[T, I]`` unbatched, or a
        ``PackedSequence``; hx ``h_0`` or None -> ``(output, h_n)``, as ``torch.nn.GRU``. lengths
        and reset (``forward``, by keyword): as :func:`sora_kernels.gru`, for input that is not
        packed.

    Example:
        >>> gru = sora_kernels.nn.GRU(128, 256, bidirectional=True)
        >>> output, h_n = gru(torch.randn(30, 8, 128), lengths=torch.tensor([30, 7, 12, 9, 3, 30, 1, 2]))
    """

    torch_class = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        memory: str = "save",
        int8: bool = False,
        proj_size: None = None,
    ) -> None:
        refuse_projection(proj_size)
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            0, device, dtype, backend=backend, memory=memory, int8=int8,
        )  # fmt: skip

    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> Any:
        return self._run(input, hx, lengths, reset)
