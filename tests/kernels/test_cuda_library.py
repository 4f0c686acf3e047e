"""csrc/cuda built as setup.py builds it: one library that a machine without a GPU can load, and whose launches fail there."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from strop.kernels import LossSpec, native, native_structs
from strop.kernels.loss_code import encode

SOURCES = sorted((Path(__file__).parents[2] / "csrc/cuda").glob("*.cu"))
NULL = ctypes.c_void_p(None)


@pytest.mark.aot
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would read addresses of host memory")
def test_a_launch_without_a_gpu_is_an_error(tmp_path, monkeypatch):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH: csrc/cuda cannot be compiled here")
    flags = "-std=c++17 -gencode arch=compute_90a,code=sm_90a -cudart static -Xcompiler -fPIC -shared --threads 2"
    command = ["nvcc", *flags.split(), *map(str, SOURCES), "-o", str(tmp_path / "strop_cuda.so")]
    subprocess.run(command, check=True)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native._open.cache_clear()
    library = native.library("cuda")
    native._open.cache_clear()

    logits, targets = torch.randn(4, 100), torch.zeros(4, dtype=torch.int64)
    rows = native_structs.logit_rows(
        logits, targets, inverse_temperature=1.0, softcap=None, bias_V=None, keep_mask_NV=None
    )
    tokens = native_structs.loss_tokens(
        logits[0], None, logits[1], logits[0] > 0, None, None, None, torch.tensor([0, 100]), None, torch.tensor(1.0)
    )
    code = native_structs.FlatLossCode(*encode(LossSpec()))
    out = native_structs.address(logits)
    calls = {
        "logit_statistics": (ctypes.byref(rows), ctypes.c_int(0), out),
        "logit_gradient": (ctypes.byref(rows), *[out] * 3, *[NULL] * 3, out, ctypes.c_int(1), ctypes.c_int64(100)),
        "policy_loss": (ctypes.byref(tokens), ctypes.byref(code), out, out, out, NULL, out),
    }
    for function, arguments in calls.items():
        status = getattr(library, f"strop_cuda_{function}")(*arguments, NULL)
        with pytest.raises(RuntimeError, match=f"strop_cuda_{function} failed with status 3, CUDA error [1-9]"):
            native.check(library, function, status)
