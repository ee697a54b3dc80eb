"""Torch's own LSTM: cuDNN on CUDA, oneDNN on the CPU, and ATen's loop over steps where neither
takes the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

# Two overloads: (x, hx, weights, ..., batch_first), and for packed data (data, batch_sizes, hx,
# weights, ...).
vf_lstm: Any = torch._VF.lstm


def lstm(
    x: Tensor, hx: tuple[Tensor, Tensor], weights: Sequence[Tensor], bias: bool, num_layers: int,
    dropout: float, training: bool, bidirectional: bool, lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [T, B, I] -> y [T, B, D*P], h_n, c_n. Ragged rows are sorted and packed: ``lengths`` comes
    to the host.
    """
    if lengths is None:
        return vf_lstm(x, hx, weights, bias, num_layers, dropout, training, bidirectional, False)
    host = lengths.to("cpu", torch.int64)
    # Packing refuses an empty row: it runs one step and is then put back.
    packed = pack_padded_sequence(x, host.clamp(min=1), enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None and back is not None
    hx_sorted = (hx[0].index_select(1, order), hx[1].index_select(1, order))
    data, h_n, c_n = vf_lstm(
        packed.data, packed.batch_sizes, hx_sorted, weights, bias, num_layers, dropout, training,
        bidirectional
    )  # fmt: skip
    y, _ = pad_packed_sequence(
        PackedSequence(data, packed.batch_sizes, order, back), total_length=x.shape[0]
    )
    h_n, c_n = h_n.index_select(1, back), c_n.index_select(1, back)
    if bool((host == 0).any()):
        live = (lengths > 0).to(x.device)[:, None]
        y = torch.where(live, y, 0)
        h_n, c_n = torch.where(live, h_n, hx[0]), torch.where(live, c_n, hx[1])
    return y, h_n, c_n
