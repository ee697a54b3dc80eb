"""The bias of window attention: from the table to what the kernels read, and its gradient back."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import HIDDEN


@triton.jit
def _window_attention_bias_kernel(
    table_ptr,  # [rows, heads]
    place_ptr,  # int32 [NP]
    bias_ptr,  # [heads, tiles, tiles, ROWS * COLUMNS]
    heads, N, middle,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS_FIRST: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the dense bias in units of SCALE, in the order of :func:`kernels._fragments`; rows are
    queries, or keys if KEYS_FIRST. Keys past N are hidden.
    """
    pid = tl.program_id(0)
    tiles_r, tiles_c = tl.cdiv(N, ROWS), tl.cdiv(N, COLUMNS)
    head, tile = pid // (tiles_r * tiles_c), pid % (tiles_r * tiles_c)
    offs = tl.arange(0, ROWS * COLUMNS)
    block = offs // 128
    r = block % (ROWS // 16) * 16 + offs // 2 % 2 * 8 + offs // 16 % 8
    c = block // (ROWS // 16) * 8 + offs // 4 % 4 * 2 + offs % 2
    r += tile // tiles_c * ROWS
    c += tile % tiles_c * COLUMNS
    query, key = (c, r) if KEYS_FIRST else (r, c)
    row = tl.load(place_ptr + query) - tl.load(place_ptr + key) + middle
    bias = tl.load(table_ptr + row.to(tl.int64) * heads + head)
    bias = tl.where(key < N, bias.to(bias_ptr.dtype.element_ty) / SCALE, HIDDEN)
    tl.store(bias_ptr + pid.to(tl.int64) * (ROWS * COLUMNS) + offs, bias)


@triton.jit
def _window_attention_table_kernel(
    table_ptr,  # [rows, heads]
    turned_ptr,  # [heads, rows]
    heads, rows,
    BLOCK: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The table as the kernels gather from it, in units of SCALE."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    mask = offs < rows
    value = tl.load(table_ptr + offs.to(tl.int64) * heads + head, mask=mask, other=0.0)
    value = value.to(turned_ptr.dtype.element_ty) / SCALE
    tl.store(turned_ptr + head.to(tl.int64) * rows + offs, value, mask=mask)


@triton.jit
def _window_attention_dtable_kernel(
    part_ptr,  # [splits, heads, NP, NP]
    place_ptr,  # int32 [NP]
    slot_ptr,  # int32 [codes]: the slot with a code, or -1
    dtable_ptr,  # [rows, heads]
    heads, N, NP, splits, rows, middle, codes,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows of the table for a head. Row e is the sum of dS[i, j] over query slots i, where j is
    the slot with code place[i] + middle - e; neighbours in e are neighbours in j.
    """
    head = tl.program_id(1)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK_R, BLOCK_T], ACC)
    for start in range(0, splits * N, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        split, query = offs_r // N, offs_r % N
        code = (tl.load(place_ptr + query) + middle)[:, None] - offs_t[None, :]
        mask = (split < splits)[:, None] & (offs_t < rows)[None, :] & (code >= 0) & (code < codes)
        key = tl.load(slot_ptr + code, mask=mask, other=-1)
        row = ((split.to(tl.int64) * heads + head) * NP + query) * NP
        acc += tl.load(part_ptr + row[:, None] + key, mask=key >= 0, other=0.0)
    dtable = tl.sum(acc, 0).to(dtable_ptr.dtype.element_ty)
    tl.store(dtable_ptr + offs_t.to(tl.int64) * heads + head, dtable, mask=offs_t < rows)
