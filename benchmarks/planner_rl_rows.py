"""Published RL runs as `PlannedRun`s: what `benchmarks/planner.py` compares GRPO steps with. Sources and assumptions by row.

Rows of one publisher and model are a family, in the order of publication and, on one page, of its table. Fitted families were
chosen by the rule of `planner_rows`: every second one, beginning with the second. Constants of engine.plan.decode and
grpo that say "fitted" saw those alone, those of weight_sync published seconds of weight synchronisation, of held-out models
too; and that one step ahead drains its engines (RolloutPlan.continuous) was
understood on held-out rows, DeepSeek-V3's. Not here: NeMo-RL's DAPO row (its two published step times, 458 and 974 s, differ
and dynamic sampling generates an unknown number of batches).

Lengths. NeMo-RL publishes mean response lengths and the limit of prompt plus response; its prompts are assumed to have 105
tokens, which is what its tokens/s/GPU x seconds x GPUs / samples leaves over the responses in every row (103-127). The spread
of lengths is assumed to be 0.8 everywhere (with 0.4 to 1.2 the median error of the held-out rows is 7 to 11%). verl's
fully-async page and R1's paper publish no mean: `assumed` says what was taken.
verl's partial rollouts with a staleness of 0.5 are planned as two steps ahead: its engines never drain.
"""

from dataclasses import dataclass, field, replace

from strop.engine.config import Layout
from strop.engine.plan.grpo import optimizer_step_run
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.shape import ModelShape

NEMO_PAGE = "NVIDIA-NeMo/RL docs/about/performance-summary.md"
NEMO_RECIPES = "examples/configs/recipes/llm/performance"
NEMO_BLOG = "NVIDIA developer blog, NeMo-RL v0.3 (2025-07-21), table 1"
VERL_ASYNC = "verl docs/advance/fully_async.md"
PROMPT_TOKENS = 105.0
ROUTED_IMBALANCE = 1.2
"""Of experts under real routing (Megatron-MoE-ModelZoo: 8-20% slower than forced balance)."""


@dataclass(frozen=True)
class RlRow:
    """One published RL run."""

    family: str
    name: str
    run: PlannedRun
    published_step_seconds: float
    source: str
    assumed: str
    fitted: bool
    published_phase_seconds: dict[str, float] = field(default_factory=dict)
    """rollout, training, logprobs (old and reference), weight_sync; those that the source gives."""


def planned(
    shape: ModelShape, gpus: int, layout: Layout, training: TrainingPlan, rollout: RolloutPlan, device: str = "h100",
    stage_layers: tuple[int, ...] = (),
) -> PlannedRun:  # fmt: skip
    """The run, its batch being what its samples make."""
    placement = "split" if rollout.gpus else "colocated"
    run = PlannedRun.of(
        shape, gpus, device=device, layout=layout, stage_layers=stage_layers, training=training, rollout=rollout,
        placement=placement,
    )  # fmt: skip
    batch = optimizer_step_run(run).training.global_batch_sequences
    return replace(run, training=replace(run.training, global_batch_sequences=batch))


def nemo(
    model: str, gpus: int, limit_tokens: int, mean_response_tokens: float, samples: tuple[int, int] = (64, 32),
    tp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1, rollout_tp: int = 1, stage_layers: tuple[int, ...] = (),
    recompute: bool = False, fused: bool = True, precision: str = "bf16", rollout_gpus: int = 0, optimizer_steps: int = 4,
    **rollout,
) -> PlannedRun:  # fmt: skip
    """NeMo-RL's recipes: Megatron with bf16 gradients, packing, NCCL all-to-all (DeepEP off), vLLM with CUDA graphs; colocated:
    states offloaded, memory 0.6, tensors streamed; split: memory 0.8, tensors broadcast, in-flight weight updates."""
    sequence_tokens = -(-limit_tokens // (2 * cp * tp)) * 2 * cp * tp
    training = TrainingPlan(
        sequence_length_tokens=sequence_tokens, gradient_dtype_bytes=2, precision=precision, logits="materialized",
        dispatcher="alltoall", recompute=("layer",) if recompute else (), compiled=fused,
        overlap_tensor=False, expert_imbalance=ROUTED_IMBALANCE if SHAPES[model].moe else 1.0,
    )  # fmt: skip
    plan = RolloutPlan(
        prompts_per_step=samples[0], group_size=samples[1], prompt_tokens=PROMPT_TOKENS, optimizer_steps=optimizer_steps,
        mean_response_tokens=mean_response_tokens, max_response_tokens=round(limit_tokens - PROMPT_TOKENS), tp=rollout_tp,
        gpus=rollout_gpus, memory_fraction=0.8 if rollout_gpus else 0.6, offload_training=not rollout_gpus,
        weight_sync="broadcast" if rollout_gpus else "stream", pad_packed=pp > 1 or ep > 1, **rollout,
    )  # fmt: skip
    shape = replace(SHAPES[model], num_mtp_layers=0)
    layout = Layout(tp=tp, sp=tp > 1, cp=cp, pp=pp, ep=ep)
    return planned(shape, gpus, layout, training, plan, stage_layers=stage_layers)


def _blog() -> list[RlRow]:
    note = "recipes of v0.3.0: generation tp 1, 4, 4, 4; its SwiGLU was not fused, planned as uncompiled"

    def row(name: str, run: PlannedRun, step: float, training: float, sync: float, rollout: float, logprobs: float) -> RlRow:
        phases = {"training": training, "weight_sync": sync, "rollout": rollout, "logprobs": logprobs}
        return RlRow("nemo-rl v0.3", name, run, step, NEMO_BLOG, note, True, phases)

    return [
        row("Llama3.1-8B, 8 GPUs", nemo("llama3-8b", 8, 4096, 795, fused=False), 112, 28, 5, 58, 18),
        row("Llama3.1-70B, 64", nemo("llama3-70b", 64, 4096, 398, tp=4, pp=4, rollout_tp=4, fused=False), 147, 28, 14, 84, 18),
        row("Qwen3-32B, 64", nemo("qwen3-32b", 64, 4096, 3283, tp=4, pp=2, rollout_tp=4, fused=False), 213, 68, 7, 96, 40),
        row(
            "Qwen3-30B-A3B, 64",
            nemo("qwen3-30b-a3b", 64, 4096, 3251, tp=2, ep=8, rollout_tp=4, fused=False),
            167,
            50,
            12,
            78,
            23,
        ),
    ]


def _llama() -> list[RlRow]:
    note = "full recompute as in the recipe"

    def row(name: str, run: PlannedRun, step: float) -> RlRow:
        source = f"{NEMO_PAGE} (v0.5); {NEMO_RECIPES}/grpo-llama3.1-8b-*"
        return RlRow("nemo-rl Llama3.1-8B", name, run, step, source, note, True)

    ahead = {"rollout_gpus": 8, "steps_ahead": 1, "recompute": True}
    return [
        row("on-policy, 16", nemo("llama3-8b", 16, 4096, 1019, pp=2, recompute=True), 92.8),
        row("1 step off, 8+8", nemo("llama3-8b", 16, 4096, 1123, **ahead), 64.8),
        row(
            "1 step off FP8, 8+8",
            nemo("llama3-8b", 16, 4096, 1128, precision="fp8-blockwise", weights_dtype_bytes=1, **ahead),
            53.0,
        ),
    ]


def _deepseek() -> list[RlRow]:
    note = "no drafting: the recipes of v0.6.0 have none (later ones draft a token by MTP)"
    stages = (3, *(4,) * 14, 2)
    common = {"samples": (32, 16), "pp": 16, "ep": 16, "stage_layers": stages, "recompute": True, "optimizer_steps": 1}

    def row(name: str, run: PlannedRun, step: float) -> RlRow:
        source = f"{NEMO_PAGE} (v0.6); {NEMO_RECIPES}/grpo-deepseek-v3-*"
        return RlRow("nemo-rl DeepSeek-V3", name, run, step, source, note, False)

    split = {"rollout_gpus": 256, "steps_ahead": 1}
    return [
        row("on-policy, 256", nemo("deepseek-v3", 256, 1536, 701, rollout_tp=32, **common), 134),
        row("on-policy, 512", nemo("deepseek-v3", 512, 1536, 697, rollout_tp=32, **common), 111),
        row("1 step off, 256+256", nemo("deepseek-v3", 512, 1536, 710, rollout_tp=32, **common, **split), 64.1),
        row(
            "1 step off FP8, 256+256",
            nemo(
                "deepseek-v3",
                512,
                1536,
                721,
                rollout_tp=16,
                precision="fp8-blockwise",
                weights_dtype_bytes=1,
                max_sequences=32,
                **common,
                **split,
            ),
            59.2,
        ),
    ]


def _qwen_235b() -> list[RlRow]:
    stages = (11, *(12,) * 6, 11)
    common = {"samples": (16, 32), "pp": 8, "ep": 16, "stage_layers": stages, "recompute": True, "optimizer_steps": 1}

    def row(name: str, run: PlannedRun, step: float) -> RlRow:
        source = f"{NEMO_PAGE} (v0.6); {NEMO_RECIPES}/grpo-qwen3-235b-*"
        return RlRow("nemo-rl Qwen3-235B", name, run, step, source, "", True)

    return [
        row("on-policy, 128", nemo("qwen3-235b-a22b", 128, 8192, 5698, tp=2, cp=2, rollout_tp=16, **common), 395),
        row("on-policy, 256", nemo("qwen3-235b-a22b", 256, 8192, 5713, tp=2, cp=2, rollout_tp=16, **common), 312),
        row(
            "1 step off, 128+128",
            nemo("qwen3-235b-a22b", 256, 8192, 5721, tp=4, rollout_tp=8, rollout_gpus=128, steps_ahead=1, **common),
            231,
        ),
    ]


def _qwen_30b() -> list[RlRow]:
    def row(name: str, run: PlannedRun, step: float) -> RlRow:
        source = f"{NEMO_PAGE} (v0.6); {NEMO_RECIPES}/grpo-qwen3-30ba3b-*"
        return RlRow("nemo-rl Qwen3-30B-A3B", name, run, step, source, "", False)

    model, common = "qwen3-30b-a3b", {"ep": 8, "rollout_tp": 2}
    return [
        row("on-policy, 32", nemo(model, 32, 4096, 3203, **common), 192),
        row("1 step off, 16+16", nemo(model, 32, 4096, 3201, pp=2, rollout_gpus=16, steps_ahead=1, **common), 152),
        row("8 steps off, 128+64", nemo(model, 192, 4096, 3206, rollout_gpus=64, steps_ahead=8, **common), 34.5),
    ]


def _qwen_32b() -> list[RlRow]:
    def row(name: str, run: PlannedRun, step: float) -> RlRow:
        source = f"{NEMO_PAGE} (v0.5); {NEMO_RECIPES}/grpo-qwen3-32b-*"
        return RlRow("nemo-rl Qwen3-32B", name, run, step, source, "", True)

    common = {"tp": 4, "pp": 4, "rollout_tp": 4}
    return [
        row("on-policy, 32", nemo("qwen3-32b", 32, 4096, 3251, **common), 376),
        row("1 step off, 32+32", nemo("qwen3-32b", 64, 4096, 3252, rollout_gpus=32, steps_ahead=1, **common), 200),
    ]


def _r1() -> RlRow:
    """R1-Zero's reinforcement learning: 10,400 steps of 512 outputs, 16 steps a rollout, in about 198 hours on 64 x 8 H800."""
    layout = Layout(cp=8, pp=16, ep=32)
    training = TrainingPlan(
        sequence_length_tokens=33280, precision="fp8-blockwise", moment_dtype_bytes=2, dispatch_dtype_bytes=1,
        recompute=("layer",),
    )  # fmt: skip
    rollout = RolloutPlan(
        prompts_per_step=512, group_size=16, prompt_tokens=200, mean_response_tokens=6500, max_response_tokens=32768, ep=32,
        weights_dtype_bytes=1, speculative_tokens=1.8, offload_training=True, optimizer_steps=16, old_logprobs=False,
    )  # fmt: skip
    stages = (3, *(4,) * 14, 2)
    run = planned(replace(SHAPES["deepseek-v3"], num_mtp_layers=0), 512, layout, training, rollout, "h800", stages)
    return RlRow(
        "deepseek R1-Zero", "512 H800", run, 198 * 3600 / 650,
        "arXiv 2501.12948v2: 10,400 steps, 512 outputs a step, 8,192 a rollout, about 198 h",
        "mean length 6,500 over the run (off the paper's plot: from below 1,000 to about 10,000 at step 8,000), limit 32,768 "
        "all along (it was 65,536 from step 8,200 on); mapping unpublished: pp16 ep32 (verl's for 512 GPUs) and cp8 for the "
        "limit, FP8; generation ep32, FP8, 1 drafted token, 80% accepted",
        False,
    )  # fmt: skip


def _verl_deepseek() -> RlRow:
    layout = Layout(tp=8, sp=True, pp=12, ep=8)
    training = TrainingPlan(
        sequence_length_tokens=11680, gradient_dtype_bytes=2, recompute=("layer",), offload_optimizer=True,
        logits="materialized",
    )  # fmt: skip
    rollout = RolloutPlan(
        prompts_per_step=96, group_size=8, prompt_tokens=150, mean_response_tokens=1960, max_response_tokens=9632, tp=32,
        memory_fraction=0.6, cuda_graphs=False, weight_sync="stream", offload_training=True, optimizer_steps=3,
    )  # fmt: skip
    shape = replace(SHAPES["deepseek-v3"], num_mtp_layers=0)
    run = planned(shape, 96, layout, training, rollout, "h20", (5,) * 11 + (6,))
    source = "verl docs/perf/dpsk.md; examples/grpo_trainer/run_deepseek671b_math_megatron_96gb.sh"
    note = "batch and limit unpublished: the script's 96 x 8 and 9,632 tokens; prompts of 150"
    return RlRow("verl DeepSeek-V3", "96 H20", run, 1700, source, note, False, {"rollout": 1050})


def _verl_7b() -> list[RlRow]:
    note = (
        "mean length 2,000 in all rows, which fits the first one's update_actor (unpublished; by that time, lengths differ by "
        "up to 2x between these runs), limit 28,672, prompts of 150; FSDP, Ulysses of 4, gradient checkpointing"
    )

    def row(gpus: int, step: float, phases: dict[str, float], rollout_gpus: int = 0) -> RlRow:
        training = TrainingPlan(
            sequence_length_tokens=4 * 61440, fsdp=True, recompute=("layer",), logits="in-place", compiled=False
        )
        rollout = RolloutPlan(
            prompts_per_step=512, group_size=16, prompt_tokens=150, mean_response_tokens=2000, max_response_tokens=28672, tp=4,
            gpus=rollout_gpus, steps_ahead=2 if rollout_gpus else 0, weight_sync="stream", reference=False,
            old_logprobs=not rollout_gpus, offload_training=not rollout_gpus, optimizer_steps=16, pad_packed=False,
        )  # fmt: skip
        run = planned(SHAPES["qwen2.5-7b"], gpus, Layout(cp=4, cp_kind="ulysses"), training, rollout, "h20")
        name = f"fully async, {gpus - rollout_gpus}+{rollout_gpus} H20" if rollout_gpus else f"colocated, {gpus} H20"
        return RlRow("verl Qwen2.5-Math-7B", name, run, step, VERL_ASYNC, note, False, phases)

    return [
        row(32, 790.1, {"rollout": 357.41, "logprobs": 107.71, "training": 269.8}),
        row(64, 365.28, {"rollout": 150.72, "logprobs": 70.26, "training": 133.41}),
        row(128, 356.3, {"rollout": 177.85, "logprobs": 53.92, "training": 113.81}),
        row(32, 294.77, {"training": 313.81}, 16),
        row(64, 189.26, {"training": 156.98}, 32),
        row(128, 150.63, {"training": 113.16}, 64),
    ]


def _verl_30b() -> list[RlRow]:
    note = "mean length 2,500 (unpublished; limit 8,192), prompts of 150; mapping of the 96+32 script for both"

    def row(step: float, phases: dict[str, float], rollout_gpus: int = 0) -> RlRow:
        training = TrainingPlan(
            sequence_length_tokens=10240, gradient_dtype_bytes=2, offload_optimizer=True, logits="materialized"
        )
        rollout = RolloutPlan(
            prompts_per_step=512, group_size=16, prompt_tokens=150, mean_response_tokens=2500, max_response_tokens=8192, tp=4,
            gpus=rollout_gpus, steps_ahead=2 if rollout_gpus else 0, weight_sync="stream", cuda_graphs=False,
            memory_fraction=0.7, old_logprobs=not rollout_gpus, offload_training=not rollout_gpus, optimizer_steps=4,
            pad_packed=False,
        )  # fmt: skip
        run = planned(SHAPES["qwen3-30b-a3b"], 128, Layout(tp=2, sp=True, cp=2, ep=8), training, rollout, "h20")
        name = "fully async, 32+96 H20" if rollout_gpus else "colocated, 128 H20"
        return RlRow("verl Qwen3-30B-A3B", name, run, step, VERL_ASYNC, note, True, phases)

    return [
        row(497.89, {"rollout": 348.05, "logprobs": 28.73 + 20.86, "training": 86.27}),
        row(282.75, {"logprobs": 50.05, "training": 206.63}, 96),
    ]


RL_ROWS: tuple[RlRow, ...] = (
    _r1(), *_blog(), _verl_deepseek(), *_llama(), *_deepseek(), *_qwen_235b(), *_qwen_30b(), *_qwen_32b(), *_verl_7b(),
    *_verl_30b(),
)  # fmt: skip
