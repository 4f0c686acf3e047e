"""Every kernel compiled for an H100 (sm_90a) on a machine without one, and the limits that the compiler lets pass.

STROP_AOT_PYTHON=<interpreter> compiles the Triton kernels with another environment's triton, for example the oldest that is
supported: python -m venv old; old/bin/pip install torch==2.11.0 triton==3.6.0 'numpy<2.4' . ; then
STROP_AOT_PYTHON=old/bin/python pytest -m aot
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot
HERE = Path(__file__).parent
SOURCES = sorted((HERE.parents[1] / "csrc/cuda").glob("*.cu")) + sorted((HERE / "emulation").glob("*.cu"))
MAX_SHARED = 232_448
"""Bytes of shared memory that a block can have on sm_90."""
COLUMNS = ("kernel", "label", "warps", "registers", "shared", "stack", "spills")


def show(kernels: list[dict], capsys) -> None:
    """The table of registers and shared memory, past pytest's capture."""
    rows = [COLUMNS, *(tuple(str(kernel.get(column, "")) for column in COLUMNS) for kernel in kernels)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    with capsys.disabled():
        print()
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def faults(kernel: dict) -> list[str]:
    found = {
        "spills registers": kernel["spills"] or kernel["stack"],
        f"takes {kernel['shared']} bytes of shared memory, more than {MAX_SHARED}": kernel["shared"] > MAX_SHARED,
        "computes in float64": kernel["f64"],
        "multiplies matrices without wgmma": kernel.get("needs_wgmma") and not kernel["wgmma"],
    }
    return [f"{kernel['kernel']} {kernel.get('label', '')} {what}" for what, is_so in found.items() if is_so]


def test_triton_kernels(capsys):
    python = os.environ.get("STROP_AOT_PYTHON")
    if python is None:
        pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [python or sys.executable, str(HERE / "aot_compile.py")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    missing = [kernel for kernel in kernels if "missing" in kernel]
    assert not missing
    show(kernels, capsys)
    assert done.returncode == 0, "aot_compile.py failed; its traceback is above"
    assert kernels
    assert not [fault for kernel in kernels for fault in faults(kernel)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_cuda_sources(source, tmp_path, capsys):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH: csrc/cuda cannot be compiled here")
    flags = "-std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Xptxas -v --keep -cubin -o out.cubin"
    command = ["nvcc", *flags.split(), f"-I{HERE.parents[1] / 'csrc/cuda'}", str(source)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (ptx,) = tmp_path.glob("*.ptx")
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), flags=re.DOTALL))
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)", done.stderr, flags=re.DOTALL,
    )  # fmt: skip
    assert {name for name, *_ in report} == set(bodies)
    kernels = [
        {"kernel": readable(name), "label": source.name, "registers": int(registers), "stack": int(stack),
         "spills": int(stores) + int(loads),
         "shared": int((re.search(r"(\d+) bytes smem", rest) or [0, 0])[1]), "f64": ".f64" in bodies[name], "wgmma": False}
        for name, stack, stores, loads, registers, rest in report
    ]  # fmt: skip
    show(kernels, capsys)
    assert not [fault for kernel in kernels for fault in faults(kernel)]


def readable(mangled: str) -> str:
    """name_kernel<template arguments>."""
    declaration = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    return re.search(r"\w+_kernel(<.*?>)?(?=\()", declaration)[0]
