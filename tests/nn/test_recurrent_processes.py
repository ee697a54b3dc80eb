"""``sk.nn.LSTM``, ``GRU`` and ``RNN`` in forked workers and in several threads at once."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset


@pytest.fixture
def two_threads():
    was = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(was)


class Embedded(Dataset):
    """Items that the module itself computes, in the worker."""

    def __init__(self, module, clips) -> None:
        self.module, self.clips = module, clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> torch.Tensor:
        clip = self.clips[index].clone().requires_grad_()
        y = self.module(clip)[0]
        (gradient,) = torch.autograd.grad(y.square().sum(), clip)
        return torch.cat((y.detach().flatten(), gradient.flatten()))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_in_a_forked_worker_after_use_in_the_parent(kind, two_threads):
    module = kind.ours(16, 32, bidirectional=True, **kind.fixed)
    clips = torch.randn(4, 20, 8, 16)
    items = Embedded(module, clips)
    wanted = torch.stack([items[k] for k in range(len(items))])  # starts the parent's own team
    loader = DataLoader(
        items, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    found = torch.cat(list(loader))
    kind.assert_same(found, wanted, "composition_fp32")


def test_threads_at_once(kind, two_threads):
    """Each its own module and the shared one, forward and backward: as alone, bit for bit."""
    shared = kind.ours(16, 32, **kind.fixed)
    own = [kind.ours(16, 32, **kind.fixed) for _ in range(2)]
    clips = [torch.randn(30, 4, 16) for _ in range(2)]

    def work(k: int) -> list[torch.Tensor]:
        x = clips[k].clone().requires_grad_()
        y, z = own[k](x)[0], shared(x)[0]
        return [y.detach(), z.detach(), *torch.autograd.grad((y * z).sum(), x)]

    alone = [work(k) for k in range(2)]
    wrong: list[str] = []
    start = threading.Barrier(2)

    def repeat(k: int) -> None:
        try:
            torch.set_num_threads(2)  # a thread starts with its own count
            start.wait()
            for turn in range(40):
                if not all(map(torch.equal, work(k), alone[k])):
                    wrong.append(f"thread {k}, turn {turn}")
        except Exception as e:
            wrong.append(repr(e))

    threads = [threading.Thread(target=repeat, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
