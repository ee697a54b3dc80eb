"""Configs, the registry and saved models."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

import sora_models
from sora_models.registry import model_class

MODELS = sora_models.list_models()

# What is wrong for a field, by the field's default: a wrong type and a wrong value each.
WRONG_INT = [0, -1, 1.5, True, "3", None]
WRONG_TUPLE = [(), (0,), (1.5,), "12", 3, None]


def wrong_values(name: str, field: dataclasses.Field) -> list:
    default = field.default
    if field.name in ("num_blocks", "num_classes", "num_targets") and name != "crnn":
        return [-1, 1.5, True, "3"]
    if isinstance(default, tuple):
        return WRONG_TUPLE
    if isinstance(default, float):
        return [-0.1, "0.1", None, True]
    if isinstance(default, str) or field.name == "norm":
        return ["nonsense", 3]
    return WRONG_INT


FIELDS = [
    (name, field.name, value)
    for name in MODELS
    for field in dataclasses.fields(model_class(name).config_class)
    for value in wrong_values(name, field)
]


@pytest.mark.parametrize("name, field, value", FIELDS)
def test_a_wrong_field_is_named(name, field, value):
    config = model_class(name).config_class
    with pytest.raises(ValueError, match=rf"^{config.__name__}\.{field}: expected .*; got "):
        config(**{field: value})


@pytest.mark.parametrize(
    "name, fields, named",
    [
        ("vaegan", {"latent_channels": 17}, "latent_channels: expected at most 16, which is 1/48"),
        ("vaegan", {"time_strides": (1, 2)}, "time_strides: expected a tuple of 3"),
        ("vaegan", {"time_strides": (1, 3, 2)}, "time_strides: expected 1 or 2 for each"),
        ("pyramid_transformer", {"num_heads": 5}, "num_heads: expected a divisor of dim 96"),
        ("pyramid_transformer", {"dropout": 1.0}, r"dropout: expected a number in \[0, 1\)"),
        ("pyramid_transformer", {"patch_size": (2, 4)}, "patch_size: expected a tuple of 3"),
        ("autoencoder", {"channels": (64,)}, "channels: expected a tuple of 2"),
        ("enhancer", {"cell": "conv_lstm", "num_layers": 2}, "num_layers: expected 1 for cell"),
    ],
)
def test_fields_that_do_not_fit_together(name, fields, named):
    with pytest.raises(ValueError, match=named):
        sora_models.build(name, "torch", **fields)


@pytest.mark.parametrize("name", MODELS)
def test_json_round_trip(name):
    config = model_class(name).config_class()
    text = json.dumps(config.to_dict())
    back = type(config).from_dict(json.loads(text))
    assert back == config and hash(back) == hash(config)
    assert not any(isinstance(v, list) for v in vars(back).values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_classes = 1


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="^name: expected one of crnn, vaegan, .*; got 'resnet'"):
        sora_models.build("resnet")
    with pytest.raises(ValueError, match="CRNNConfig has no field 'width'; its fields are in_chan"):
        sora_models.build("crnn", "torch", width=3)
    with pytest.raises(ValueError, match="^backend: expected one of .*; got 'tensorflow'"):
        sora_models.build("crnn", "tensorflow")


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(tiny, name, tmp_path):
    pytest.importorskip("safetensors")
    model, clip = tiny(name), torch.rand(2, 3, 4, 9, 10)
    model(clip)  # running statistics that are not the initial ones
    assert model.save_pretrained(tmp_path / "model") == tmp_path / "model"
    loaded = sora_models.from_pretrained(tmp_path / "model", "torch")
    assert loaded.config == model.config and not loaded.training
    for (key, ours), (other, theirs) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert key == other and torch.equal(ours, theirs)
    with torch.no_grad():
        first, second = model.eval()(clip), loaded(clip)
    first, second = ([v] if isinstance(v, torch.Tensor) else [*v] for v in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_wrong_with_a_saved_model_is_said(tiny, tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere: expected a folder with config.json"):
        sora_models.from_pretrained(tmp_path / "nowhere")
    tiny("crnn").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    document = json.loads(config.read_text())

    def rewritten(text):
        config.write_text(text)
        return sora_models.from_pretrained(tmp_path, "torch")

    for text in ("{", "[]", '{"model": "crnn"}', '{"model": "crnn", "config": 3}'):
        with pytest.raises(ValueError, match="config.json: expected JSON"):
            rewritten(text)
    document["config"]["hidden_size"] = 7
    with pytest.raises(RuntimeError, match="size mismatch"):
        rewritten(json.dumps(document))
    document["config"]["hidden_size"] = -7
    with pytest.raises(ValueError, match="CRNNConfig.hidden_size: expected"):
        rewritten(json.dumps(document))


def test_a_missing_extra_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (tiny("crnn").save_pretrained, sora_models.from_pretrained):
        with pytest.raises(ImportError, match=r"pip install 'sora_kernels\[models\]'"):
            call(tmp_path / "model")
    assert not (tmp_path / "model").exists()
