"""Every ``SORA_*`` variable that is read at run time, in one place.

==================  ============================================================================
``SORA_BACKEND``    ``"native"`` or ``"lstm=native,conv3d_bn_act=hybrid"``: the backend that an
                    operator takes where the call names none. A bare name binds only the operators
                    that have such a backend; a named operator must have it.
==================  ============================================================================

``SORA_BUILD`` and ``SORA_CUDA_ARCHS`` belong to the build and are read by ``setup.py``. ``SORA_CPU_ISA``
(generic, avx2 or avx512: an upper limit for the CPU kernels) is read by the extension.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection


@functools.lru_cache(maxsize=64)
def _parse(value: str) -> tuple[str, dict[str, str]]:
    bare, bound = "", {}
    for item in filter(None, (part.strip() for part in value.split(","))):
        operator, equals, backend = (part.strip() for part in item.partition("="))
        if not equals:
            bare = operator
        elif operator and backend:
            bound[operator] = backend
        else:
            raise ValueError(
                f"SORA_BACKEND: expected 'backend' or 'operator=backend' items, got {item!r}"
            )
    return bare, bound


def backend_variable() -> str | None:
    return os.environ.get("SORA_BACKEND")


if os.name == "posix" and isinstance(getattr(os.environ, "_data", None), dict):
    # os.environ encodes and decodes on every look, half a microsecond of every call of every operator.
    def backend_variable() -> str | None:
        value = os.environ._data.get(b"SORA_BACKEND")  # type: ignore[attr-defined]
        return None if value is None else os.fsdecode(value)


def requested_backend(operator: str, available: Collection[str]) -> str:
    """The backend that ``SORA_BACKEND`` asks for, or ``""``."""
    value = backend_variable()
    if not value:
        return ""
    bare, bound = _parse(value)
    if operator in bound:
        if bound[operator] not in available:
            raise ValueError(
                f"SORA_BACKEND: {operator} has the backends {', '.join(available)}; "
                f"got {bound[operator]!r}"
            )
        return bound[operator]
    return bare if bare in available else ""
