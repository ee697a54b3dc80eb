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
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling, is_exporting

# One fragment for the package; it lives as long as the process does.
_LIBRARY = torch.library.Library("sora_kernels", "FRAGMENT")

# What an argument of an ordinary eager call may be. Any other type is a tensor subclass, which the dispatcher unwraps.
_PLAIN = frozenset(
    (torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple)
)


def goes_straight(*args: Any) -> bool:
    """Whether a call with these arguments needs nothing of the dispatcher: no compile, export, tracing, dispatch mode,
    profiler or tensor subclass.
    """
    # Under non-strict export and AOTAutograd a dispatch mode is on: Dynamo alone has to be asked for.
    return (
        not is_dynamo_compiling()
        and not _len_torch_dispatch_stack()
        and not profiler._is_profiler_enabled
        and _get_tracing_state() is None
        and _PLAIN.issuperset(map(type, args))
    )


def has_memory(*args: Any) -> bool:
    """Whether these arguments are what they seem, so that a kernel may be given their addresses."""
    return (
        not _len_torch_dispatch_stack()
        and _get_tracing_state() is None
        and _PLAIN.issuperset(map(type, args))
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
    kinds = [str(a.type) for a in overload._schema.arguments]
    tensor_list = kinds.index("List[Tensor]") if "List[Tensor]" in kinds else None

    def call(*args: Any) -> Any:
        if not goes_straight(*args) or (
            tensor_list is not None and not _PLAIN.issuperset(map(type, args[tensor_list]))
        ):
            return overload(*args)
        return below_autograd(*args) if torch.is_grad_enabled() else impl(*args)

    return call


def differentiate(name: str, call: Callable[..., Any]) -> None:
    """Gives the op itself its gradients, for graphs that hold it: exported and traced ones are trained too.

    Args:
        call: takes the op's arguments, and goes through the operator's ``autograd.Function``.
    """
    overload = getattr(torch.ops.sora_kernels, name).default

    def autograd(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and not is_exporting() and any(map(_requires_grad, args)):
            return call(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def _requires_grad(argument: Any) -> bool:
    if isinstance(argument, torch.Tensor):
        return argument.requires_grad
    return isinstance(argument, (list, tuple)) and any(map(_requires_grad, argument))
