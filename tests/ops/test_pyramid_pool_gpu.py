"""``pyramid_pool3d`` on a CUDA device, kernels as compiled: ``pytest -m gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sora_kernels as sk
from sora_kernels.testing import assert_within_2x

pytestmark = [pytest.mark.gpu, pytest.mark.triton]

SHAPES = {
    "one launch": ((2, 70, 8, 14, 14), (1, 2, 4, 8)),
    "overlapping": ((2, 33, 5, 9, 11), (1, (2, 3, 2), (3, 6, 5))),
    "large": ((1, 24, 16, 56, 56), (1, 2, 4, 8)),
    "few elements": ((2, 16, 2, 3, 3), (1, 5)),
}
VALID = torch.tensor([[4, 9, 2], [2, 1, 30]])


def by_aten(x: Tensor, levels: Any, mode: str) -> Tensor:
    pools = {"max": F.adaptive_max_pool3d, "avg": F.adaptive_avg_pool3d}
    kinds = ("max", "avg") if mode == "maxavg" else (mode,)
    return torch.cat([pools[k](x, level).flatten(1) for level in levels for k in kinds], 1)


def run(x: Tensor, call: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = call(leaf)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator).to(y)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("mode", ["max", "avg", "maxavg"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SHAPES)
def test_as_atens_pools(name, dtype, mode, layout):
    shape, levels = SHAPES[name]
    x = torch.randn(shape, device="cuda").to(dtype)
    last = layout == "NDHWC"
    own = x.movedim(1, -1).contiguous() if last else x
    options: dict[str, Any] = {"mode": mode, "data_format": layout, "backend": "triton"}
    y, dx = run(own, lambda t: sk.pyramid_pool3d(t, levels, **options))
    again, dx_again = run(own, lambda t: sk.pyramid_pool3d(t, levels, **options))
    assert torch.equal(y, again) and torch.equal(dx, dx_again)
    plain, truth = (run(t, lambda t: by_aten(t, levels, mode)) for t in (x, x.double()))
    if mode == "max":
        assert torch.equal(y, plain[0])
    assert_within_2x(y, plain[0], truth[0], name="y")
    assert_within_2x(dx.movedim(-1, 1) if last else dx, plain[1], truth[1], name="dx")


@pytest.mark.parametrize("mode", ["max", "avg", "maxavg"])
def test_valid_sizes_are_read_on_the_device(mode):
    x = torch.randn(2, 20, 4, 9, 8, device="cuda", dtype=torch.float64)
    levels = (2, (1, 3, 2))
    valid = VALID.to("cuda")
    dy = torch.randn(2, 20 * 14 * (1 + (mode == "maxavg")), device="cuda", dtype=torch.float64)

    def pooled(backend: str) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        y = sk.pyramid_pool3d(leaf, levels, mode=mode, valid_size=valid, backend=backend)
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]

    pooled("triton")  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, dx = pooled("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want, dx_want = pooled("reference")
    assert_within_2x(y, want, want, name="y")
    assert_within_2x(dx, dx_want, dx_want, name="dx")


def test_captures_into_a_cuda_graph():
    x = torch.randn(2, 32, 4, 14, 14, device="cuda", dtype=torch.bfloat16)
    call = lambda: sk.pyramid_pool3d(x, (1, 2, 4), mode="maxavg", backend="triton")  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    x.normal_()
    graph.replay()
    assert torch.equal(y, call())


def test_deterministic_mode_where_torch_has_no_backward():
    """pytorch 50198, 149130 and others: torch's adaptive pools refuse."""
    x = torch.randn(1, 8, 4, 7, 7, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            run(x, lambda t: by_aten(t, (2,), "max"))
        for mode in ("max", "avg", "maxavg"):
            run(x, lambda t: sk.pyramid_pool3d(t, (1, 2), mode=mode))  # noqa: B023
    finally:
        torch.use_deterministic_algorithms(False)
