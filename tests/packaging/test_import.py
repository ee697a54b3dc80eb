"""``import sora_kernels`` loads no kernel, touches no device and is quick."""

from __future__ import annotations

import compileall
import shutil

from sora_kernels import _native

HERE = str(_native.PACKAGE.parent)


def test_import_is_quick_touches_no_device_and_loads_no_kernel(python, tmp_path):
    # Compiled to bytecode, as pip leaves it.
    package = shutil.copytree(_native.PACKAGE, tmp_path / "sora_kernels")
    assert compileall.compile_dir(package, quiet=1)
    code = """
    import sys, time
    start = time.process_time()
    import torch
    of_torch = time.process_time() - start
    def touched(*args, **kwargs):
        raise AssertionError("the import touched a device")
    for name in ("_lazy_init", "is_available", "device_count", "current_device", "init",
                 "get_device_capability", "get_device_properties", "current_stream"):
        setattr(torch.cuda, name, touched)
    before = set(sys.modules)
    start = time.process_time()
    import sora_kernels
    own = time.process_time() - start
    new = set(sys.modules) - before
    kernels = [m for m in new if m.split(".")[0] == "triton" or m.endswith((".kernels", "._C"))]
    assert not kernels, kernels
    assert not torch.cuda.is_initialized()
    print(own / of_torch)
    """
    shares = []
    for _ in range(3):
        result = python(code, PYTHONPATH=str(tmp_path))
        assert result.ok, result.text
        shares.append(float(result.stdout))
    assert min(shares) < 0.08, shares  # of the time that torch takes, however fast the machine is


def test_works_without_triton_and_extension(python, tmp_path):
    """Where an import of either fails; the shipped data is found from any folder."""
    code = """
    import sys
    sys.modules["triton"] = sys.modules["sora_kernels._C"] = None
    import torch, sora_kernels
    from sora_kernels import info
    report = info.collect()
    assert report["versions"]["triton"].startswith("not usable"), report["versions"]
    assert "conv3d_bn_act" in report["tuned configs"]
    assert "does not load" in sora_kernels._native.status().why
    x, weight = torch.randn(2, 3, 4, 5, 6), torch.randn(8, 3, 3, 3, 3)
    ones, zeros = torch.ones(8), torch.zeros(8)
    y = sora_kernels.conv3d_bn_act(x, weight, ones, zeros, zeros, ones, padding=1)
    assert y.shape == (2, 8, 4, 5, 6) and y.min() == 0
    """
    result = python(code, PYTHONPATH=HERE)
    assert result.ok, result.text
