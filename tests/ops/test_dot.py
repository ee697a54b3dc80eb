"""ops/common/dot.py through a small matrix product: every operand dtype, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from sora_kernels.testing import assert_within_2x

triton = pytest.importorskip("triton", exc_type=ImportError)
tl = pytest.importorskip("triton.language", exc_type=ImportError)

from sora_kernels.ops.common.dot import dot  # noqa: E402

pytestmark = pytest.mark.triton


@triton.jit
def _matmul(a_ptr, b_ptr, c_ptr, K, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    offs, offs_k = tl.arange(0, SIZE), tl.arange(0, BLOCK)
    acc = tl.zeros((SIZE, SIZE), dtype=ACC)
    for first in range(0, K, BLOCK):
        mask = first + offs_k < K
        a = tl.load(
            a_ptr + offs[:, None] * K + first + offs_k[None, :], mask=mask[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + (first + offs_k[:, None]) * SIZE + offs[None, :], mask=mask[:, None], other=0.0
        )
        acc = dot(a, b, acc)
    tl.store(c_ptr + offs[:, None] * SIZE + offs[None, :], acc)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_dot_is_right_in_every_dtype(dtype):
    a, b = torch.randn(16, 40, dtype=dtype), torch.randn(40, 16, dtype=dtype)
    out = torch.empty(16, 16, dtype=dtype)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    _matmul[(1,)](a, b, out, 40, SIZE=16, BLOCK=16, ACC=acc)
    assert_within_2x(out, a @ b, a.double() @ b.double())
