"""The models built from ``sora_kernels`` against the plain PyTorch ones."""

from __future__ import annotations

import copy

import pytest
import torch

import sora_models
from sora_kernels.testing import assert_close, assert_within_2x
from sora_models.layers import load, missing
from sora_models.registry import model_class

PAIRS = [
    ("crnn", {}),
    ("crnn", {"cell": "rnn", "num_layers": 2}),
    ("crnn", {"norm": None}),
    ("autoencoder", {}),
    ("vaegan", {}),
    ("enhancer", {"cell": "pixel_lstm"}),
    ("enhancer", {"cell": "pixel_gru"}),
    ("enhancer", {"cell": "conv_lstm"}),
    # The plain model drops windows' tokens, ours the map's: other places for the same seed.
    ("pyramid_transformer", {"dropout": 0.0}),
    (
        "pyramid_transformer",
        {"dropout": 0.0, "pool_mode": "avg", "depth": 3, "window_size": (2, 3, 2)},
    ),
]


def pair(tiny, name, config):
    plain = tiny(name, "torch", **config)
    sora = tiny(name, "sora", **config)
    assert list(sora.state_dict()) == list(plain.state_dict())
    sora.load_state_dict(plain.state_dict())
    return plain, sora


def outputs(model, clip):
    out = model(clip)
    if isinstance(out, torch.Tensor):
        return {"logits": out}
    return out._asdict() if hasattr(out, "_asdict") else dict(enumerate(out))


@pytest.fixture(autouse=True)
def same_noise(monkeypatch):
    """vaegan's samples, the same in every dtype."""

    def draw(mu, logvar):
        return mu + (0.5 * logvar).exp() * torch.randn(mu.shape).to(mu)

    monkeypatch.setattr("sora_models.models.vaegan.draw", draw)


BACKENDS = [
    "",
    pytest.param("conv3d_bn_act=hybrid", marks=pytest.mark.triton),
    pytest.param("lstm=native,gru=native,rnn=native", marks=pytest.mark.native),
    "torch",
]


@pytest.mark.parametrize("asked", BACKENDS)
@pytest.mark.parametrize("name, config", PAIRS)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_every_gradient(tiny, monkeypatch, name, config, training, asked):
    if name == "pyramid_transformer" and asked not in ("", "torch"):
        pytest.skip("it has none of these operators")
    monkeypatch.setenv("SORA_BACKEND", asked)
    plain, sora = (model.train(training) for model in pair(tiny, name, config))
    truth = copy.deepcopy(plain).double()
    data = torch.rand(2, 3, 5, 9, 11)
    weights: dict[str, torch.Tensor] = {}
    found = []
    for model in (truth, plain, sora):
        clip = data.to(next(model.parameters()).dtype).requires_grad_()
        torch.manual_seed(1)
        results = outputs(model, clip)
        for key, value in results.items():
            weights.setdefault(key, torch.randn(value.shape))
        sum((value * weights[key].to(value)).sum() for key, value in results.items()).backward()
        gradients = {key: p.grad for key, p in model.named_parameters()} | {"clip": clip.grad}
        gradients = {key: g for key, g in gradients.items() if g is not None}
        found.append((results, gradients, dict(model.named_buffers())))
    (want, want_grad, want_buffers), (other, other_grad, other_buffers), ours = found
    assert len(gradients) > 4 and want_grad.keys() == other_grad.keys() == ours[1].keys()
    for key, value in ours[0].items():
        assert_within_2x(value, other[key], want[key], name=key)
    for key, gradient in ours[1].items():
        assert_within_2x(gradient, other_grad[key], want_grad[key], name=key, kink=True)
    for key, buffer in ours[2].items():
        if buffer.is_floating_point():
            assert_within_2x(buffer, other_buffers[key], want_buffers[key], name=key)
        else:
            assert torch.equal(buffer, other_buffers[key]), key


@pytest.mark.parametrize("name, config", PAIRS)
def test_twenty_training_steps(tiny, name, config):
    plain, sora = pair(tiny, name, config)
    data = torch.rand(20, 2, 3, 3, 7, 8)
    labels = torch.randint(0, 3, (20, 2))
    losses = []
    for model in (plain, sora):
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        steps = []
        torch.manual_seed(1)
        for clip, label in zip(data, labels, strict=True):
            loss = torch.nn.functional.cross_entropy(outputs(model, clip)["logits"], label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.detach())
        losses.append(torch.stack(steps))
    assert_close(losses[1], losses[0], "training_fp32", name="losses")
    initial = tiny(name, "torch", **config).state_dict()
    for key, value in sora.state_dict().items():
        if value.is_floating_point():
            assert_close(value, plain.state_dict()[key], "training_fp32", name=key)
    first = next(key for key in initial if key.endswith("weight"))
    assert not torch.equal(initial[first], sora.state_dict()[first])


@pytest.mark.parametrize("name, config", [p for p in PAIRS if p[1].get("cell") != "conv_lstm"])
@pytest.mark.parametrize("b, t, h, w", [(1, 1, 7, 5), (1, 4, 1, 1), (3, 2, 5, 8), (0, 3, 4, 5)])
def test_odd_clips(tiny, name, config, b, t, h, w):
    plain, sora = (model.eval() for model in pair(tiny, name, config))
    clip = torch.rand(b, 3, t, h, w)
    with torch.no_grad():
        found, wanted = outputs(sora, clip), outputs(plain, clip)
        for key, value in found.items():
            assert_close(value, wanted[key], "composition_fp32", name=key)
        assert_close(sora.features(clip), plain.features(clip), "composition_fp32")


def test_fp64(tiny):
    plain, sora = (model.double().eval() for model in pair(tiny, "crnn", {}))
    clip = torch.rand(2, 3, 3, 8, 8, dtype=torch.float64)
    assert_close(sora(clip), plain(clip), "transform_fp64")


def test_either_build_reads_what_the_other_saved(tiny, tmp_path):
    pytest.importorskip("safetensors")
    for writer, reader in (("torch", "sora"), ("sora", "torch")):
        model = tiny("crnn", writer).eval()
        model.save_pretrained(tmp_path / writer)
        loaded = sora_models.from_pretrained(tmp_path / writer, reader)
        clip = torch.rand(1, 3, 3, 8, 8)
        with torch.no_grad():
            assert_close(loaded(clip), model(clip), "composition_fp32")


@pytest.mark.parametrize("name", sora_models.list_models())
def test_every_model_builds_on_the_library(name):
    config = model_class(name).config_class()
    assert not missing(load("sora"), model_class(name).layers_used(config))
    sora_models.build(name, "sora")


def test_a_missing_layer_is_named_without_building(monkeypatch):
    layers = load("sora")
    monkeypatch.delattr(layers, "LSTM")
    with pytest.raises(NotImplementedError, match="crnn with this config needs LSTM, which"):
        sora_models.build("crnn", "sora")
