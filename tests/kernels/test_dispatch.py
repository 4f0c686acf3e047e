import pytest
import torch
from torch.autograd import forward_ad

from strop.kernels import (
    LossSpec,
    dispatch,
    kl,
    linear_logprob,
    linear_policy_loss,
    logprob,
    multi_tensor_copy,
    native,
    policy_loss,
    rms_norm,
)
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
    monkeypatch.setenv("STROP_KERNELS", "native")
    with pytest.raises(ValueError, match=r"kl: STROP_KERNELS=native, but it has only reference, triton; .*unset it lets"):
        kl(torch.ones(2), torch.ones(2))
    monkeypatch.setenv("STROP_KERNELS", "triton")
    with pytest.raises(ValueError, match="float64"):
        rms_norm(torch.ones(2, 4).double(), torch.ones(4), 1e-6)


@pytest.fixture
def unusable(monkeypatch, tmp_path, request):
    """strop_cpu.so is there, but a file of another kind, or a library of another version."""
    path = tmp_path / "strop_cpu.so"
    if request.param == "garbage":
        path.write_bytes(b"no library")
    else:
        installed = native.FOLDER / "strop_cpu.so"
        if not installed.exists():
            pytest.skip(native.why_missing("cpu"))
        path.symlink_to(installed)
        monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native._open.cache_clear()
    yield path
    native._open.cache_clear()


UNUSABLE = pytest.mark.parametrize(
    ("unusable", "reason"),
    [("garbage", r"can't be loaded \(.*strop_cpu.so.*install strop again"),
     ("version", r"has interface \d+, this version of strop needs \d+: install strop again")],
    indirect=["unusable"],
)  # fmt: skip


@UNUSABLE
def test_a_library_that_cannot_be_used_costs_one_warning(unusable, reason):
    with pytest.warns(RuntimeWarning, match=f"{unusable}.*{reason}.*another form") as caught:
        for _ in range(2):
            assert choose("op", torch.ones(1), ALL) == "reference"
    assert len(caught) == 1


@UNUSABLE
def test_native_refuses_a_library_that_cannot_be_used(unusable, reason, monkeypatch, recwarn):
    monkeypatch.setenv("STROP_KERNELS", "native")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"op: STROP_KERNELS=native, but {unusable}.*{reason}.*=reference runs everywhere"):
            choose("op", torch.ones(1), ALL)
    assert not recwarn.list


def test_why_missing_reads_the_report(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert native.why_missing("cuda") == "strop_cuda was not built: install strop from source to build it"
    (tmp_path / "build.txt").write_text("strop_cpu: built with g++ from 1 files\nstrop_cuda: not built: no nvcc\n")
    assert native.why_missing("cuda") == "strop_cuda: not built: no nvcc"


TARGETS, MASK, ONES = torch.tensor([1, 0]), torch.ones(2, dtype=torch.bool), torch.ones(2)
FUNCTIONS = {
    "linear_logprob": lambda x: linear_logprob(x, torch.ones(3, 4), TARGETS).logprob,
    "logprob": lambda x: logprob(x, TARGETS).entropy,
    "rms_norm": lambda x: rms_norm(x, torch.ones(4), 1e-6),
    "policy_loss": lambda x: policy_loss(x[:, 0], ONES, ONES, MASK, LossSpec(aggregation="token-mean"), denominator=2).loss,
    "linear_policy_loss": lambda x: linear_policy_loss(
        x, torch.ones(3, 4), TARGETS, ONES, ONES, MASK, LossSpec(aggregation="token-mean"), denominator=2
    ).loss,
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_refused(name, requires_grad):
    """Not a zero tangent, nor none."""
    if "policy" in name and native.library("cpu") is None:
        pytest.skip("plain torch here, which has forward-mode derivatives")
    function, x = FUNCTIONS[name], torch.randn(2, 4, requires_grad=requires_grad)
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(function, (x.detach(),), (torch.ones(2, 4),))
    with forward_ad.dual_level():
        function(x)  # has no tangent
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            function(forward_ad.make_dual(x, torch.ones(2, 4)))


def test_other_functional_transforms():
    """torch's own error for func.grad; vmap calls the op for each element."""
    function, x = FUNCTIONS["linear_logprob"], torch.randn(3, 2, 4)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: function(x).sum())(x[0])
    assert torch.equal(torch.vmap(function)(x), torch.stack([function(row) for row in x]))


def test_autograd_knows_what_an_op_has_written():
    weight = torch.ones(2, 4, requires_grad=True)
    squares = weight.square().sum()
    multi_tensor_copy([torch.zeros(2, 4)], [weight.detach()])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    with torch.inference_mode():  # its tensors have no version
        destination = torch.ones(2, 4)
        multi_tensor_copy([torch.zeros(2, 4)], [destination])
    assert not destination.any()
