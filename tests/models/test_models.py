"""The five models in plain PyTorch: shapes on odd clips, gradients, dtypes, seeds, names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import sora_models
from sora_kernels.testing import assert_close

MODELS = sora_models.list_models()
# (B, T, H, W): one frame, odd sizes, smaller than any patch or stride, an empty batch.
CLIPS = [(1, 1, 17, 23), (2, 5, 16, 9), (1, 9, 33, 31), (2, 1, 1, 1), (0, 4, 8, 8)]


def outputs(model, clip) -> list[torch.Tensor]:
    """Every tensor that a model gives for a clip."""
    out = model(clip)
    found = [out] if isinstance(out, torch.Tensor) else [v for v in out if v is not None]
    return found + (list(model.detect(clip)) if hasattr(model, "detect") else [])


@pytest.mark.parametrize("b, t, h, w", CLIPS)
@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_odd_clips(tiny, name, b, t, h, w):
    model = tiny(name).eval()
    with torch.no_grad():
        out = model(torch.rand(b, 3, t, h, w))
    frames, classes = (b, 3, t, h, w), (b, 3)
    if name == "vaegan":
        latent = (b, 2, *(max(n, s) // s for n, s in zip((t, h, w), (2, 4, 4), strict=True)))
        expected = [frames, latent, latent, classes]
    elif name == "autoencoder":
        expected = [frames, (b, 5), classes]
    elif name == "enhancer":
        expected = [frames, classes, (b, 1)]
    else:
        out, expected = [out], [classes]
    assert [tuple(v.shape) for v in out] == expected
    assert all(torch.isfinite(v).all() for v in out)


@pytest.mark.parametrize("name", MODELS)
def test_features(tiny, name):
    model, clip = tiny(name).eval(), torch.rand(2, 3, 5, 9, 10)
    shape = {
        "crnn": (2, 5, 5),
        "vaegan": (2, 6, 2, 2, 2),
        "pyramid_transformer": (2, 6),
        "enhancer": (2, 6, 5, 9, 10),
        "autoencoder": (2, 4, 5, 9, 10),
    }[name]
    assert model.features(clip).shape == shape


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter_and_the_clip(tiny, name):
    model = tiny(name)
    clip = torch.rand(2, 3, 5, 17, 14, requires_grad=True)
    total = sum((v * torch.randn_like(v)).sum() for v in outputs(model, clip))
    if name == "vaegan":
        total = total + sum((v * torch.randn_like(v)).sum() for v in model.discriminator(clip))
    total.backward()
    for key, parameter in [*model.named_parameters(), ("clip", clip)]:
        gradient = parameter.grad
        assert gradient is not None and torch.isfinite(gradient).all(), key
        assert gradient.abs().max() > 0, key


@pytest.mark.parametrize("name", MODELS)
def test_fp64_gives_the_same_numbers(tiny, name):
    model, clip = tiny(name).eval(), torch.rand(2, 3, 4, 9, 10)
    with torch.no_grad():
        single = outputs(model, clip)
        double = outputs(model.double(), clip.double())
    for ours, truth in zip(single, double, strict=True):
        assert truth.dtype == torch.float64
        assert_close(ours, truth, "composition_fp32")


@pytest.mark.parametrize("name", MODELS)
def test_eval_is_repeatable_and_leaves_the_buffers(tiny, name):
    model, clip = tiny(name).eval(), torch.rand(2, 3, 4, 9, 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        first, second = outputs(model, clip), outputs(model, clip)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["crnn", "vaegan", "enhancer", "autoencoder"])
def test_training_updates_running_statistics(tiny, name):
    model = tiny(name)
    before = {key: value.clone() for key, value in model.named_buffers()}
    outputs(model, torch.rand(2, 3, 4, 9, 10))
    used = [key for key in before if "discriminator" not in key]
    assert used and all(not torch.equal(before[key], model.get_buffer(key)) for key in used)


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_fixes_the_weights(tiny, name):
    first, second = (tiny(name).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(1)
    other = sora_models.build(name, "torch").state_dict()
    torch.manual_seed(2)
    another = sora_models.build(name, "torch").state_dict()
    assert any(not torch.equal(other[key], another[key]) for key in other)


def test_state_dict_keys_and_shapes_are_pinned():
    """Checkpoints depend on them. A change of the file is a break of the format: say so."""
    file = Path(__file__).with_name("state_dicts.json")
    with torch.device("meta"):
        found = {
            name: {
                key: list(value.shape)
                for key, value in sora_models.build(name, "torch").state_dict().items()
            }
            for name in MODELS
        }
    assert found == json.loads(file.read_text(encoding="utf-8"))


def test_parameter_count():
    model = sora_models.build("crnn", "torch")
    conv = sum(a * b * 9 + 2 * b for a, b in ((3, 32), (32, 64), (64, 128)))
    lstm = 4 * 128 * (128 + 128 + 2)
    assert sora_models.parameter_count(model) == conv + lstm + 128 * 10 + 10
    assert sora_models.parameter_count("crnn") == sora_models.parameter_count(model)
    assert sora_models.parameter_count("crnn", num_classes=1) < sora_models.parameter_count("crnn")


@pytest.mark.parametrize(
    "clip, got",
    [
        (torch.zeros(1, 3, 0, 4, 4), r"torch.float32 \[1, 3, 0, 4, 4\]"),
        (torch.zeros(1, 1, 2, 4, 4), r"torch.float32 \[1, 1, 2, 4, 4\]"),
        (torch.zeros(3, 2, 4, 4), r"torch.float32 \[3, 2, 4, 4\]"),
        (torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8), r"torch.uint8 \[1, 3, 2, 4, 4\]"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_bad_clip_is_named(tiny, name, clip, got):
    with pytest.raises(ValueError, match=rf"clip: expected floating point \[B, 3, .*; got {got}"):
        tiny(name)(clip)


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_crnn_variants(tiny, norm, cell):
    model = tiny("crnn", norm=norm, cell=cell)
    assert any("bn" in key for key in model.state_dict()) == (norm == "batch")
    assert type(model.rnn) is {"lstm": torch.nn.LSTM, "rnn": torch.nn.RNN}[cell]
    model(torch.rand(2, 3, 3, 6, 5)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_crnn_is_its_stock_modules(tiny):
    model = tiny("crnn").double().eval()
    clip = torch.rand(2, 3, 4, 6, 5, dtype=torch.float64)
    frames = []
    for frame in clip.unbind(2):  # 2-D, frame by frame, as the article has it
        for layer in model.cnn:
            frame = torch.nn.functional.conv2d(frame, layer.conv.weight[:, :, 0], padding=1)
            frame = (frame / (1 + layer.bn.eps) ** 0.5).clamp_min(0)
        frames.append(frame.mean((2, 3)))
    _, (h_n, _) = model.rnn(torch.stack(frames, 1))
    assert_close(model(clip), h_n[-1] @ model.fc.weight.T + model.fc.bias, "transform_fp64")


def test_crnn_reads_the_last_step(tiny):
    model, clip = tiny("crnn").eval(), torch.rand(2, 3, 6, 8, 8)
    assert torch.equal(model(clip), model.fc(model.features(clip)[:, -1]))
    assert_close(model.features(clip[:, :, :4]), model.features(clip)[:, :4], "composition_fp32")


@pytest.mark.parametrize("cell", ["pixel_lstm", "pixel_gru", "conv_lstm"])
def test_enhancer_cells(tiny, cell):
    model, clip = tiny("enhancer", cell=cell), torch.rand(2, 3, 3, 6, 5)
    out = model(clip)
    assert out.enhanced.shape == clip.shape
    sum(v.square().sum() for v in out).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_enhancer_recurrence_looks_back_only(tiny):
    for cell in ("pixel_lstm", "conv_lstm"):
        recurrence = tiny("enhancer", cell=cell).recurrence
        maps = torch.rand(1, 4, 5, 3, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(recurrence(maps)[:, :, 2].sum(), maps)
        assert [bool(g.any()) for g in gradient.unbind(2)] == [True, True, True, False, False]


def test_conv_lstm_on_one_pixel_is_an_lstm(tiny):
    """On a 1x1 map only the middle taps of the 3x3 gates touch anything."""
    conv = tiny("enhancer", cell="conv_lstm").recurrence.double()
    lstm = torch.nn.LSTM(4, 5, batch_first=True).double()
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(conv.conv_ih.weight[:, :, 0, 1, 1])
        lstm.weight_hh_l0.copy_(conv.conv_hh.weight[:, :, 1, 1])
        lstm.bias_ih_l0.copy_(conv.conv_ih.bias)
        lstm.bias_hh_l0.zero_()
        x = torch.randn(2, 4, 6, 1, 1, dtype=torch.float64)
        expected = lstm(x[..., 0, 0].transpose(1, 2))[0].transpose(1, 2)
        assert_close(conv(x)[..., 0, 0], expected, "transform_fp64")


def test_enhancer_adds_its_residual_to_the_clip(tiny):
    model, clip = tiny("enhancer"), torch.rand(2, 3, 2, 5, 4)
    torch.nn.init.zeros_(model.residual.weight)
    torch.nn.init.constant_(model.residual.bias, 0.25)
    assert torch.equal(model(clip).enhanced, clip + 0.25)


def test_autoencoder_blocks_carry_their_input(tiny):
    block = tiny("autoencoder").eval().blocks[0]
    torch.nn.init.zeros_(block.conv2.conv.weight)
    x = torch.randn(1, 6, 2, 3, 3)
    assert torch.equal(block(x), x.relu())  # a fresh BatchNorm in eval keeps zeros


def test_enhancer_heads_can_be_left_out(tiny):
    out = tiny("enhancer", num_classes=0, num_targets=0)(torch.rand(2, 3, 2, 4, 4))
    assert out.logits is None and out.values is None
    with pytest.raises(ValueError, match="labels: expected None"):
        model = tiny("enhancer", num_classes=0)
        model.loss(torch.rand(2, 3, 2, 4, 4), torch.rand(2, 3, 2, 4, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["enhancer", "autoencoder"])
def test_loss_falls_and_adds_up(tiny, name):
    model, clip, labels = tiny(name), torch.rand(2, 3, 3, 6, 6), torch.tensor([0, 2])
    target = (clip.flip(-1),) if name == "enhancer" else ()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    totals = []
    for _ in range(15):
        losses = model.loss(clip, *target, labels, class_weight=0.5)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        totals.append(losses["total"].item())
    first = next(value for key, value in losses.items() if key not in ("total", "classification"))
    assert_close(losses["total"], first + 0.5 * losses["classification"], "composition_fp32")
    assert totals[-1] < 0.7 * totals[0]


def test_pyramid_has_twenty_levels():
    from sora_models.models.pyramid_transformer import PyramidTransformerConfig, levels

    found = levels(PyramidTransformerConfig())
    assert len(found) == len(set(found)) == 20
    assert found[:4] == [(None, 1, 1), (None, 2, 2), (None, 4, 4), (None, 8, 8)]
    assert set(found[4:]) == {(t, s, s) for t in (1, 2, 4, 8) for s in (1, 2, 4, 8)}


def test_every_second_pyramid_block_shifts(tiny):
    blocks = tiny("pyramid_transformer", depth=3, window_size=(2, 5, 4)).blocks
    assert [b.attn.shift_size for b in blocks] == [(0, 0, 0), (1, 2, 2), (0, 0, 0)]


def test_pyramid_without_blocks_is_its_pools(tiny):
    """Levels, their order and the fusion, with the attention taken out."""
    model = tiny("pyramid_transformer", pool_mode="avg").double().eval()
    model.blocks = torch.nn.Identity()
    clip = torch.rand(2, 3, 5, 8, 6, dtype=torch.float64)
    tokens = model.patch_norm(model.patch_embedding(clip).movedim(1, -1)).movedim(-1, 1)
    parts = []
    for t, s in [(5, 1), (5, 3), (1, 1), (2, 1), (1, 3), (2, 3)]:
        level = torch.nn.functional.adaptive_avg_pool3d(tokens, (t, s, s))
        parts.append(model.norm(level.flatten(2).mT).mean(1))
    expected = model.head(model.fuse(torch.cat(parts, 1)))
    assert_close(model(clip), expected, "transform_fp64")


def test_vaegan_latent_is_at_most_one_48th():
    with torch.device("meta"):
        model = sora_models.build("vaegan", "torch").eval()
        for size in [(4, 8, 8), (5, 9, 15), (7, 33, 31), (16, 64, 64)]:
            clip = torch.empty(1, 3, *size)
            mu, logvar = model.encode(clip)
            assert mu.numel() * 48 <= clip.numel() and logvar.shape == mu.shape
            assert model.decode(mu, size).shape == clip.shape


def test_vaegan_draws_in_training_only(tiny):
    model, clip = tiny("vaegan"), torch.rand(2, 3, 4, 9, 10)
    assert not torch.equal(model(clip).reconstruction, model(clip).reconstruction)
    model.eval()
    assert torch.equal(model(clip).reconstruction, model(clip).reconstruction)


def test_vaegan_sampling_follows_its_generator(tiny):
    model = tiny("vaegan").eval()

    def sample(seed):
        return model.sample(2, (3, 9, 11), generator=torch.Generator().manual_seed(seed))

    clips = sample(1)
    assert clips.shape == (2, 3, 3, 9, 11) and clips.min() > 0 and clips.max() < 1
    assert torch.equal(clips, sample(1)) and not torch.equal(clips, sample(2))


def test_vaegan_losses_stay_on_their_side(tiny):
    model, clip, labels = tiny("vaegan"), torch.rand(2, 3, 4, 9, 10), torch.tensor([0, 2])

    def touched():
        names = {k.split(".")[0] for k, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return names

    model.generator_loss(clip, labels)["total"].backward()
    generator = touched()
    assert "discriminator" not in generator and {"encoder", "decoder", "mu"} <= generator
    assert all(p.requires_grad for p in model.parameters())
    model.discriminator_loss(clip, labels)["total"].backward()
    assert touched() == {"discriminator"}


def test_vaegan_loss_terms(tiny):
    model, clip, labels = tiny("vaegan").eval(), torch.rand(2, 3, 4, 9, 10), torch.tensor([0, 2])
    losses, out, config = model.generator_loss(clip, labels), model(clip), model.config
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(
        normal(out.mu, (0.5 * out.logvar).exp()), normal(0.0, 1.0)
    )
    assert_close(losses["kl"], kl.sum() / clip.numel(), "composition_fp32")
    real, _ = model.discriminator(out.reconstruction)
    assert_close(losses["adversarial"], -real.sigmoid().log().mean(), "composition_fp32")
    expected = (
        (out.reconstruction - clip).square().mean()
        + config.kl_weight * losses["kl"]
        + config.adversarial_weight * losses["adversarial"]
        + config.class_weight * losses["classification"]
    )
    assert_close(losses["total"], expected, "composition_fp32")
    assert "classification" not in model.generator_loss(clip)


def test_vaegan_detections_lie_in_their_cells(tiny):
    out = tiny("vaegan").eval().detect(torch.rand(2, 3, 4, 12, 20))
    assert out.objectness.shape == (2, 2, 3, 5)
    assert out.boxes.shape == (2, 2, 3, 5, 4) and out.logits.shape == (2, 2, 3, 5, 3)
    x, y = out.boxes[..., 0] * 5, out.boxes[..., 1] * 3
    assert torch.equal(x.floor(), torch.arange(5.0).expand_as(x))
    assert torch.equal(y.floor(), torch.arange(3.0).view(3, 1).expand_as(y))
    assert math.isfinite(out.boxes.sum().item()) and out.boxes.min() > 0 and out.boxes.max() < 1


def test_vaegan_names_a_latent_of_the_wrong_size(tiny):
    model = tiny("vaegan")
    with pytest.raises(
        ValueError, match=r"^latent: expected \[B, 2, 2, 2, 2\] for size \(4, 8, 8\)"
    ):
        model.decode(torch.zeros(1, 2, 2, 2, 3), (4, 8, 8))
    with pytest.raises(ValueError, match="^size: expected"):
        model.sample(1, (4, 0, 8))
