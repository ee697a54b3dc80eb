"""Registers an operator with an explicit schema: one name for one direction.

``Library.define`` + ``impl`` + ``register_fake`` costs a third of ``custom_op`` a call and is the form that compiles
and exports on machines without a GPU. The implementation is registered for every device: it chooses its
backend by the tensors that it sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler

# One fragment for the package; it lives as long as the process does.
_LIBRARY = torch.library.Library("sora_kernels", "FRAGMENT")

# What an argument of an ordinary eager call may be. Any other type is a tensor subclass, which the dispatcher unwraps.
_PLAIN = frozenset(
    (torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple)
)


def register(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines ``sora_kernels::<name>`` and returns the function that calls it.

    Boxing some twenty arguments for the dispatcher costs more than the rest of a small call, and an ordinary eager call
    needs nothing of it: it goes straight to ``impl``. Under compile, export, tracing, a dispatch mode (FLOP counting,
    selective checkpointing), the profiler or with tensor subclasses it goes through the registered overload.

    Args:
        schema: ``"name(Tensor x, ..., str backend) -> Tensor"``.
        impl: runs the call on any device.
        fake: the outputs' shapes, dtypes and strides, from the inputs' alone.
    """
    name = schema.partition("(")[0]

    @functools.wraps(impl)
    def below_autograd(*args: Any) -> Any:
        # A raw call (an exported program's, say) may come with grad mode on: nothing in here is to be recorded.
        if torch.is_grad_enabled():
            with torch.no_grad():
                return impl(*args)
        return impl(*args)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, below_autograd, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sora_kernels::{name}", fake, lib=_LIBRARY)
    overload = getattr(torch.ops.sora_kernels, name).default
    tensor_lists = [
        i for i, a in enumerate(overload._schema.arguments) if str(a.type) == "List[Tensor]"
    ]

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or profiler._is_profiler_enabled
            or torch._C._get_tracing_state() is not None
            or not _PLAIN.issuperset(map(type, args))
            or not all(_PLAIN.issuperset(map(type, args[i])) for i in tensor_lists)
        ):
            return overload(*args)
        return below_autograd(*args)

    return call
