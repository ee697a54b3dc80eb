"""DistributedDataParallel over two gloo processes on the CPU: gradients equal the mean of both halves' own."""

from __future__ import annotations

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
    """A convolution block, windowed attention and a recurrence of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.block = sk.nn.ConvBNAct3d(3, 8, (1, 3, 3), padding=(0, 1, 1))
        self.attention = sk.nn.ShiftedWindowAttention3d(8, (2, 3, 3), (1, 1, 1), 2)
        self.lstm = sk.nn.LSTM(8, 6, batch_first=True)
        self.gru = sk.nn.GRU(6, 5, batch_first=True, bidirectional=True)
        self.rnn = sk.nn.RNN(10, 4, batch_first=True)

    def forward(self, clip):
        tokens = self.attention(self.block(clip).movedim(1, -1))
        features = tokens.mean((2, 3))
        return self.rnn(self.gru(self.lstm(features)[0])[0])[0][:, -1]


def _loss(model, clip):
    return model(clip).square().sum()


def _work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = Model()
    model.load_state_dict(torch.load(Path(folder) / "state.pt"))
    clips = torch.load(Path(folder) / "clips.pt")
    parallel = nn.parallel.DistributedDataParallel(model)
    _loss(parallel, clips[rank]).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    torch.save(grads, Path(folder) / f"grads{rank}.pt")
    dist.destroy_process_group()


def test_gradients_are_the_mean_of_both_halves(tmp_path):
    model, clips = Model(), torch.randn(2, 3, 3, 4, 6, 5)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(clips, tmp_path / "clips.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Each rank runs this file as a script: a spawned child could not import it by its test module's name.
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for clip in clips:
        (_loss(model, clip) / 2).backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"grads{rank}.pt")
        for name, p in model.named_parameters():
            assert_close(grads[name], p.grad, "composition_fp32", name=f"{name} on rank {rank}")


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
