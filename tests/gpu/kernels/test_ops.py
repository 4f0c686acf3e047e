"""Every public op on a GPU: the fp64 reference's values and gradients, one graph under torch.compile, no wait for the host,
and the same under CUDA-graph replay."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from strop.kernels import (
    AdvantageSpec,
    LossSpec,
    expert_order,
    group_advantage,
    kl,
    linear_logprob,
    linear_policy_loss,
    logprob,
    moe_permute,
    moe_unpermute,
    multi_tensor_copy,
    policy_loss,
    quantize_fp8,
    rms_norm,
    rope,
    swiglu,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest ||got - expected|| / ||expected||. bf16 results are rounded by 2^-9 each, gradients of logits once more before they
are multiplied; inputs are rounded beforehand, for the reference too."""

T, V, H = 300, 517, 96
LENGTHS = (70, 1, 0, 129, 87)
"""Of packed sequences; 13 padding tokens follow."""

Tensors = dict[str, Tensor]


class Case(NamedTuple):
    make: Callable[[], Tensors]
    """Inputs on the CPU, floats in fp32."""
    call: Callable[..., Tensors]
    trained: tuple[str, ...] = ()
    """Inputs that get gradients."""
    wide: tuple[str, ...] = ()
    """Inputs that stay fp32 where the others are bf16."""


def head_inputs() -> Tensors:
    hidden, weight = torch.randn(T, H), torch.randn(V, H) / H**0.5 * 3
    targets = torch.randint(V, (T,))
    targets[::17] = -100
    return {"hidden": hidden, "weight": weight, "targets": targets}


def row_options() -> Tensors:
    keep = torch.rand(T, V) < 0.7
    keep[:, 0] = True
    return {"temperature": 0.5 + torch.rand(T), "keep_mask": keep}


def named(result: tuple) -> Tensors:
    return dict(result._asdict())


def token_inputs() -> Tensors:
    lp = -3 * torch.rand(T)
    return {
        "logprob": lp, "old_logprob": lp + 0.3 * torch.randn(T), "ref_logprob": lp + 0.3 * torch.randn(T),
        "rollout_logprob": lp + 0.3 * torch.randn(T), "entropy": 4 * torch.rand(T), "advantages": torch.randn(T),
        "mask": torch.rand(T) < 0.8, "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0),
    }  # fmt: skip


TOKENS = ("old_logprob", "ref_logprob", "rollout_logprob", "advantages")
SPECS = {
    "default": LossSpec(),
    "everything": LossSpec(correction="tis", kl_coef=0.1, kl_gradient="unbiased", entropy_coef=0.02, opsm_delta=0.1),
    "gspo": LossSpec(policy="gspo", clip_low=0.05, clip_high=0.05, aggregation="token-mean"),
}

ADVANTAGE = AdvantageSpec()


def loss_case(spec: LossSpec) -> Case:
    def call(logprob, old_logprob, advantages, mask, **options):
        return named(policy_loss(logprob, old_logprob, advantages, mask, spec, denominator=7.0, **options))

    return Case(token_inputs, call, ("logprob", "entropy"), ("logprob", "entropy", *TOKENS))


def fused_case(spec: LossSpec) -> Case:
    def make() -> Tensors:
        tokens = token_inputs()
        del tokens["logprob"], tokens["entropy"]
        hidden = head_inputs()
        hidden["targets"].clamp_(min=0)
        near = torch.log_softmax(hidden["hidden"] @ hidden["weight"].T, -1).gather(1, hidden["targets"][:, None]).squeeze(1)
        for name in TOKENS[:3]:
            tokens[name] = near + 0.1 * torch.randn(T)
        return hidden | tokens

    def call(hidden, weight, targets, old_logprob, advantages, mask, **options):
        options["denominator"] = 7.0
        return named(linear_policy_loss(hidden, weight, targets, old_logprob, advantages, mask, spec, **options))

    return Case(make, call, ("hidden", "weight"), TOKENS)


def moe_inputs() -> Tensors:
    ids = torch.rand(T, 16).topk(4).indices
    ids[5, 1] = -1
    return {"hidden": torch.randn(T, H), "ids": ids, "weights": torch.rand(T, 4)}


def permute(hidden, ids, weights):
    order = expert_order(ids, 16, 8)
    rows = moe_permute(hidden, order)
    return named(order) | {"permuted": rows, "unpermuted": moe_unpermute(rows, order, weights)}


def copied(**sources):
    targets = {name: torch.empty_like(source, dtype=torch.bfloat16) for name, source in sources.items()}
    multi_tensor_copy(list(sources.values()), list(targets.values()))
    return targets


def rotary_inputs() -> Tensors:
    angles = torch.rand(400, 16) * 6
    return {"x": torch.randn(T, 5, 32), "cos": angles.cos(), "sin": angles.sin(), "positions": torch.randint(400, (T,))}


def in_place(logits, targets):
    """Its backward writes over the logits, so it works on a copy."""
    return named(logprob(logits * 1, targets, inplace_backward=True))


CASES = {
    "linear_logprob": Case(head_inputs, lambda **x: named(linear_logprob(**x)), ("hidden", "weight")),
    "linear_logprob with options": Case(
        lambda: head_inputs() | row_options() | {"bias": torch.randn(V)},
        lambda **x: named(linear_logprob(**x, softcap=8.0)), ("hidden", "weight", "bias"), ("temperature",),
    ),
    "logprob": Case(
        lambda: {"logits": 3 * torch.randn(T, V), "targets": head_inputs()["targets"]} | row_options(),
        lambda **x: named(logprob(**x)), ("logits",), ("temperature",),
    ),
    "logprob in place": Case(
        lambda: {"logits": 3 * torch.randn(T, V), "targets": head_inputs()["targets"]}, in_place, ("logits",)
    ),
    **{f"policy_loss {name}": loss_case(spec) for name, spec in SPECS.items()},
    **{f"linear_policy_loss {name}": fused_case(spec) for name, spec in SPECS.items()},
    "kl": Case(
        lambda: {name: token_inputs()[name] for name in ("logprob", "ref_logprob", "old_logprob")},
        lambda **x: {"kl": kl(**x, gradient="unbiased")}, ("logprob",), ("logprob", "ref_logprob", "old_logprob"),
    ),
    "group_advantage": Case(
        lambda: {"rewards": torch.randint(3, (T,)).float(), "group_index": torch.randint(T // 8, (T,))},
        lambda **x: named(group_advantage(**x, spec=ADVANTAGE)), (), ("rewards",),
    ),
    "rms_norm": Case(
        lambda: {"x": torch.randn(T, H), "weight": torch.randn(H)}, lambda **x: {"y": rms_norm(**x, eps=1e-6)}, ("x", "weight")
    ),
    "swiglu": Case(
        lambda: {"gate": torch.randn(T, H), "up": torch.randn(T, H)}, lambda **x: {"y": swiglu(**x)}, ("gate", "up")
    ),
    "rope": Case(rotary_inputs, lambda **x: {"y": rope(**x)}, ("x",), ("cos", "sin")),
    "moe": Case(moe_inputs, permute, ("hidden", "weights")),
    "quantize_fp8": Case(
        lambda: {"x": torch.randn(T, 260)}, lambda x: dict(zip(("q", "scale"), quantize_fp8(x), strict=True)),
    ),
    "multi_tensor_copy": Case(lambda: {"a": torch.randn(T, H), "b": torch.randn(H, T).T, "c": torch.randn(7)}, copied),
}  # fmt: skip
ONLY_FP32 = ("policy_loss", "kl", "group_advantage")
BOTH = [
    pytest.param(case, dtype, id=f"{name}, {str(dtype).removeprefix('torch.')}")
    for name, case in CASES.items() for dtype in TOLERANCES
    if dtype == torch.float32 or not name.startswith(ONLY_FP32)
]  # fmt: skip
EACH = [pytest.param(case, id=name) for name, case in CASES.items()]


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    made = case.make()
    return {n: x.to(dtype) if x.is_floating_point() and n not in case.wide else x for n, x in made.items()}


def on_device(case: Case, tensors: Tensors) -> Tensors:
    return {name: tensor.to(DEVICE).requires_grad_(name in case.trained) for name, tensor in tensors.items()}


def run(case: Case, tensors: Tensors, call: Callable[..., Tensors] | None = None) -> Tensors:
    """Outputs, and gradients for upstream ones that differ from element to element."""
    outputs = (call or case.call)(**tensors)
    differentiable = [output for output in outputs.values() if output.requires_grad]
    if not differentiable:
        return outputs
    upstream = [torch.arange(1, 1 + o.numel(), device=o.device).sin().view(o.shape).to(o.dtype) for o in differentiable]
    leaves = [tensors[name] for name in case.trained]
    gradients = zip(case.trained, torch.autograd.grad(differentiable, leaves, upstream, allow_unused=True), strict=True)
    return outputs | {f"d_{name}": gradient for name, gradient in gradients if gradient is not None}


def assert_close(got: Tensors, expected: Tensors, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        have = got[name].detach().cpu()
        if not want.is_floating_point():
            assert torch.equal(have, want.cpu()), name
            continue
        have, want = have.double(), want.detach().double().cpu()
        assert torch.equal(have.isfinite(), want.isfinite()), f"{name}: finite in different places"
        finite = want.isfinite()
        off = float((have - want)[finite].norm() / want[finite].norm().clamp(min=1e-30))
        assert off <= tolerance, f"{name} {tuple(want.shape)}: off by {off:.2e}, allowed {tolerance:g}"


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("case", "dtype"), BOTH)
def test_equals_the_reference_in_fp64(monkeypatch, case, dtype):
    given = inputs(case, dtype)
    got = run(case, on_device(case, given))
    monkeypatch.setenv("STROP_KERNELS", "reference")
    wide = {n: x.double().requires_grad_(n in case.trained) if x.is_floating_point() else x for n, x in given.items()}
    assert_close(got, run(case, wide), TOLERANCES[dtype])


@pytest.mark.parametrize("case", EACH)
def test_is_one_graph_for_torch_compile(case):
    given = on_device(case, inputs(case, torch.float32))
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    assert_close(run(case, given, compiled), run(case, given), 1e-6)


def test_inductor_keeps_its_numbers_in_fp32():
    """It may hand a Python float to a kernel as fp64."""
    for name in ("policy_loss everything", "linear_policy_loss default"):
        case = CASES[name]
        given = on_device(case, inputs(case, torch.float32))
        assert_close(run(case, given, torch.compile(case.call, fullgraph=True)), run(case, given), 1e-5)


@pytest.mark.parametrize("case", EACH)
def test_never_waits_for_the_device(case):
    given = on_device(case, inputs(case, torch.float32))
    run(case, given)  # compiles kernels, which may wait
    with waiting_is_an_error():
        run(case, given)


@pytest.mark.parametrize("case", EACH)
def test_replays_in_a_cuda_graph(case):
    """With other inputs in the same places than at the capture."""
    given = on_device(case, inputs(case, torch.float32))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(case, given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, given)
    fresh = inputs(case, torch.float32, seed=1)
    with torch.no_grad():
        for name, tensor in given.items():
            tensor.copy_(fresh[name])
    graph.replay()
    assert_close(captured, run(case, given), 1e-6)
