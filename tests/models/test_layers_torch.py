"""The plain-PyTorch layers against formulas written out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from sora_kernels.testing import assert_close
from sora_models.layers import load, missing
from sora_models.layers import torch as layers


def bins(size: int, count: int | None) -> list[slice]:
    if count is None:
        return [slice(i, i + 1) for i in range(size)]
    return [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def pooled(x: torch.Tensor, level: tuple[int | None, ...], mode: str) -> torch.Tensor:
    t, h, w = ([*bins(n, o)] for n, o in zip(x.shape[2:], level, strict=True))
    out = x.new_empty(*x.shape[:2], len(t), len(h), len(w))
    for i, ti in enumerate(t):
        for j, hj in enumerate(h):
            for k, wk in enumerate(w):
                cell = x[:, :, ti, hj, wk]
                out[:, :, i, j, k] = cell.amax((2, 3, 4)) if mode == "max" else cell.mean((2, 3, 4))
    return out


SIZES = [(5, 7, 6), (1, 1, 1), (2, 9, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["max", "avg", "maxavg"])
def test_pool_flat_equals_loops_over_bins(size, mode):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    levels = [1, (3, 1, 2), 4]
    modes = {"max": ["max"], "avg": ["avg"], "maxavg": ["max", "avg"]}[mode]
    expected = torch.cat(
        [
            pooled(x, (level,) * 3 if isinstance(level, int) else level, m).flatten(1)
            for level in levels
            for m in modes
        ],
        1,
    )
    assert_close(layers.PyramidPool3d(levels, mode=mode)(x), expected, "transform_fp64")
    last = layers.PyramidPool3d(levels, mode=mode, data_format="NDHWC")
    assert_close(last(x.movedim(1, -1)), expected, "transform_fp64")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["max", "avg"])
def test_pool_maps_equal_loops_over_bins(size, mode):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    levels = [(None, 2, 2), (3, 2, 2), (None, None, 1)]
    maps = layers.PyramidPool3d(levels, mode=mode, output="maps")(x)
    last = layers.PyramidPool3d(levels, mode=mode, output="maps", data_format="NDHWC")
    for level, found, found_last in zip(levels, maps, last(x.movedim(1, -1)), strict=True):
        assert_close(found, pooled(x, level, mode), "transform_fp64")
        assert torch.equal(found_last.movedim(-1, 1), found)


def test_pool_of_an_empty_batch():
    assert layers.PyramidPool3d((1, 2))(torch.zeros(0, 3, 4, 4, 4)).shape == (0, 27)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"levels": (0,)}, "levels"),
        ({"levels": ((1, 2),)}, "levels"),
        ({"levels": ()}, "levels"),
        ({"levels": ((None, 1, 1),)}, "levels"),
        ({"mode": "median"}, "mode"),
        ({"output": "list"}, "output"),
        ({"data_format": "NHWC"}, "data_format"),
    ],
)
def test_pool_names_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        layers.PyramidPool3d(**arguments)


def test_pool_names_bad_input():
    with pytest.raises(ValueError, match=r"^x: expected 5 dimensions, NCDHW; got \(1, 2, 3\)"):
        layers.PyramidPool3d()(torch.zeros(1, 2, 3))


ACTIVATIONS = {
    "relu": lambda x: x.clamp_min(0),
    "silu": lambda x: x / (1 + (-x).exp()),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.2 * x),
    None: lambda x: x,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_conv_bn_act_equals_its_formula(activation, training):
    layer = layers.ConvBNAct3d(
        2, 3, 3, stride=(1, 2, 2), padding=1, activation=activation, negative_slope=0.2
    )
    layer = layer.double().train(training)
    for tensor in (layer.bn.weight, layer.bn.bias, layer.bn.running_mean):
        torch.nn.init.normal_(tensor)
    x = torch.randn(2, 2, 4, 5, 6, dtype=torch.float64)
    y = F.conv3d(x, layer.conv.weight, layer.conv.bias, (1, 2, 2), 1)
    mean, var = layer.bn.running_mean.clone(), layer.bn.running_var.clone()
    if training:
        mean, var = y.mean((0, 2, 3, 4)), y.var((0, 2, 3, 4), correction=0)

    def along(v):
        return v.view(1, -1, 1, 1, 1)

    y = (y - along(mean)) / along(var + layer.bn.eps).sqrt()
    y = y * along(layer.bn.weight) + along(layer.bn.bias)
    residual = torch.randn_like(y)
    expected = ACTIVATIONS[activation](y + residual)
    assert_close(layer(x, residual), expected, "transform_fp64")


def test_conv_act_equals_its_formula():
    layer = layers.ConvAct3d(2, 3, 3, padding=1, activation="silu").double()
    x = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    y = F.conv3d(x, layer.conv.weight, layer.conv.bias, padding=1)
    residual = torch.randn_like(y)
    assert_close(layer(x, residual), ACTIVATIONS["silu"](y + residual), "transform_fp64")


def test_conv_transpose_is_the_gradient_of_a_convolution():
    layer = layers.ConvTransposeBNAct3d(3, 2, 3, 2, 1, bias=False, activation=None)
    layer = layer.double().eval()
    y = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)
    size = (4, 5, 7)
    x = torch.zeros(2, 2, *size, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(F.conv3d(x, layer.conv.weight, None, 2, 1), x, y)
    scale = (1 + layer.bn.eps) ** -0.5  # running statistics of a fresh BatchNorm are 0 and 1
    assert_close(layer(y, output_size=size), expected * scale, "transform_fp64")


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"^activation: expected one of 'relu', .*; got 'gelu'"):
        layers.ConvBNAct3d(1, 1, 1, activation="gelu")


def test_load_and_missing():
    assert load("torch") is layers
    assert missing(layers, ["LSTM", "Attention", "Attention"]) == ["Attention"]
    with pytest.raises(ValueError, match=r"^backend: expected one of .*; got 'jax'"):
        load("jax")


def test_the_torch_build_imports_no_sora_kernels():
    code = (
        "import sys, torch, sora_models\n"
        "for name in sora_models.list_models(): sora_models.build(name, 'torch')\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'sora_kernels'], 'imported'\n"
        "assert not {'av', 'safetensors', 'matplotlib'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
