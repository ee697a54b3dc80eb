"""The extension beside torch: one OpenMP runtime, torch's thread count, forked workers."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest

from sora_kernels import _native

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(sys.platform != "linux", reason="the extension has OpenMP on Linux only"),
]

HERE = str(_native.PACKAGE.parent)


@pytest.fixture(scope="module", autouse=True)
def extension():
    state = _native.status()
    if not state.ok:
        pytest.skip(state.why)
    if _native.build_info()["openmp"] is None:
        pytest.skip("the extension was built without OpenMP")


def said(result) -> list[str]:
    assert result.ok, result.text
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def observed(python_once) -> dict:
    """One process that runs torch's teams and ours, and looks at itself."""
    code = """
    import json, re, torch
    from sora_kernels import _native
    C = _native.module()
    threads = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        torch.ones(1 << 20).mul(2).sum()
        threads.append([n, _native.num_threads(), C.openmp_max_threads(), C.openmp_team_size(n)])
    maps = open("/proc/self/maps").read()
    runtimes = sorted(set(re.findall(r"\\S*/lib(?:gomp|omp|iomp5)\\b\\S*", maps)))
    print(json.dumps({"threads": threads, "runtimes": runtimes}))
    """
    return json.loads(said(python_once(code, PYTHONPATH=HERE))[-1])


def test_one_runtime_in_the_process(observed):
    """Two of them cost a factor of 8 where torch's operations and ours take turns."""
    assert len(observed["runtimes"]) == 1, observed["runtimes"]


def test_thread_count_is_torchs(observed):
    for row in observed["threads"]:
        assert len(set(row)) == 1, "asked of torch, num_threads, OpenMP's own, size of our team"


# 64 x 256 rows of work a step are enough for a team; /proc/self/task counts the process's threads.
LSTM = """
import os, torch
import sora_kernels as sk
def tasks():
    return len(os.listdir("/proc/self/task"))
module = sk.nn.LSTM(32, 256, backend="native")
x = torch.randn(8, 64, 32)
def run():
    with torch.no_grad():
        return module(x)[0]
"""


def test_lstm_starts_no_thread_beyond_torchs(python):
    code = """
    torch.set_num_threads(1)
    before = tasks()
    run()
    assert tasks() <= before, (before, tasks())
    torch.set_num_threads(3)
    torch.ones(1 << 22).mul(2)
    before = tasks()
    run()
    assert tasks() <= before, (before, tasks())
    """
    said(python(LSTM + textwrap.dedent(code), PYTHONPATH=HERE))


def test_data_loader_workers_run_the_native_op(python):
    """Workers are forked after the parent ran a team; a team in them would hang."""
    code = """
    torch.set_num_threads(2)
    torch.ones(1 << 22).mul(2)
    expected = run()
    class Clips(torch.utils.data.Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            return run()
    loader = torch.utils.data.DataLoader(Clips(), num_workers=2, multiprocessing_context="fork")
    for clip in loader:
        torch.testing.assert_close(clip[0], expected)
    """
    said(python(LSTM + textwrap.dedent(code), PYTHONPATH=HERE, timeout=60))


def test_plain_fork_runs_our_team_on_one_thread(python):
    """libgomp's threads do not survive a fork, and torch's thread count does: a team would hang."""
    code = """
    import os, torch
    from sora_kernels import _native
    C = _native.module()
    torch.set_num_threads(2)
    assert C.openmp_team_size(_native.num_threads()) == 2
    child = os.fork()
    if child == 0:
        os._exit(10 * torch.get_num_threads() + C.openmp_team_size(_native.num_threads()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 21
    assert C.openmp_team_size(_native.num_threads()) == 2
    """
    said(python(code, PYTHONPATH=HERE, timeout=60))
