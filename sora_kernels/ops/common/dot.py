"""``dot()``: the one ``tl.dot`` of the library, right on tensor cores and in the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = "tf32"):
    """``acc + a @ b`` in acc's dtype (fp32, or fp64 for gradcheck).

    Operands keep their storage dtype on a GPU: an upcast would turn bf16 wgmma into tf32. The interpreter
    computes raw bf16 as garbage, so there, and only there, they are upcast. PRECISION is tl.dot's
    ``input_precision`` for fp32 operands.
    """
    if INTERPRETING:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
