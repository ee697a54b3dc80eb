"""What tells the recurrent cells apart; everything else in this folder is written once for all."""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """One kind of recurrent cell.

    Attributes:
        name: as in the registered ops' names, and torch's ``mode`` in lower case.
        code: enum Cell of csrc/lstm/lstm.h.
        gates: w_ih and w_hh have ``gates * H`` rows.
        has_c: whether there is a cell state beside h.
        tape: columns of the gates that backward needs, in units of H. LSTM: i, f, g, o after
            activation. GRU: r, z, n after activation, then ``w_hn h + b_hn``. RNN: none, y is enough.
    """

    name: str
    code: int
    gates: int
    has_c: bool
    tape: int


LSTM = Cell("lstm", 0, 4, True, 4)
GRU = Cell("gru", 1, 3, False, 4)
RNN_TANH = Cell("rnn_tanh", 2, 1, False, 0)
RNN_RELU = Cell("rnn_relu", 3, 1, False, 0)

CELLS = {cell.name: cell for cell in (LSTM, GRU, RNN_TANH, RNN_RELU)}
