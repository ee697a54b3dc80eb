"""The plain-PyTorch window attention against a loop over tokens.

Two tokens see each other if the shifted grid puts them into one window and they are less than a
window apart in the padded map, which is what the cyclic mask stands for.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sora_kernels.testing import assert_close
from sora_models.layers.torch import ShiftedWindowAttention3d


def token_loop(module: ShiftedWindowAttention3d, x: torch.Tensor) -> torch.Tensor:
    heads, table = module.num_heads, module.relative_position_bias_table.detach().numpy()
    full = module.window_size
    weight, bias = module.qkv.weight.detach().numpy(), module.qkv.bias.detach().numpy()
    b, *size, c = x.shape
    window = [min(n, w) for n, w in zip(size, full, strict=True)]
    shift = [s if n > w else 0 for n, w, s in zip(size, full, module.shift_size, strict=True)]
    padded = [-(-n // w) * w for n, w in zip(size, window, strict=True)]
    padded_x = np.zeros((b, *padded, c))
    padded_x[:, : size[0], : size[1], : size[2]] = x.numpy()
    q, k, v = np.split(padded_x @ weight.T + bias, 3, axis=-1)
    out = np.zeros((b, *padded, c))
    head_dim = c // heads

    def rolled(p):
        return [(i - s) % n for i, s, n in zip(p, shift, padded, strict=True)]

    def bias_row(p, other):
        """Row of the table for a pair, by true offsets or by the reference's slot numbers."""
        if module.bias_index == "exact":
            offset = [i - j for i, j in zip(p, other, strict=True)]
        else:
            slots = (
                np.unravel_index(
                    np.ravel_multi_index(
                        [r % w for r, w in zip(rolled(t), window, strict=True)], window
                    ),
                    full,
                )
                for t in (p, other)
            )
            offset = [int(i) - int(j) for i, j in zip(*slots, strict=True)]
        return np.ravel_multi_index(
            [o + w - 1 for o, w in zip(offset, full, strict=True)], [2 * w - 1 for w in full]
        )

    positions = list(itertools.product(*map(range, padded)))
    for p in positions:
        home = [r // w for r, w in zip(rolled(p), window, strict=True)]
        seen = [
            o
            for o in positions
            if [r // w for r, w in zip(rolled(o), window, strict=True)] == home
            and all(abs(i - j) < w for i, j, w in zip(p, o, window, strict=True))
        ]
        index = tuple(np.array(seen).T)
        rows = [bias_row(p, o) for o in seen]
        for sample, head in itertools.product(range(b), range(heads)):
            part = slice(head * head_dim, (head + 1) * head_dim)
            keys, values = k[(sample, *index)][:, part], v[(sample, *index)][:, part]
            scores = keys @ q[(sample, *p)][part] / np.sqrt(head_dim) + table[rows, head]
            weights = np.exp(scores - scores.max())
            out[(sample, *p)][part] = weights / weights.sum() @ values
    y = torch.from_numpy(out[:, : size[0], : size[1], : size[2]])
    return module.proj(y)


@pytest.mark.parametrize("bias_index", ["torchvision", "exact"])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((4, 4, 4), (2, 2, 2), (0, 0, 0)),
        ((4, 4, 4), (2, 2, 2), (1, 1, 1)),
        ((5, 7, 3), (2, 4, 3), (1, 2, 1)),  # padded, one axis whole
        ((3, 3, 2), (2, 4, 4), (1, 2, 2)),  # clipped on two axes
        ((1, 1, 1), (2, 4, 4), (1, 2, 2)),
        ((1, 5, 6), (8, 3, 2), (4, 0, 1)),  # shifted on some axes only
    ],
)
def test_equals_a_loop_over_tokens(size, window, shift, bias_index):
    module = ShiftedWindowAttention3d(6, window, shift, 2, bias_index=bias_index).double().eval()
    torch.nn.init.normal_(module.relative_position_bias_table)
    torch.nn.init.normal_(module.qkv.bias)  # what pad tokens carry
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_close(module(x), token_loop(module, x), "transform_fp64")


def test_every_position_reaches_only_its_window():
    module = ShiftedWindowAttention3d(4, (2, 2, 2), (1, 1, 1), 1).double().eval()
    x = torch.randn(1, 4, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x)[0, 0, 0, 0].sum(), x)
    reached = gradient[0].abs().sum(-1).nonzero().tolist()
    assert reached == [[0, 0, 0]]  # the corner's window wraps on all axes and is masked down to it


def test_gradients_reach_table_and_projections():
    module = ShiftedWindowAttention3d(4, (2, 3, 3), (1, 1, 1), 2)
    module(torch.randn(1, 5, 7, 4, 4)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_batch_of_zero():
    module = ShiftedWindowAttention3d(4, (2, 2, 2), (1, 1, 1), 2)
    assert module(torch.zeros(0, 4, 5, 6, 4)).shape == (0, 4, 5, 6, 4)


def test_dropout_only_in_training():
    module = ShiftedWindowAttention3d(
        4, (2, 2, 2), (1, 1, 1), 2, attention_dropout=0.5, dropout=0.5
    )
    x = torch.randn(1, 4, 4, 4, 4)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((4, (2, 2), (1, 1, 1), 2), "window_size"),
        ((4, (2, 0, 2), (0, 0, 0), 2), "window_size"),
        ((4, (2, 2, 2), (-1, 0, 0), 2), "shift_size"),
        ((4, (2, 2, 2), (2, 0, 0), 2), "shift_size"),
        ((4, (2, 2, 2), (1, 1, 1), 3), "num_heads"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        ShiftedWindowAttention3d(*arguments)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"^bias_index: expected"):
        ShiftedWindowAttention3d(4, (2, 2, 2), (0, 0, 0), 2, bias_index="swin")
    module = ShiftedWindowAttention3d(4, (2, 2, 2), (0, 0, 0), 2)
    with pytest.raises(ValueError, match=r"x: expected \[B, T, H, W, 4\]; got \(1, 4, 2, 2, 2\)"):
        module(torch.zeros(1, 4, 2, 2, 2))
