"""Fixtures: the losses as the papers print them, and kernels without a GPU (Triton in an interpreting process, CUDA
sources compiled for the CPU).

The book's losses go one sequence and one token at a time, an oracle for the vectorised ones. They are fp64 and built of min,
clamp and detach, so autograd gives the gradients; nothing is taken from the package but the names of the choices.
"""

import ctypes
import functools
import importlib.util
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strop.kernels import LossSpec, native
from strop.kernels.cuda import policy_loss as cuda_policy_loss

HERE = Path(__file__).parent
CUDA_SOURCES = HERE.parents[1] / "csrc/cuda"
# A misaligned vector access aborts the test, as it would fail on a GPU.
EMULATE = ("g++ -x c++ -std=c++17 -O1 -Wall -Wno-unknown-pragmas -fPIC -shared -DSTROP_EMULATION -U_FORTIFY_SOURCE "
           "-fsanitize=alignment,bounds,shift,signed-integer-overflow,null -fno-sanitize-recover=all")  # fmt: skip


def neighbour(name: str):
    """The module in this folder, which is not on sys.path."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where torch.compile looks for a function's globals
    spec.loader.exec_module(module)
    return module


def compile_emulation(source: Path, folder: Path) -> ctypes.CDLL:
    """A .cu file as a library that runs on the CPU."""
    library = folder / f"{source.stem}.so"
    includes = [f"-I{HERE / 'emulation'}", f"-I{CUDA_SOURCES}"]
    sources = [str(source), str(CUDA_SOURCES / "interface.cu")]
    subprocess.run([*EMULATE.split(), *includes, *sources, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@functools.cache
def source_of(function: str) -> Path:
    """The file of csrc/cuda that defines strop_cuda_<function>."""
    (source,) = (path for path in CUDA_SOURCES.glob("*.cu") if f"int strop_cuda_{function}(" in path.read_text())
    return source


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def readme_examples() -> list[str]:
    """The Python blocks of the README's "Use the kernels alone": a plain torch loop, TRL, verl."""
    section = re.search(r"^## Use the kernels alone\n(.*?)^## ", (HERE.parents[1] / "README.md").read_text(), re.M | re.S)[1]
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)


@pytest.fixture(scope="session")
def interpreted():
    """An `Interpreter`: `interpreted.check(op, *arguments, upstream=...)` compares Triton with the reference."""
    pytest.importorskip("triton")
    interpreter = neighbour("interpreter").Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session")
def make_case():
    """make_case(...): a `Case` of linear_policy_case.py, inputs of the fused policy loss and of the two ops it consists of."""
    return neighbour("linear_policy_case").Case


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """emulated_library(path of a .cu file) -> ctypes library, compiled once a session."""
    folder, libraries = tmp_path_factory.mktemp("emulated"), {}

    def load(source: Path) -> ctypes.CDLL:
        if source not in libraries:
            libraries[source] = compile_emulation(source, folder)
        return libraries[source]

    return load


@pytest.fixture(params=["forward", "backward"])
def emulated_cuda(request, emulated_library, monkeypatch):
    """Within the test strop.kernels.cuda runs csrc/cuda on CPU tensors; once with threads and blocks in the opposite order."""
    workspaces = {}

    def launch(function: str, device: torch.device, *arguments) -> None:
        library = emulated_library(source_of(function))
        library.strop_emulation_order(int(request.param == "backward"))
        native.check(library, function, getattr(library, f"strop_cuda_{function}")(*arguments, ctypes.c_void_p(None)))

    def workspace(device: torch.device, *sizes: int) -> Tensor:
        """One for all calls of the test, so that a kernel which leaves its workspace dirty fails at the next call."""
        size = emulated_library(source_of("policy_loss")).strop_cuda_policy_loss_workspace(*map(ctypes.c_int64, sizes))
        return workspaces.setdefault("policy_loss", torch.zeros(size, dtype=torch.uint8))

    monkeypatch.setattr(native, "launch", launch)
    monkeypatch.setattr(cuda_policy_loss, "workspace", workspace)


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def cpu_level(request):
    """Within the module's tests csrc/cpu runs the code for these vector instructions."""
    library = native.library("cpu")
    if library is None:
        pytest.skip(native.why_missing("cpu"))
    best, level = library.strop_cpu_level(), ("baseline", "avx2", "avx512").index(request.param)
    if library.strop_cpu_set_level(level):
        pytest.skip(f"this CPU has no {request.param}")
    assert library.strop_cpu_level() == level
    yield request.param
    library.strop_cpu_set_level(best)


@pytest.fixture
def cuda_library():
    """The compiled csrc/cuda of this installation, for tests on a GPU."""
    if native.library("cuda") is None:
        pytest.skip(native.why_missing("cuda"))
    return native.library("cuda")


CLIPS = {"clip": (0.2, 0.2), "gspo": (3e-4, 4e-4), "gspo-token": (3e-4, 4e-4), "gmpo": (0.4, 0.4), "cispo": (math.inf, None)}
WEIGHT_BOUNDS = {"tis": (0, 2), "icepop": (0.5, 5), "sequence-truncate": (0, 3), "sequence-mask": (0, 3), "mean-mask": None}


@pytest.fixture(scope="session")
def book_loss() -> Callable[..., Tensor]:
    """`book_loss(spec, logprob, old, advantages, mask, boundaries, denominator, rollout=, ref=, entropy=)` -> loss."""
    return _book_loss


def _book_loss(
    spec: LossSpec,
    logprob: Tensor,
    old: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    boundaries: list[int],
    denominator: float,
    rollout: Tensor | None = None,
    ref: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Tensor:
    loss = logprob.new_zeros(())
    for start, stop in itertools.pairwise(boundaries):
        tokens = [t for t in range(start, stop) if mask[t]]
        if not tokens:
            continue
        lp, a = logprob[tokens], advantages[tokens]
        behaviour = lp.detach() if old is None else old[tokens]
        difference = lp - behaviour
        if spec.log_ratio_limit is not None:
            difference = difference.clamp(-spec.log_ratio_limit, spec.log_ratio_limit)
        weight = torch.ones_like(lp)
        if spec.correction != "none":
            weight = rollout_weight(spec, behaviour - rollout[tokens])
        terms = policy_terms(spec, lp, difference, a, weight)
        if spec.policy != "vespo":
            terms = terms * weight
        if spec.opsm_delta is not None and (rollout[tokens] - lp.detach()).mean() > spec.opsm_delta:
            terms = torch.where(a < 0, torch.zeros_like(terms), terms)
        if spec.kl_coef:
            terms = terms + spec.kl_coef * kl_terms(spec, lp, ref[tokens], difference.exp())
        if spec.entropy_coef:
            terms = terms - spec.entropy_coef * entropy[tokens]
        loss = loss + (terms.mean() if spec.aggregation == "sequence-mean" else terms.sum()) / denominator
    return loss


def rollout_weight(spec: LossSpec, gap: Tensor) -> Tensor:
    low, high = WEIGHT_BOUNDS[spec.correction] or (None, None)
    low = low if spec.correction_low is None else spec.correction_low
    high = high if spec.correction_high is None else spec.correction_high
    token, sequence = gap.exp(), gap.sum().exp() * torch.ones_like(gap)
    match spec.correction:
        case "tis":
            return token.clamp(low, high)
        case "icepop":
            return token * ((token >= low) & (token <= high))
        case "mean-mask":
            return token * (low <= gap.mean().exp() <= high)
        case "sequence-truncate":
            return sequence.clamp(low, high)
        case "sequence-mask":
            return sequence * ((sequence >= low) & (sequence <= high))


def policy_terms(spec: LossSpec, lp: Tensor, difference: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    low, high = CLIPS.get(spec.policy, (None, None))
    low = low if spec.clip_low is None else spec.clip_low
    high = high if spec.clip_high is None else spec.clip_high

    def clip_objective(ratio: Tensor) -> Tensor:
        unclipped = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
        objective = torch.min(unclipped * a, ratio.clamp(1 - low, 1 + high) * a)
        if spec.dual_clip is not None:
            objective = torch.where(a < 0, torch.max(objective, spec.dual_clip * a), objective)
        return -objective

    ratio = difference.exp()
    match spec.policy:
        case "clip":
            return clip_objective(ratio)
        case "gspo":
            return clip_objective(difference.mean().exp() * torch.ones_like(a))
        case "gspo-token":
            return clip_objective(difference.mean().exp().detach() * (difference - difference.detach()).exp())
        case "gmpo":
            sign = torch.where(a > 0, 1.0, -1.0)
            bounded = torch.minimum(sign * difference, torch.where(a > 0, torch.full_like(a, high), torch.full_like(a, low)))
            return -a * (sign * bounded).mean().exp()
        case "cispo":
            bounds = (0, high) if spec.cispo_bound == "ratio" else (1 - low, 1 + high)
            return -ratio.clamp(*bounds).detach() * a * lp
        case "sapo":
            tau = torch.full_like(a, spec.sapo_tau_negative).masked_fill(a > 0, spec.sapo_tau_positive)
            return -a * 4 / tau * torch.sigmoid(tau * (ratio - 1))
        case "vespo":
            log_w = difference.detach().clamp(-20, 20).sum() + weight.log().clamp(math.log(1e-8), 20).sum()
            log_w = log_w.clamp(math.log(1e-8), 20)
            k = torch.where(a >= 0, spec.vespo_positive[0], spec.vespo_negative[0])
            decay = torch.where(a >= 0, spec.vespo_positive[1], spec.vespo_negative[1])
            return -(decay + k * log_w - decay * log_w.exp()).exp() * a * lp
        case "reinforce":
            return -a * lp


def kl_terms(spec: LossSpec, lp: Tensor, ref: Tensor, ratio: Tensor) -> Tensor:
    d = ref - lp
    value = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[spec.kl_estimator]
    if spec.kl_gradient == "unbiased":
        return ratio * value
    if spec.kl_gradient == "straight-through":
        return value.detach() + (d**2 / 2 - (d**2 / 2).detach())
    return value
