"""The op in plain torch operations, for formats that know no custom ones (ONNX), maps of fixed size::

program = torch.export.export(model, (x,)).run_decompositions(DECOMPOSITIONS)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .options import Options


def decompose(
    qkv: Tensor, bias_table: Tensor | None, pad_kv: Tensor | None, seed: Tensor | None, *arguments: Any
) -> Tensor:  # fmt: skip
    """As ``torch.ops.sora_kernels.window_attention3d``: the definition, traced."""
    return reference.window_attention3d(
        qkv, bias_table, pad_kv, seed, Options.of_schema(*arguments[:-1])
    )


DECOMPOSITIONS = {torch.ops.sora_kernels.window_attention3d.default: decompose}
