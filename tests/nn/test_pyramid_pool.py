"""``nn.PyramidPool3d``: the module around ``pyramid_pool3d``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sora_kernels as sk
from sora_kernels.testing import assert_close

LEVELS = (1, (2, 3, 2), 4)


@pytest.mark.parametrize("mode", ["max", "avg", "maxavg"])
@pytest.mark.parametrize("output", ["flat", "maps"])
def test_is_the_function(mode, output):
    x, valid_size = torch.randn(2, 3, 4, 5, 6), torch.tensor([[4, 2, 6], [1, 5, 3]])
    options = {"mode": mode, "output": output}
    pool = sk.nn.PyramidPool3d(LEVELS, **options)
    for given in (None, valid_size):
        ours = pool(x, given)
        want = sk.pyramid_pool3d(x, LEVELS, valid_size=given, **options)
        for a, b in zip(ours, want, strict=True):
            assert torch.equal(a, b)
    if output == "flat":
        assert pool(x).shape == (2, pool.out_features(3))


def test_has_no_state_and_says_what_it_is():
    pool = sk.nn.PyramidPool3d((1, (None, 2, 2)), output="maps", backend="torch")
    assert not pool.state_dict() and not list(pool.parameters())
    assert pool.levels == ((1, 1, 1), (None, 2, 2))
    assert repr(pool) == (
        "PyramidPool3d(levels=((1, 1, 1), (None, 2, 2)), mode='max', output='maps', "
        "data_format='NCDHW', backend='torch')"
    )
    again = pickle.loads(pickle.dumps(pool))
    assert repr(again) == repr(copy.deepcopy(pool)) == repr(pool)


def test_out_features():
    assert sk.nn.PyramidPool3d((1, 2, 4)).out_features(96) == 96 * 73
    assert sk.nn.PyramidPool3d((1, 2, 4), mode="maxavg").out_features(96) == 2 * 96 * 73
    with pytest.raises(ValueError, match=r"numbers of bins, got \(None, 2, 2\)"):
        sk.nn.PyramidPool3d(((None, 2, 2),), output="maps").out_features(96)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "sum"}, "mode must be one of"),
        ({"output": "list"}, "output must be one of"),
        ({"data_format": "NHWC"}, "data_format must be one of"),
        ({"levels": (0,)}, "each level must be a positive int"),
        ({"levels": ((None, 1, 1),)}, "None keeps an axis whole"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
)
def test_bad_arguments_raise_when_it_is_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        sk.nn.PyramidPool3d(arguments.pop("levels", (1, 2)), **arguments)


def test_compiles_for_any_clip():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    head = nn.Sequential(sk.nn.PyramidPool3d((1, 2)), nn.Linear(27, 4))
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend=count)
    for sizes in ((4, 5, 6), (7, 3, 9)):
        x = torch.randn(2, 3, *sizes)
        assert_close(compiled(x), head(x), "composition_fp32")
    assert len(graphs) == 1
