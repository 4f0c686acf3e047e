"""Sections of the planner's benchmark below a step: FLOPs, DeepSeek-V3's step in parts and overlapped layers, one MoE layer."""

import math
from collections.abc import Iterable
from dataclasses import replace

from planner_rows import ROWS
from planner_table import Compared, Section
from planner_training_row import planned

from strop.engine.plan.collectives import BESIDE_COMPUTE_FRACTION
from strop.engine.plan.devices import device_named
from strop.engine.plan.facts import active_parameters, total_parameters, train_flops_per_token
from strop.engine.plan.layer_exchange import DISPATCHER_MULTIPROCESSORS, contention_share, layer_exchanges
from strop.engine.plan.layer_time import Work, layer_operations
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun
from strop.engine.plan.schedules import StageSeconds, pair_seconds
from strop.engine.plan.shape import ModelShape, MoeShape
from strop.engine.plan.timeline import Slot, dualpipe
from strop.engine.plan.training import NOTHING, chunk_times, layer_pass, pipeline_of, train_step

FLOPS_TARGET, PARTS_TARGET = 0.01, 0.20
(DEEPSEEK_2048,) = (row.run for row in ROWS if row.family == "deepseek deepseek-v3")


def flops_section() -> Section:
    """Model FLOPs and parameters: published TFLOPS over published tokens/s, counts of model cards."""
    shape = SHAPES["deepseek-v3"]
    bridge = "Megatron-Bridge docs/performance-summary-archive.md"
    figures = (
        ("Llama3-8B, seq 8192", "llama3-8b", 8192, True, False, 744e3 / 14451, f"{bridge} 25.11"),
        ("Llama3.1-405B, seq 8192", "llama3.1-405b", 8192, True, False, 827e3 / 328, f"{bridge} 26.04.01"),
        ("Qwen3-30B-A3B, seq 4096", "qwen3-30b-a3b", 4096, True, False, 206e3 / 8960, f"{bridge} 26.04.01"),
        ("Qwen3-235B-A22B, seq 4096", "qwen3-235b-a22b", 4096, True, False, 253e3 / 1712, f"{bridge} 26.04.01"),
        ("DeepSeek-V3, seq 4096", "deepseek-v3", 4096, True, False, 250e3 / 1002, "Automodel docs/performance-summary.mdx"),
        ("DeepSeek-V3 with MTP, seq 4096", "deepseek-v3", 4096, True, True, 338e3 / 1297, f"{bridge} 25.09"),
        ("DeepSeek-V3, whole attention matrix", "deepseek-v3", 4096, False, False, 432e3 / 1542, "arXiv 2505.09343, Table 4"),
    )
    return Section(
        "FLOPs",
        f"Forward and backward, without recomputation. Target: {FLOPS_TARGET:.0%}.",
        "GFLOP a token",
        [
            Compared(
                name, published, train_flops_per_token(SHAPES[model], sequence, causal, mtp) / 1e9, FLOPS_TARGET, source=source
            )
            for name, model, sequence, causal, mtp, published, source in figures
        ],
        [
            f"DeepSeek-V3: {total_parameters(shape) / 1e9:.2f} billion parameters (published: 671.03), "
            f"{active_parameters(shape, embedding=False) / 1e9:.2f} active without the input embedding (its card: 37)."
        ],
    )


def step_parts_section() -> Section:
    """DeepSeek-V3's step on 2048 H800 by what its pipeline does: the slots of the first rank of the DualPipe schedule."""
    run = DEEPSEEK_2048
    work = Work(run, device_named(run.device))
    step = train_step(run)
    stages = [chunk.stage_seconds() for chunk in chunk_times(work)]
    pipeline = pipeline_of(work, chunk_times(work))
    contention = contention_share(work, DISPATCHER_MULTIPROCESSORS[run.training.dispatcher])
    parts = dict.fromkeys(("1F", "1B", "1W", "1F1B"), 0.0)
    for slot in dualpipe(run.layout.pp, run.microbatches)[0]:
        _add_slot(parts, slot, stages, contention)
    parts["bubble"] = pipeline.total_seconds - sum(parts.values())
    parts["optimizer"] = step.parts_seconds["optimizer"] + step.parts_seconds["exposed_data"]
    published = {"1F": 1.13, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "bubble": 2.06, "optimizer": 0.29}
    figures = [Compared(name, seconds, parts[name], PARTS_TARGET) for name, seconds in published.items()]
    figures.append(Compared("step", 19.926, step.step_seconds, PARTS_TARGET))
    return Section(
        "DeepSeek-V3 on 2048 H800, one step in parts",
        "arXiv 2505.09343, Table 4. The planner's are pipeline rank 0's by the slots of DualPipe: forwards (1F), backwards, "
        "whole or for the input (1B), and weight gradients (1W) that run alone, pairs of a forward and a backward beside each "
        "other (1F1B), waiting (bubble), and the update with what it exchanges. The paper says neither which rank it timed nor "
        f"where a whole backward counts. Target: {PARTS_TARGET:.0%} each.",
        "s",
        figures,
    )


def _add_slot(parts: dict[str, float], slot: Slot, stages: list[StageSeconds], contention: float) -> None:
    at = [stages[one.stage] for one in slot]
    if len(slot) == 2:
        parts["1F1B"] += pair_seconds(*at, contention)
        return
    (one,), (stage,) = slot, at
    if one.work == "forward":
        parts["1F"] += stage.forward + stage.forward_exchange
    elif one.work == "backward_weight":
        parts["1W"] += stage.backward_weight
    else:
        weight = stage.backward_weight if one.work == "backward" else 0.0
        parts["1B"] += stage.backward_input + stage.backward_exchange + weight


def trace_section() -> Section:
    """The published profile of DualPipe's steady state: a forward and a backward pass of four MoE layers beside each other."""
    run = replace(DEEPSEEK_2048, shape=replace(DEEPSEEK_2048.shape, num_mtp_layers=0))
    work, layer = Work(run, device_named(run.device)), run.shape.num_layers - 1
    four = sum((layer_pass(work, layer) for _ in range(4)), NOTHING).stage_seconds()
    contention = contention_share(work, DISPATCHER_MULTIPROCESSORS[run.training.dispatcher])
    operations = {one.name: one for one in layer_operations(work, layer)}
    exchanges = {(one.kind, one.direction): one.seconds for one in layer_exchanges(work, layer, operations)}
    experts = [operations[f"experts_{name}"] for name in ("gate_up", "down")]
    core = operations["core_attention"]
    milliseconds = {
        "pair of four layers": (129.0, pair_seconds(four, four, contention)),
        "attention core, forward": (1.237, core.forward_seconds),
        "attention core, backward": (3.78, core.backward_input_seconds),
        "experts' products, forward and input gradient, four layers": (
            22.9, 4 * sum(one.forward_seconds + one.backward_input_seconds for one in experts),
        ),
        "dispatch (FP8) beside computation": (4.35, exchanges["dispatch", "forward"] / BESIDE_COMPUTE_FRACTION),
        "combine (bf16) beside computation": (6.18, exchanges["combine", "forward"] / BESIDE_COMPUTE_FRACTION),
    }  # fmt: skip
    return Section(
        "DualPipe's trace",
        "deepseek-ai/profile-data train.json: H800, EP 64, TP 1, a micro-batch of 4096 tokens forward beside one backward. The "
        "experts' products contain the casts that come before them. No held-out test: collectives.BESIDE_COMPUTE_FRACTION and "
        "the rate of attention's backward pass come from it.",
        "ms",
        [Compared(name, published, 1e3 * seconds) for name, (published, seconds) in milliseconds.items()],
    )


def moe_layer_section() -> Section:
    """Megatron's own regression baselines: one MoE layer (router, exchange, experts) of 4096 tokens a GPU on 8 H100."""
    # Its config leaves gated_linear_unit off: experts of two matrices, as many FLOPs and bytes as gated ones of 2/3 the width.
    width, wide = 2048 * 2 // 3, 14336 * 2 // 3
    deepseek = MoeShape(32, 8, width, shared_intermediate_size=width, router_bias=True, num_groups=8, top_groups=4)
    proxies = {
        "DeepSeek-V3-like": ModelShape("deepseek-proxy", 32000, 7168, 1, 8, 8, 128, 0, moe=deepseek),
        "Mixtral-like": ModelShape("mixtral-proxy", 32000, 4096, 1, 8, 8, 128, 0, moe=MoeShape(8, 2, wide)),
    }
    cases = (
        ("DeepSeek-V3-like", "alltoall", "bf16", 7.12, 10.48),
        ("DeepSeek-V3-like", "deepep", "bf16", 5.68, 9.06),
        ("DeepSeek-V3-like", "hybridep", "bf16", 5.39, 8.80),
        ("DeepSeek-V3-like", "hybridep", "fp8-blockwise", 5.14, 7.69),
        ("Mixtral-like", "alltoall", "bf16", 4.33, 7.68),
        ("Mixtral-like", "alltoall", "fp8-blockwise", 3.79, 6.62),
    )
    figures = []
    for model, dispatcher, precision, forward, backward in cases:
        run = planned(proxies[model], 8, 4096, 8, ep=8, dispatcher=dispatcher, precision=precision)
        predicted = dict(zip(("forward", "backward"), _moe_layer_seconds(run), strict=True))
        figures += [
            Compared(f"{model}, {dispatcher}, {precision}, {way}", published, 1e3 * predicted[way])
            for way, published in (("forward", forward), ("backward", backward))
        ]
    return Section(
        "One MoE layer",
        "Megatron-LM tests/functional_tests/test_cases/common/moe_perf/baseline.json: a layer's router, exchange and experts, "
        "4096 tokens a GPU, 8 H100, nothing overlapped; the planner's at a microbenchmark's clock.",
        "ms",
        figures,
    )


def _moe_layer_seconds(run: PlannedRun) -> tuple[float, float]:
    """Forward and backward of an MoE layer without its attention, norms and residuals, the CPU never late."""
    work = Work(
        run, replace(device_named(run.device), power_watts=math.inf)
    )  # too short for the power limit to lower the clock
    operations = layer_operations(work, 0)
    exchanges = layer_exchanges(work, 0, {one.name: one for one in operations})
    names = [one.name for one in operations]
    inside = operations[names.index("router") : names.index("unpermute") + 1]

    def exchanged(direction: str) -> Iterable[float]:
        return (one.exposed_seconds for one in exchanges if one.axis == "ep" and one.direction == direction)

    forward = sum(one.forward_seconds for one in inside) + sum(exchanged("forward"))
    backward = sum(one.backward_input_seconds + one.backward_weight_seconds for one in inside) + sum(exchanged("backward"))
    return forward, backward
