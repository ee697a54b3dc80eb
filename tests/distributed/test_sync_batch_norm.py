"""Batch statistics over two gloo processes: equal to those of the whole batch in one, outputs and every gradient."""

from __future__ import annotations

import copy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sora_kernels as sk
from sora_kernels.testing import assert_close

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch is built without distributed"
)


class Model(nn.Module):
    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.first = sk.nn.ConvBNAct3d(3, 6, 3, padding=1, activation="silu", backend=backend)
        self.second = sk.nn.ConvBNAct3d(6, 6, 1, momentum=None, backend=backend)
        self.up = sk.nn.ConvTransposeBNAct3d(6, 4, 2, stride=2, backend=backend)

    def forward(self, clip):
        z = self.first(clip)
        return self.up(self.second(z, residual=z))


def _work(rank: int, port: int, folder: Path, backend: str | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = Model(backend)
    model.load_state_dict(torch.load(folder / "state.pt"))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model.first, sk.nn.ConvBNAct3d) and isinstance(
        model.first.bn, nn.SyncBatchNorm
    )
    clips, weights = (torch.load(folder / f"{name}.pt")[rank] for name in ("clips", "weights"))
    clips.requires_grad_()
    out = model(clips)
    (out * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    torch.save((out.detach(), clips.grad, found, model.state_dict()), folder / f"found{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("sizes", "backend"),
    [
        ((3, 1), "torch"),
        pytest.param((3, 1), "hybrid", marks=pytest.mark.triton),
        ((0, 2), "torch"),
    ],
)
def test_two_ranks_equal_the_whole_batch(tmp_path, sizes, backend):
    """Batches of different sizes, and none at all on one rank."""
    model = Model(None)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    clips = torch.randn(sum(sizes), 3, 2, 4, 3)
    weights = torch.randn(sum(sizes), 4, 4, 8, 6)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(clips.split(sizes), tmp_path / "clips.pt")
    torch.save(weights.split(sizes), tmp_path / "weights.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port), str(tmp_path), backend],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    whole = copy.deepcopy(model)
    clips.requires_grad_()
    out = whole(clips)
    (out * weights).sum().backward()
    found = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    assert_close(torch.cat([f[0] for f in found]), out.detach(), "composition_fp32", name="out")
    assert_close(torch.cat([f[1] for f in found]), clips.grad, "composition_fp32", name="clips")
    for name, p in whole.named_parameters():
        summed = found[0][2][name] + found[1][2][name]
        assert_close(summed, p.grad, "composition_fp32", name=name)
    for _, _, _, state in found:
        for name, value in whole.state_dict().items():
            assert_close(state[name], value, "composition_fp32", name=name)


def test_a_group_of_one_is_nobody_to_share_with(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, weight = torch.randn(2, 3, 2, 4, 4, requires_grad=True), torch.randn(4, 3, 1, 1, 1)
        shared, alone = (
            sk.conv3d_bn_act(x, weight, None, None, None, None, process_group=group)
            for group in (dist.group.WORLD, None)
        )
        assert torch.equal(shared, alone)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] or None)
