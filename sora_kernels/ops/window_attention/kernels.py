"""What the kernels of window attention share. Sizes in shape comments: W windows of N slots, padded to NP; B samples of
L tokens; D = head_dim; kinds of windows, see slots.py.

Scores are kept as the products come, in units of 1 / scale, and with them the bias: it is where the sums start, and
costs no instruction of its own. The scale is a factor in the argument of exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.dot import INTERPRETING
from .slots import NOBODY as _NOBODY

NOBODY = tl.constexpr(_NOBODY)
HIDDEN = tl.constexpr(-1e9)  # a score that does not count
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNSEEN = tl.constexpr(1e30)  # the log-sum-exp of a query that is none: all its weights are zero


@triton.jit
def _share(pairs, tiles, heads, WINDOWS_INNER: tl.constexpr):
    """Which tile of which head of which window of the batch is this program's."""
    pid = tl.program_id(0)
    if WINDOWS_INNER:  # neighbours in time read the same bias
        return pid // pairs % tiles, pid // pairs // tiles, pid % pairs
    else:  # the same keys
        return pid % tiles, pid // tiles % heads, pid // tiles // heads


@triton.jit
def _load_rows(
    ptr, pad_ptr, token, stride, offs_d, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PADS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Rows ``[slots, BLOCK_D]`` of tokens; of pads, if PADS, the row at ``pad_ptr``; zeros for the others. INDEX holds
    an offset within a sample.
    """
    row_ptr = ptr + token.to(INDEX) * stride
    mask = (token >= 0)[:, None]
    if PADS:
        row_ptr = tl.where(token >= 0, row_ptr, pad_ptr + tl.zeros_like(token))
        mask = (token > NOBODY)[:, None]
    if DIM < BLOCK_D:
        mask = mask & (offs_d < DIM)[None, :]
    return tl.load(row_ptr[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(
    ptr, values, token, stride, offs_d, DIM: tl.constexpr, BLOCK_D: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    mask = (token >= 0)[:, None]
    if DIM < BLOCK_D:
        mask = mask & (offs_d < DIM)[None, :]
    row_ptr = ptr + token.to(INDEX) * stride
    tl.store(row_ptr[:, None] + offs_d[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _operand(x, like):
    """x in the dtype of the matrix that it is multiplied with. The interpreter would cut its digits off, not round."""
    if INTERPRETING:
        return x
    else:
        return x.to(like.dtype)


@triton.jit
def _load_pair(ptr, kind, offs, NP, CLASSES: tl.constexpr):
    """A side of a mask ``[slots, CLASSES]``, see slots.Pair."""
    rows = (kind * NP + offs) * CLASSES
    return tl.load(ptr + rows[:, None] + tl.arange(0, CLASSES)[None, :])


@triton.jit
def _fragments(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``[ROWS * COLUMNS]`` -> ``[ROWS, COLUMNS]``, in the order in which the threads of a Hopper matrix product hold
    it, so that a tile stored so is loaded in whole vectors into the registers where it is wanted.
    """
    x = x.reshape(COLUMNS // 8, ROWS // 16, 8, 4, 2, 2)
    return x.permute(1, 4, 2, 0, 3, 5).reshape(ROWS, COLUMNS)


@triton.jit
def _bias_tile(bias_ptr, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of the dense bias, as ``_window_attention_bias_kernel`` stores it."""
    ptr = bias_ptr + tile.to(tl.int64) * (ROWS * COLUMNS)
    return _fragments(tl.load(ptr + tl.arange(0, ROWS * COLUMNS)), ROWS, COLUMNS)


@triton.jit
def _seen(code_q, code_k, span, CAUSAL: tl.constexpr):
    if CAUSAL:
        return (code_q - code_k).to(tl.uint32, bitcast=True) < span.to(tl.uint32)
    else:
        return code_q == code_k


@triton.jit
def _kept(seed, row, key, THRESHOLD: tl.constexpr, KEPT: tl.constexpr, ACC: tl.constexpr):
    """Factors of attention weights under dropout, as reference.kept.

    Args:
        row: int64, the query's number in the batch times the heads, plus the head. key: int32, the key's slot.
    """
    if THRESHOLD > 0xFFFFFFFF:
        return (row + key).to(ACC) * 0.0
    else:
        low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
        key = key.to(tl.uint32)
        word, _, _, _ = tl.philox(seed, key, low, high, tl.zeros_like(key))
        return (word >= THRESHOLD).to(ACC) * KEPT
