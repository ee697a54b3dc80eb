"""The Triton passes of conv3d_bn_act themselves: order, tiles, offsets, precision. In the interpreter."""

from __future__ import annotations

import pytest
import torch

from sora_kernels.testing import assert_close, poisoned, shuffled_programs, tolerance

triton = pytest.importorskip("triton", exc_type=ImportError)
tl = pytest.importorskip("triton.language", exc_type=ImportError)

from sora_kernels.ops.conv3d_bn_act import passes  # noqa: E402
from sora_kernels.ops.conv3d_bn_act.passes_kernels import _tile  # noqa: E402

pytestmark = pytest.mark.triton


def test_several_partials_merge_exactly_with_ragged_tiles():
    """More tiles than are merged at once, in the layout whose tiles are smallest."""
    y = torch.randn(1, 1, 3, 150, 160).contiguous(memory_format=torch.channels_last_3d)
    plan = passes.plan_for(y, "_bn_stats_kernel")
    assert plan.tiles > passes.MERGED_TILES
    mean, invstd = passes.launch_stats(y, None, None, None, 0.1, 0.0)
    true = y.double()
    assert_close(mean, true.mean().view(1), "composition_fp32", name="mean")
    assert_close(invstd, true.var(correction=0).rsqrt().view(1), "composition_fp32", name="invstd")


@pytest.mark.parametrize("channels_last", [False, True])
def test_variance_survives_a_large_mean(channels_last):
    y = torch.randn(4, 3, 2, 33, 31) + 1000.0
    if channels_last:
        y = y.contiguous(memory_format=torch.channels_last_3d)
    _, invstd = passes.launch_stats(y, None, None, None, 0.1, 0.0)
    true = y.double().var(dim=(0, 2, 3, 4), correction=0)
    relative = (invstd.double().pow(-2) / true - 1).abs().max().item()
    assert relative < tolerance("variance_relative")


def every_pass(y, dz, residual, weight, bias):
    """Every kernel once: statistics, forward, reduce, apply."""
    mean, invstd = passes.launch_stats(y, None, None, None, 0.1, 1e-5)
    options = dict(activation="relu", negative_slope=0.0)
    z = passes.launch_fwd(
        y, residual, mean, invstd, weight, bias, eps=0.0, invstd_is_var=False, **options
    )
    grads = passes.launch_bwd(
        dz, y, z, mean, invstd, weight, bias, mask="output", batch_stats=True, needs_dy=True,
        needs_dresidual=True, needs_parameters=True, **options,
    )  # fmt: skip
    return (mean, invstd, z, *grads)


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_element_is_written_in_any_program_order(checked_overflow, channels_last):
    shape = (2, 18, 3, 25, 31) if channels_last else (2, 3, 3, 25, 31)
    y, dz, residual = (torch.randn(shape) for _ in range(3))
    if channels_last:
        y, dz, residual = (
            t.contiguous(memory_format=torch.channels_last_3d) for t in (y, dz, residual)
        )
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    first = every_pass(y, dz, residual, weight, bias)
    for seed in range(2):
        with poisoned(), shuffled_programs(seed):
            again = every_pass(y, dz, residual, weight, bias)
        for name, a, b in zip(
            ("mean", "invstd", "z", "dy", "dresidual", "dweight", "dbias"),
            first,
            again,
            strict=True,
        ):
            assert not torch.isnan(b).any(), f"{name}: an element was not written"
            assert torch.equal(a, b), f"{name}: not bitwise repeatable"


@triton.jit
def _store_base(out_ptr, length, tiles, segment, row, channel, C):
    base, left, m, offs, channels, mask = _tile(length, tiles, segment, row, channel, C, 64, 16, 4)
    tl.store(out_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), base)


def test_offsets_are_64_bit():
    """A tile's base passes 2^31 elements: computed by the kernels' own helper, stored, compared."""
    out = torch.empty(3, 2, dtype=torch.int64)
    _store_base[(3, 2)](out, 70, 2, 2**33, 2**30, 2**29, 8)
    tiles = ((0, 0), (0, 1), (1, 0))  # (segment, tile within it)
    want = [[s * 2**33 + r * 64 * 2**30 + c * 4 * 2**29 for c in (0, 1)] for s, r in tiles]
    assert out.tolist() == want


def test_a_sweep_of_sizes_takes_few_compilations():
    """Sizes are run-time arguments: only layout, dtype and the block of channels make a specialisation."""
    constants = set()
    for n in (1, 2, 8):
        for channels in (45, 64, 230, 921):
            for size in ((4, 7, 7), (16, 56, 56)):
                for channels_last in (False, True):
                    y = torch.empty(n, channels, *size, device="meta")
                    if channels_last:
                        y = y.to(memory_format=torch.channels_last_3d)
                    constants.add(str(passes.plan_for(y, "_bn_act_fwd_kernel").tile))
    assert len(constants) == 2


def test_launchers_look_again_before_taking_pointers():
    y = torch.randn(1, 2, 2, 2, 2)
    with pytest.raises(ValueError, match="y: expected a dense"):
        passes.launch_stats(y[..., ::2], None, None, None, 0.1, 1e-5)
    with pytest.raises(ValueError, match=r"running_mean: expected \(2,\)"):
        passes.launch_stats(y, None, torch.zeros(3), torch.zeros(2), 0.1, 1e-5)
    with pytest.raises(ValueError, match="residual: expected"):
        other = y.contiguous(memory_format=torch.channels_last_3d)
        options = dict(eps=0.0, invstd_is_var=False, activation="", negative_slope=0.0)
        passes.launch_fwd(y, other, y[0, :, 0, 0, 0], y[0, :, 0, 0, 0], None, None, **options)
