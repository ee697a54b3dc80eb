"""The asserts themselves: each must fail on what it is there to catch."""

from __future__ import annotations

import pytest
import torch

from sora_kernels.testing import (
    TOLERANCES,
    assert_close,
    assert_within_2x,
    floor,
    poisoned,
    shuffled_programs,
)


def test_two_times_rule():
    truth = torch.randn(1000, dtype=torch.float64)
    plain = truth.float() + 1e-4 * torch.randn(1000)
    error = plain.double() - truth
    assert_within_2x((truth + 1.9 * error).float(), plain, truth)
    with pytest.raises(AssertionError, match="dx .*max error .* limit"):
        assert_within_2x((truth + 2.2 * error).float(), plain, truth, name="dx")


def test_floor_allows_a_rounding_where_plain_torch_is_exact():
    truth = torch.full((8,), 3.0, dtype=torch.float64)
    exact = truth.bfloat16()
    off_by_one = exact.clone()
    off_by_one[0] += 2**-6  # one bf16 ulp at 3
    assert_within_2x(off_by_one, exact, truth)
    off_by_one[0] += 2**-5
    with pytest.raises(AssertionError, match="max error"):
        assert_within_2x(off_by_one, exact, truth)
    assert floor(torch.float32, 2.0) < 1e-5 < floor(torch.bfloat16, 2.0)


def test_kink_forgives_one_element_and_not_many():
    truth = torch.randn(10000, dtype=torch.float64)
    plain = truth.float() + 1e-2 * torch.randn(10000)
    flipped = truth.float()
    flipped[0] += 1.0
    with pytest.raises(AssertionError):
        assert_within_2x(flipped, plain, truth)
    assert_within_2x(flipped, plain, truth, kink=True)
    with pytest.raises(AssertionError, match="rms"):
        assert_within_2x(flipped + 0.05, plain, truth, kink=True)


def test_a_sum_that_cancels_is_judged_by_its_terms():
    truth = torch.tensor([1e-9], dtype=torch.float64)
    plain, ours = truth.float(), (truth + 1e-6).float()
    with pytest.raises(AssertionError, match="max error"):
        assert_within_2x(ours, plain, truth)
    assert_within_2x(ours, plain, truth, terms=2.0)
    with pytest.raises(AssertionError, match="max error"):
        assert_within_2x(ours + 1e-5, plain, truth, terms=2.0)


def test_nan_infinity_shape_and_dtype_are_compared():
    truth = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    plain = truth.float()
    assert_within_2x(plain.clone(), plain, truth)
    with pytest.raises(AssertionError, match="NaN differs at"):
        assert_within_2x(torch.tensor([1.0, 2.0, torch.inf]), plain, truth)
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_within_2x(torch.tensor([1.0, torch.nan, -torch.inf]), plain, truth)
    with pytest.raises(AssertionError, match="expected"):
        assert_within_2x(plain[:2], plain, truth)
    with pytest.raises(AssertionError, match="expected"):
        assert_within_2x(plain.half(), plain, truth)


def test_assert_close():
    a = torch.ones(3)
    assert_close(a, a + 1e-7, "composition_fp32")
    with pytest.raises(AssertionError, match="tolerance composition_fp32"):
        assert_close(a, a + 1e-3, "composition_fp32")
    with pytest.raises(AssertionError, match="NaN differs"):
        assert_close(torch.tensor([torch.nan]), torch.ones(1), "composition_fp32")
    with pytest.raises(KeyError):
        assert_close(a, a, "a tolerance nobody justified")


def test_every_tolerance_has_a_reason():
    assert all(t.value > 0 and len(t.reason.split()) > 4 for t in TOLERANCES.values())


def test_poisoned_fills_and_puts_the_mode_back():
    for mode in (False, True):
        torch.use_deterministic_algorithms(mode)
        try:
            with poisoned():
                assert torch.isnan(torch.empty(100)).all()
                assert torch.isnan(torch.empty_like(torch.ones(4, dtype=torch.bfloat16))).all()
            assert torch.are_deterministic_algorithms_enabled() is mode
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.triton
def test_shuffled_programs_visits_each_once_in_another_order():
    triton = pytest.importorskip("triton", exc_type=ImportError)
    tl = triton.language
    order = torch.zeros(24, dtype=torch.int64)
    clock = torch.zeros(1, dtype=torch.int64)
    kernel = triton.jit(_stamp)
    _stamp.__globals__["tl"] = tl
    kernel[(2, 3, 4)](order, clock)
    assert order.tolist() == list(range(24))
    seen = []
    for seed in (0, 1):
        clock.zero_()
        with shuffled_programs(seed):
            kernel[(2, 3, 4)](order, clock)
        assert sorted(order.tolist()) == list(range(24))
        seen.append(order.tolist())
    assert seen[0] != seen[1] and list(range(24)) not in seen


def _stamp(order_ptr, clock_ptr):
    pid = (tl.program_id(0) * 3 + tl.program_id(1)) * 4 + tl.program_id(2)  # noqa: F821
    now = tl.load(clock_ptr)  # noqa: F821
    tl.store(order_ptr + pid, now)  # noqa: F821
    tl.store(clock_ptr, now + 1)  # noqa: F821
