"""What windowed attention is measured against: one function in every form, torchvision's network in both builds."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn

import sora_kernels as sk
from benchmarks import cases, rivals, shapes, swin, torchvision_models, windows
from sora_kernels.testing import assert_close
from sora_models.layers import torch as plain

needs_torchvision = pytest.mark.skipif(
    torchvision_models.video_swin() is None, reason="torchvision is not installed"
)

# Map, window, shift: as it is; shifted; shifted and padded; clipped in time.
GEOMETRIES = {
    "plain": ((4, 6, 6), (2, 3, 3), (0, 0, 0)),
    "shifted": ((4, 6, 6), (2, 3, 3), (1, 1, 1)),
    "padded": ((3, 5, 7), (2, 3, 3), (1, 1, 1)),
    "clipped": ((2, 6, 6), (3, 3, 3), (1, 1, 1)),
}


def results(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    found = cases.evaluate(module, (x.clone().requires_grad_(),), (dy,))
    found = {name.replace("_orig_mod.", ""): t for name, t in found.items()}
    with torch.no_grad():
        return found | {"inference": module.eval()(x)}


def agree(modules: dict[str, nn.Module], x: Tensor, dy: Tensor) -> None:
    """With the first one's weights; in fp64, where nothing but the order of sums may differ."""
    first, *others = modules
    master = modules[first].state_dict()
    master["relative_position_bias_table"].normal_()
    for module in modules.values():
        module.load_state_dict(master)
        module.double().train()
    want = results(modules[first], x, dy)
    for name in others:
        found = results(modules[name], x, dy)
        assert found.keys() == want.keys()
        for key, value in want.items():
            assert_close(found[key], value, "transform_fp64", name=f"{name}: {key}")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_cores_agree(geometry):
    torch.manual_seed(0)
    size, window, shift = GEOMETRIES[geometry]
    x, dy = (torch.randn(2, *size, n * 8, dtype=torch.float64) for n in (3, 1))
    cores = {name: windows.Core(name, 2, window, shift) for name in ("eager", "sdpa_mask")}
    agree(cores | {"sora": windows.OursCore(2, window, shift, "reference")}, x, dy)
    # Uncompiled it is its formula in plain torch; on a CPU it has no backward.
    flex = windows.Core("flex", 2, window, shift)
    flex.load_state_dict(cores["eager"].state_dict())
    with torch.no_grad():
        assert_close(flex.double()(x), cores["eager"](x), "transform_fp64", name="flex")


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_modules_agree(geometry):
    torch.manual_seed(0)
    size, window, shift = GEOMETRIES[geometry]
    x, dy = (torch.randn(2, *size, 8, dtype=torch.float64) for _ in range(2))
    modules = {"transcribed": plain.ShiftedWindowAttention3d(8, window, shift, 2)}
    modules["stock"] = windows.stock(8, 2, window, shift)
    for form in ("eager", "sdpa_mask"):
        modules[form] = windows.Attention(form, 8, 2, window, shift)
    modules["sora"] = sk.nn.ShiftedWindowAttention3d(8, window, shift, 2, backend="reference")
    agree(modules, x, dy)


def test_a_summed_mask_is_kept_in_evaluation_alone():
    size, window, shift = GEOMETRIES["shifted"]
    core, x = windows.Core("sdpa_mask", 2, window, shift).train(), torch.randn(1, *size, 3 * 8)
    core(x)
    assert core._mask is None
    core.eval()(x)
    n, count = math.prod(window), math.prod(s // w for s, w in zip(size, window, strict=True))
    assert core._mask is not None and core._mask.shape == (2 * count, n, n)
    core._mask.fill_(0)
    assert not core(x).equal(core.train()(x))


def test_without_torchvision_the_transcription_is_stock(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert torchvision_models.video_swin.__wrapped__() is None
    monkeypatch.setattr(torchvision_models, "video_swin", lambda: None)
    assert type(windows.stock(8, 2, (2, 3, 3), (1, 1, 1))) is plain.ShiftedWindowAttention3d
    assert windows.source() == "sora_models.layers.torch"


def test_tiny_shapes_keep_what_a_row_is_for():
    for device in ("cpu", "cuda"):
        tiny = shapes.load("window_attention3d", device, tiny=True)
        for name, full in shapes.load("window_attention3d", device).items():
            for n, w, a, b in zip(
                full["input"], full["window"], tiny[name]["input"], tiny[name]["window"], strict=True
            ):  # fmt: skip
                assert (n < w, n % w > 0 and n > w, n > w) == (a < b, a % b > 0 and a > b, a > b)
            assert [bool(s) for s in full.get("shift", [])] == [
                bool(s) for s in tiny[name].get("shift", [])
            ]


@needs_torchvision
def test_it_is_torchvisions_network():
    torch.manual_seed(0)
    module = torchvision_models.video_swin()
    with torch.device("meta"):
        shapes_of = [
            {k: t.shape for k, t in m.state_dict().items()}
            for m in (swin.build("torch"), module.swin3d_t(weights=None))
        ]
    assert shapes_of[0] == shapes_of[1]
    theirs = module.SwinTransformer3d(
        [2, 4, 4], 24, [2, 2, 6, 2], [3, 6, 12, 24], [8, 7, 7], stochastic_depth_prob=0.0
    )
    ours = swin.build("torch", width=24)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 3, 38, 61).double()
    with torch.no_grad():
        assert_close(ours.double()(x), theirs.double()(x), "transform_fp64")


def test_builds_of_the_network_agree():
    torch.manual_seed(0)
    stock, ours = (swin.build(kind, width=24, classes=7).double() for kind in ("torch", "sora"))
    ours.load_state_dict(stock.state_dict())
    x, dy = torch.randn(1, 3, 17, 32, 36).double(), torch.randn(1, 7).double()
    want, found = (cases.evaluate(m, (x,), (dy,)) for m in (stock, ours))
    assert list(want) == list(found)
    for key, value in want.items():
        assert value.abs().max() > 0
        assert_close(found[key], value, "transform_fp64", name=key)
    assert any(isinstance(m, sk.nn.SwinBlock3d) for m in ours.modules())
    assert not any(
        isinstance(m, (swin.Block, sk.nn.SwinBlock3d)) for m in stock.features[1].modules()
    )


def test_backward_can_be_timed_alone():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    dy = torch.randn(4, 2)
    call = cases.backward_call(layer, (x,), (dy,))
    want = cases.module_call(layer, (x,), (dy,))()
    for found in (call(), call()):
        assert all(a.equal(b) for a, b in zip(found, want, strict=True))


def test_rivals_that_fail_or_are_wrong_are_named():
    def make(name: str):
        if name == "broken":
            raise RuntimeError("no compiler\nand much more")
        return lambda: name

    def check(name: str) -> None:
        assert name != "wrong", "output: off"

    makers, missing = rivals.built(["right", "wrong", "broken"], make, check, "cpu")
    assert list(makers) == ["right"] and makers["right"]()() == "right"
    assert missing == {"wrong": "output: off", "broken": "no compiler"}


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        (None, None),  # void
        ({"eager": 3.0, "compile": 2.0}, True),
        ({"eager": 2.9, "compile": 2.0}, False),
        ({"eager": 3.0}, None),
        ({"compile": 1.9}, False),
    ],
)
def test_a_gate_is_met_only_over_all_that_it_names(over, expected):
    assert rivals.met({"eager": 3.0, "compile": 2.0}, over) is expected
