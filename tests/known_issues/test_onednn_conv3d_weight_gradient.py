"""oneDNN's weight gradient of a Conv3d whose padded kernel is no shorter than an axis (7 frames, 7 taps, stride 2,
padding 3; in bf16 one frame, 3 taps, padding 2): garbage, NaN, or a write past the gradient that kills the process.
Ours is right.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import sora_kernels as sk
from sora_kernels.testing import assert_close, assert_within_2x

STOCK = """
import sys, torch, torch.nn.functional as F
torch.manual_seed(0)
x, w = torch.randn(2, 3, int(sys.argv[1]), 8, 8), torch.randn(16, 3, 7, 7, 7)
grads = []
for dtype in (torch.float32, torch.float64):
    leaf = w.to(dtype).requires_grad_()
    y = F.conv3d(x.to(dtype), leaf, None, 2, 3)
    grads.append(torch.autograd.grad(y.sum(), leaf)[0].double())
off = ((grads[0] - grads[1]).abs().max() / grads[1].abs().max()).item()
print("right" if off < 1e-3 else "wrong", off)
"""


@pytest.mark.parametrize("frames", [5, 6, 7])
def test_stock_in_a_process_of_its_own(frames):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(frames)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0 and done.stdout.startswith("right"):
        pytest.skip("this torch on this CPU gets it right")
    assert done.returncode or done.stdout.startswith("wrong")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", [7, 9])
@pytest.mark.parametrize("frames", [4, 5, 6, 7, 8, 9])
def test_ours(frames, kernel, channels_last):
    x, w = torch.randn(2, 3, frames, 8, 8), torch.randn(16, 3, kernel, kernel, kernel)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        y = sk.conv3d_act(*leaves, stride=2, padding=kernel // 2, activation=None)
        dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        found.append(torch.autograd.grad(y, leaves, dy.to(dtype)))
    for ours, true in zip(*found, strict=True):
        assert_close(ours, true.float(), "composition_fp32")


@pytest.mark.parametrize(("frames", "kernel"), [(1, (3, 5, 1)), (2, (4, 5, 5))])
def test_ours_in_bf16(frames, kernel):
    x, w = torch.randn(3, 2, frames, 8, 7).bfloat16(), torch.randn(5, 2, *kernel).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = w.to(dtype).requires_grad_()
        y = sk.conv3d_act(x.to(dtype), leaf, padding=(2, 1, 0), activation=None)
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16().to(dtype)
        found.append(torch.autograd.grad(y, leaf, dy)[0])
    assert_within_2x(found[0], found[1].bfloat16(), found[1])
