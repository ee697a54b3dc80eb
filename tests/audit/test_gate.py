"""The gate: kernels compiled for sm_90 against the committed table. The compiler runs in a process
without the
interpreter; its rows are kept until a source, a config or a tool changes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from sora_kernels import _launches, audit

ARCH = "sm_90"
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.audit


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "sora_kernels.audit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.fixture(scope="module")
def rows(request, tmp_path_factory):
    for name, cure in (("triton", "pip install triton"), ("yaml", "pip install pyyaml")):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: {cure}")
    kept = getattr(request.config, "cache", None)  # not there with -p no:cacheprovider
    cache = kept.mkdir("sora_audit") if kept else tmp_path_factory.mktemp("sora_audit")
    done = run("--arch", ARCH, "--gate", "--json", "--cache", str(cache))
    if done.returncode not in (0, 1) or not done.stdout:
        pytest.fail(f"{done.args} exited with {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)[ARCH]


def kernels_of(op: str) -> set[str]:
    """Triton kernels that the operator's modules define."""
    package = importlib.import_module(f"sora_kernels.ops.{op}")
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
        if info.name.endswith("kernels")
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }


@pytest.mark.parametrize("op", ["conv3d_bn_act", "pyramid_pool"])
def test_every_kernel_was_compiled(rows, op):
    compiled = {
        name.split()[1] for found in rows.values() for name in found if name.startswith(f"{op}:")
    }
    assert compiled and compiled == kernels_of(op)


def test_no_operator_is_left_out(rows):
    """With Triton kernels."""
    gated = {
        name.partition(":")[0]
        for toolchain, found in rows.items()
        if toolchain.startswith("triton")
        for name in found
    }
    assert gated == _launches.operators().keys()


def test_no_spills(rows):
    assert [line for found in rows.values() for line in audit.spilled(found)] == []


def test_against_the_table(rows):
    table, compared = audit.table(ARCH), []
    for toolchain, found in rows.items():
        if toolchain in table:
            compared.append(toolchain)
            assert audit.regressions(found, table[toolchain]) == []
    if not any(name.startswith("triton") for name in compared):
        known = ", ".join(sorted(table))
        pytest.skip(
            f"no committed rows for {', '.join(rows)} (only for {known}): spills alone were checked"
        )


def test_the_interpreter_is_refused():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = run("--arch", ARCH, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr and "env -u TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "sm_42"), "arch: expected one of sm_80"),
        (("--arch", ARCH, "--op", "conv2d"), "op: expected one of conv3d_bn_act"),
    ],
)
def test_bad_arguments(arguments, message):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_recurrent_kernels_keep_weights_in_registers(arch):
    """The committed rows: what their speed is predicted from."""
    found = {
        name.partition(": ")[2]: row
        for toolchain, rows in audit.table(arch).items()
        if toolchain.startswith("nvcc")
        for name, row in rows.items()
        if name.startswith("lstm: lstm_resident")
    }
    assert len(found) == 150 and audit.spilled(found) == []
    plain = found["lstm_resident_fwd_kernel<BFloat16, 128, 0, 0, 0>"]
    ragged = found["lstm_resident_fwd_kernel<BFloat16, 128, 0, 0, 1>"]
    assert plain["registers"] <= 224 and plain["loop"]["total"] <= 260
    assert ragged["loop"]["total"] <= 1.15 * 420
