from __future__ import annotations

import pytest
import torch

import sora_kernels as sk
from sora_kernels import _dispatch, _tuning
from sora_kernels._dispatch import YES, Backend, Operator, no


@pytest.fixture
def operator():
    found = Operator(
        "a_test_operator",
        [
            Backend(
                "fast",
                lambda n: YES if n % 8 == 0 else no(f"n is {n}, not a multiple of 8"),
                "F",
                deterministic=lambda facts: False,
            ),
            Backend(
                "steady",
                lambda n: YES if n < 100 else no(f"n is {n}, over 100"),
                "S",
                config=lambda n: f"tile {n}",
                floor_bytes=lambda n: 4 * n,
            ),
            Backend("reference", lambda n: YES, "R"),
        ],
        prefer=lambda n: ("fast", "steady"),
        facts=lambda n: n,
    )  # fmt: skip
    yield found
    del _dispatch.OPERATORS["a_test_operator"]


def test_automatic_choice_takes_the_first_that_can(operator):
    assert operator.select("", 8).name == "fast"
    assert operator.select("", 9).name == "steady"


def test_reference_is_never_chosen_on_its_own(operator):
    with pytest.raises(sk.BackendError, match="no backend can run 101"):
        operator.select("", 101)
    assert operator.select("reference", 101).name == "reference"


def test_a_named_backend_runs_or_raises_its_reason(operator, monkeypatch):
    assert operator.select("fast", 8).name == "fast"
    with pytest.raises(sk.BackendError, match="'fast' cannot run: n is 9, not a multiple of 8"):
        operator.select("fast", 9)
    monkeypatch.setenv("SORA_BACKEND", "a_test_operator=fast")
    with pytest.raises(sk.BackendError, match="n is 9"):
        operator.select("", 9)
    assert operator.select("steady", 9).name == "steady"  # the call's own word goes first


def test_a_bare_name_binds_the_operators_that_have_it(operator, monkeypatch):
    monkeypatch.setenv("SORA_BACKEND", "steady")
    assert operator.select("", 8).name == "steady"
    monkeypatch.setenv("SORA_BACKEND", "hybrid, a_test_operator = reference")
    assert operator.select("", 8).name == "reference"


def test_deterministic_mode_passes_over_a_backend_that_is_not(operator):
    torch.use_deterministic_algorithms(True)
    try:
        assert operator.select("", 8).name == "steady"
        row = {r.backend: r for r in sk.explain("a_test_operator", 8).rows}["fast"]
        assert not row.usable and "deterministic" in row.why
    finally:
        torch.use_deterministic_algorithms(False)


def test_explain_names_every_backend_and_the_reason(operator):
    explained = sk.explain("a_test_operator", 9)
    text = str(explained)
    assert explained.chosen == "steady"
    assert [r.backend for r in explained.rows] == ["fast", "steady", "reference"]
    for part in (
        "n is 9, not a multiple of 8",
        "tile 9",
        "3.6e-05 MB",
        "not measured",
        "runs only when named",
    ):
        assert part in text, part
    with pytest.raises(ValueError, match="op must be one of .*a_test_operator.*, got 'nothing'"):
        sk.explain("nothing")


def test_unknown_backend_is_one_clear_error(operator):
    assert operator.check_name(None) == ""
    with pytest.raises(
        ValueError, match="backend must be one of fast, steady, reference or None, got 'cuda'"
    ):
        operator.check_name("cuda")


def test_tuned_rows_match_then_take_the_nearest(monkeypatch):
    table = {
        "default": {"k": [{"match": {"dtype": "bf16"}, "at": {"c": 64}, "config": {"B": 1}},
                          {"match": {"dtype": "bf16"}, "at": {"c": 512}, "config": {"B": 2}},
                          {"config": {"B": 3}}]},
        "sm90": {"k": [{"match": {"dtype": "fp32"}, "config": {"B": 4}}]},
    }  # fmt: skip
    monkeypatch.setattr(_tuning, "rows", lambda op, arch: table.get(arch, {}))
    _tuning.config.cache_clear()

    def look(arch, **key):
        return _tuning.config("op", "k", arch, tuple(sorted(key.items())))["B"]

    assert look("sm90", dtype="fp32", c=64) == 4  # the architecture's own row
    assert look("sm90", dtype="fp16", c=64) == 3  # none there: the default's
    assert look("sm80", dtype="bf16", c=600) == 2  # nearest in log space
    assert look("sm80", dtype="bf16", c=100) == 1
    monkeypatch.setattr(_tuning, "rows", lambda op, arch: {})
    _tuning.config.cache_clear()
    with pytest.raises(LookupError, match="op: tuned/default.json has no row for k"):
        look("sm80", dtype="bf16", c=1)
    _tuning.config.cache_clear()


def test_every_shipped_config_is_found():
    kernels = [k for k in _tuning.rows("conv3d_bn_act", "default") if "bn" in k or "act" in k]
    assert len(kernels) == 5
    for kernel in kernels:
        for layout in ("channels_last", "contiguous"):
            key = (("channels", 64), ("itemsize", 2), ("layout", layout))
            config = _tuning.config("conv3d_bn_act", kernel, "sm90", key)
            assert {"BLOCK_M", "BLOCK_C", "ITERATIONS", "num_warps"} <= set(config)
