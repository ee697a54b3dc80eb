"""Torch's own recurrent layers: cuDNN on CUDA, oneDNN for LSTM on the CPU, and ATen's loop over
steps where neither takes the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .arguments import Sizes
from .cells import GRU, LSTM, RNN_RELU, RNN_TANH, Cell
from .reference import Result

# Two overloads each: (x, hx, weights, ..., batch_first), and for packed data (data, batch_sizes, hx,
# weights, ...).
_LAYERS: dict[str, Any] = {
    LSTM.name: torch._VF.lstm,
    GRU.name: torch._VF.gru,
    RNN_TANH.name: torch._VF.rnn_tanh,
    RNN_RELU.name: torch._VF.rnn_relu,
}


def layers(
    cell: Cell, x: Tensor, hx: tuple[Tensor, ...], weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, bias: bool, num_layers: int = 1,
    dropout: float = 0.0, training: bool = False, bidirectional: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x [T, B, I], or [N, I] with ``batch_sizes`` -> y and the last states. Ragged rows are sorted
    and packed: ``lengths`` come to the host.
    """
    run, given = _LAYERS[cell.name], hx if cell.has_c else hx[0]
    options = (bias, num_layers, dropout, training, bidirectional)
    if batch_sizes is not None:
        return run(x, batch_sizes, given, weights, *options)
    if lengths is None or x.shape[1] == 0:
        return run(x, given, weights, *options, False)
    host = lengths.to("cpu", torch.int64)
    live = None
    if bool((host <= 0).any()):
        # Packing refuses an empty row: it runs one step, on zeros, and is then put back.
        live = (lengths > 0).to(x.device)[:, None]
        x = torch.where(live, x, 0)
    packed = pack_padded_sequence(x, host.clamp(1, x.shape[0]), enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None and back is not None
    ordered = tuple(state.index_select(1, order) for state in hx)
    data, *states = run(
        packed.data, packed.batch_sizes, ordered if cell.has_c else ordered[0], weights, *options
    )
    y, _ = pad_packed_sequence(
        PackedSequence(data, packed.batch_sizes, order, back), total_length=x.shape[0]
    )
    states = [state.index_select(1, back) for state in states]
    if live is not None:
        y = torch.where(live, y, 0)
        states = [torch.where(live, s, first) for s, first in zip(states, hx, strict=True)]
    return (y, *states)


def forward(
    cell: Cell, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, bias: bool,
    tapes: bool,
) -> Result:  # fmt: skip
    """One layer, as ``reference.layer`` without resets and tapes."""
    assert reset is None and not tapes
    sizes = Sizes.of_layer(cell, weights, bias)
    if h0 is None or (cell.has_c and c0 is None):
        zeros = sizes.zeros(cell, x, x.shape[1] if h0 is None else h0.shape[1])
        h0 = zeros[0] if h0 is None else h0
        c0 = zeros[1] if cell.has_c and c0 is None else c0
    hx = (h0,) if c0 is None else (h0, c0)
    found = layers(
        cell, x, hx, weights, batch_sizes, lengths, bias, bidirectional=sizes.directions == 2
    )
    y, h_n, *c_n = (t.contiguous() for t in found)
    return Result(y, h_n, c_n[0] if c_n else None, None, None)


def backward(
    cell: Cell, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dcells: Tensor | None,
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None, y: Tensor,
    cells: Tensor | None, gates: Tensor | None, bias: bool, needs: Sequence[bool],
) -> tuple[Any, ...]:  # fmt: skip
    """Runs the layer again, then autograd: torch keeps its tapes to itself."""
    assert dcells is None and gates is None
    count = 3 if cell.has_c else 2
    given = [x, h0, c0, *weights] if cell.has_c else [x, h0, *weights]
    with torch.enable_grad():
        leaves: list[Any] = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(given, needs, strict=True)
        ]
        x, h0, c0 = (*leaves[:count], None)[:3]
        result = forward(cell, x, h0, c0, leaves[count:], batch_sizes, lengths, reset, bias, False)
    grads = zip(result[:3], (dy, dh_n, dc_n), strict=True)
    pairs = [(out, g) for out, g in grads if out is not None and g is not None]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            [t for t, need in zip(leaves, needs, strict=True) if need],
            [g for _, g in pairs],
            materialize_grads=True,
        )
    )
    every = [next(found) if need else None for need in needs]
    return every[0], every[1], every[2] if cell.has_c else None, every[count:]
