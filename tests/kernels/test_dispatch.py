import pytest
import torch

from strop.kernels import dispatch, native, rms_norm
from strop.kernels.dispatch import choose

ALL = ("reference", "triton", "cuda", "cpu")


class OnGpu:
    """As much of a CUDA tensor as `choose` looks at."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.delenv("STROP_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def built(monkeypatch, *libraries: str) -> None:
    monkeypatch.setattr(native, "library", lambda name: object() if f"strop_{name}" in libraries else None)


def test_device_decides(monkeypatch):
    built(monkeypatch, "strop_cuda", "strop_cpu")
    assert choose("op", torch.ones(1), ALL) == "cpu"
    assert choose("op", torch.ones(1), ("reference", "triton")) == "reference"
    assert choose("op", OnGpu(), ALL) == "cuda"
    assert choose("op", OnGpu(), ("reference", "triton")) == "triton"
    assert choose("op", OnGpu(torch.float64), ALL) == choose("op", torch.ones(1).double(), ALL) == "reference"
    assert choose("op", torch.ones(1, device="meta"), ALL) == "reference"
    monkeypatch.setenv("STROP_KERNELS", "native")
    assert choose("op", torch.ones(1), ALL) == "cpu" and choose("op", OnGpu(), ALL) == "cuda"
    monkeypatch.setenv("STROP_KERNELS", "auto")
    built(monkeypatch)
    assert choose("op", torch.ones(1), ALL) == "reference"
    assert choose("op", OnGpu(), ALL) == "triton"


def test_a_gpu_is_never_left_to_the_reference_by_accident(monkeypatch):
    built(monkeypatch)
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    with pytest.raises(RuntimeError, match="op: no kernel for cuda:0: the package triton is not installed"):
        choose("op", OnGpu(), ALL)
    assert choose("op", OnGpu(), ("reference",)) == "reference"
    monkeypatch.setenv("STROP_KERNELS", "reference")
    assert choose("op", OnGpu(), ALL) == "reference"


@pytest.mark.parametrize(
    "forced, available, message",
    [
        ("fast", ALL, "STROP_KERNELS=fast: choose from auto, reference, native, triton"),
        ("triton", ("reference",), "op: STROP_KERNELS=triton, but it has only reference"),
        ("triton", ALL, "the tensor is on the CPU .TRITON_INTERPRET=1"),
        ("native", ("reference", "cuda"), "has only reference, cuda; STROP_KERNELS=reference runs everywhere"),
        ("native", ALL, "STROP_KERNELS=native, but strop_cpu.*built"),
    ],
)
def test_the_override_is_never_ignored(monkeypatch, forced, available, message):
    built(monkeypatch)
    monkeypatch.setenv("STROP_KERNELS", forced)
    with pytest.raises(ValueError, match=message):
        choose("op", torch.ones(1), available)


def test_override_reaches_the_ops(monkeypatch):
    monkeypatch.setenv("STROP_KERNELS", "triton")
    with pytest.raises(ValueError, match="rms_norm: STROP_KERNELS=triton, but the tensor is on the CPU"):
        rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match="float64"):
        rms_norm(torch.ones(2, 4).double(), torch.ones(4), 1e-6)


def test_why_missing_reads_the_report(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert native.why_missing("cuda") == "strop_cuda was not built: install strop from source to build it"
    (tmp_path / "build.txt").write_text("strop_cpu: built with g++ from 1 files\nstrop_cuda: not built: no nvcc\n")
    assert native.why_missing("cuda") == "strop_cuda: not built: no nvcc"
