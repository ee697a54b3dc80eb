"""A WindowPlan as the kernels read it: tensors on a device, slots padded to whole tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .geometry import Ints, WindowPlan
from .options import Options
from .position import Codes

NOBODY = -(1 << 31)  # the token of a slot that takes no part
_FAR = 1 << 30  # the code of such a slot
CLASSES = 32  # most of a window's, for the mask to be a matrix product
LARGE = 2.0**15  # its square hides a key; fp16 holds it


class Kinds(NamedTuple):
    """Who sees whom, on the host. Windows in which slots see each other alike are of one kind.

    Key k is seen by query q if ``0 <= code[q] - code[k] < span``.

    Attributes:
        kind: int64 ``[windows]``.
        code: int64 ``[kinds, tokens]``.
        span: 1 unless causal.
        classes: most different codes of slots in a window.
        mixed: some slot does not see another.
    """

    kind: Ints
    code: Ints
    span: int
    classes: int
    mixed: bool


@functools.lru_cache(maxsize=64)
def kinds(plan: WindowPlan, pads_take_part: bool, causal_t: bool) -> Kinds:
    span, code = 1, plan.region
    if causal_t:
        span = int(plan.frame.max()) + 1
        code = code * (2 * span) + plan.frame - plan.frame.min(1, keepdims=True)
    if not pads_take_part:
        code = np.where(plan.token < 0, _FAR, code)
    rows = np.ascontiguousarray(code, dtype=np.int32)
    whole = rows.view(np.dtype((np.void, rows.strides[0]))).reshape(-1)
    _, first, kind = np.unique(whole, return_index=True, return_inverse=True)
    code = code[first]
    classes = max(len(np.unique(row[row != _FAR])) for row in code)
    mixed = bool((code != code[:, :1]).any())
    return Kinds(kind.reshape(-1), code, span, classes, mixed)


class Slots(NamedTuple):
    """Of windows, their slots padded to ``padded`` by such as take no part.

    Attributes:
        padded: a multiple of every tile.
        token: int32 ``[windows, padded]``; of pad number p, -1 - p; NOBODY for slots that take no part.
        kind: int32 ``[windows]``.
        code: int32 ``[kinds, padded]``, as ``Kinds.code``.
        span: as ``Kinds.span``.
    """

    padded: int
    token: Tensor
    kind: Tensor
    code: Tensor
    span: int


@functools.lru_cache(maxsize=64)
def slots(
    plan: WindowPlan, pads_take_part: bool, causal_t: bool, multiple: int, device: torch.device
) -> Slots:
    found = kinds(plan, pads_take_part, causal_t)
    padded = -(-plan.tokens // multiple) * multiple
    token = plan.token
    if not pads_take_part:
        token = np.where(token < 0, NOBODY, token)
    return Slots(
        padded,
        _tensor(_padded(token, padded, NOBODY), device),
        _tensor(found.kind, device),
        _tensor(_padded(found.code, padded, _FAR), device),
        found.span,
    )


class Pair(NamedTuple):
    """A mask as a matrix product: ``ask @ hide.T`` is 0 where a key is seen, -LARGE ** 2 where it is not.

    Attributes:
        ask: of queries, ``[kinds, padded, classes]``; hide: of keys.
    """

    ask: Tensor
    hide: Tensor


@functools.lru_cache(maxsize=64)
def pair(
    plan: WindowPlan, pads_take_part: bool, causal_t: bool, multiple: int, dtype: torch.dtype, device: torch.device
) -> Pair:  # fmt: skip
    """In the dtype of q and k; ``classes`` is 16 or 32, what a tensor core takes at least."""
    found = kinds(plan, pads_take_part, causal_t)
    width = 16 if found.classes <= 16 else CLASSES
    padded = -(-plan.tokens // multiple) * multiple
    ask = np.zeros((len(found.code), padded, width), np.float32)
    hide = np.full_like(ask, -LARGE)
    for number, code in enumerate(found.code):
        own = np.unique(code[code != _FAR])
        taking = np.flatnonzero(code != _FAR)
        ask[number, taking, np.searchsorted(own, code[taking])] = LARGE
        seen = _seen(own[None, :], code[taking][:, None], found.span)
        hide[number, taking, : len(own)] = np.where(seen, 0, -LARGE)
    with torch.inference_mode(False):
        return Pair(*(torch.as_tensor(x).to(dtype).to(device) for x in (ask, hide)))


@functools.lru_cache(maxsize=64)
def visible_tiles(
    plan: WindowPlan, pads_take_part: bool, causal_t: bool, block_m: int, block_n: int
) -> np.ndarray:
    """bool ``[kinds, query tiles, key tiles]``: whether some query of the tile sees some key."""
    found = kinds(plan, pads_take_part, causal_t)
    tiles = [-(-plan.tokens // block) for block in (block_m, block_n)]
    visible = np.zeros((len(found.code), *tiles), bool)
    for number, code in enumerate(found.code):
        own = np.unique(code[code != _FAR])
        seen = _seen(own[:, None], own[None, :], found.span).astype(np.int64)
        held = []
        for count, block in zip(tiles, (block_m, block_n), strict=True):
            slots = _padded(code[None], count * block, _FAR).reshape(count, block, 1)
            held.append((slots == own).any(1).astype(np.int64))
        visible[number] = held[0] @ seen @ held[1].T > 0
    return visible


@functools.lru_cache(maxsize=64)
def bounds(
    plan: WindowPlan, pads_take_part: bool, causal_t: bool, block_m: int, block_n: int, of_keys: bool,
    device: torch.device,
) -> Tensor | None:  # fmt: skip
    """int32 ``[kinds, query tiles, 2]``: the first key tile with anything visible and the end of the last. Of the query
    tiles for every key tile if ``of_keys``. None where there is nothing to skip.
    """
    visible = visible_tiles(plan, pads_take_part, causal_t, block_m, block_n)
    if of_keys:
        visible = visible.transpose(0, 2, 1)
    count = visible.shape[2]
    some = visible.any(2)
    first = np.where(some, visible.argmax(2), 0)
    end = np.where(some, count - visible[:, :, ::-1].argmax(2), 0)
    if not first.any() and (end == count).all():
        return None
    return _tensor(np.stack((first, end), 2), device)


class Places(NamedTuple):
    """Relative positions: ``code[i] - code[j] + middle`` is the table's row.

    Attributes:
        code: int32 ``[padded]``.
        slot: int32 ``[codes]``: which slot has a code; -1 for none.
    """

    code: Tensor
    slot: Tensor
    middle: int
    rows: int


@functools.lru_cache(maxsize=64)
def places(options: Options, plan: WindowPlan, multiple: int, device: torch.device) -> Places:
    codes: Codes = options.codes(plan.window)
    padded = -(-plan.tokens // multiple) * multiple
    slot = np.full(int(codes.code.max()) + 1, -1)
    slot[codes.code] = np.arange(plan.tokens)
    code = _padded(codes.code[None], padded, 0)[0]
    return Places(_tensor(code, device), _tensor(slot, device), codes.middle, codes.rows)


def _seen(query: Ints, key: Ints, span: int) -> np.ndarray:
    return (query - key >= 0) & (query - key < span)


def _padded(rows: np.ndarray, count: int, value: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, count - rows.shape[1])), constant_values=value)


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives this call
        return torch.as_tensor(np.ascontiguousarray(values, dtype=np.int32)).to(device)
