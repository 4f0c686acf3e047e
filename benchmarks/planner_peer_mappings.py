"""What peers publish for the planner's target questions: a workload each, and their layouts for it as `PlannedRun`s.

A mapping is a peer's layout, division of layers, recomputation, FSDP, type of gradients, offload and generation engines, put
on the target's workload (model, GPUs, batch, lengths, precision, dispatcher), so that a search answers the same question.
What a peer does not say, and lengths that nobody publishes, are assumed as `assumed` tells. Workloads come from the published
rows of planner_rows and planner_rl_rows where there are any.
"""

from dataclasses import dataclass, field, replace

from planner_rl_rows import RL_ROWS
from planner_rows import ROWS

from strop.engine.config import Layout
from strop.engine.plan.candidates import SearchSpace
from strop.engine.plan.models import SHAPES
from strop.engine.plan.packing import with_batch
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan


@dataclass(frozen=True)
class Mapping:
    """One peer's way to run the target's workload."""

    peer: str
    run: PlannedRun
    source: str


@dataclass(frozen=True)
class Target:
    """A question: this workload, on these GPUs."""

    name: str
    workload: PlannedRun
    """Its own layout is nobody's."""
    mappings: tuple[Mapping, ...]
    assumed: str = ""
    space: SearchSpace = field(default_factory=SearchSpace)


def mapped(
    workload: PlannedRun, layout: Layout, stage_layers: tuple[int, ...] = (), rollout: dict | None = None, **training
) -> PlannedRun:
    """The workload in this layout, with these settings of training and rollout."""
    layout = replace(layout, sp=layout.tp > 1)
    plan = replace(workload.rollout, **rollout or {}) if workload.rollout is not None else None
    placement = "split" if plan is not None and plan.gpus else "colocated"
    run = replace(workload, rollout=plan, placement=placement, training=replace(workload.training, **training))
    return with_batch(replace(run, layout=layout.resolve(run.training_gpus), stage_layers=stage_layers))


def _row(name: str) -> PlannedRun:
    return next(row.run for row in ROWS if row.name == name)


def _rl_row(family: str, name: str) -> PlannedRun:
    return next(row.run for row in RL_ROWS if (row.family, row.name) == (family, name))


def qwen_30b_grpo_8() -> Target:
    training = TrainingPlan(sequence_length_tokens=10240, logits="materialized", expert_imbalance=1.2)
    rollout = RolloutPlan(
        prompts_per_step=64, group_size=16, prompt_tokens=150, mean_response_tokens=2500, max_response_tokens=8192,
        memory_fraction=0.7, weight_sync="stream", offload_training=True, optimizer_steps=4, pad_packed=False, reference=False,
    )  # fmt: skip
    work = PlannedRun(SHAPES["qwen3-30b-a3b"], 8, training=training, rollout=rollout)
    in_gpu = Layout(tp=4, ep=2, etp=4)
    mappings = (
        Mapping(
            "slime", mapped(work, Layout(tp=4, ep=8), (), {"tp": 8}, recompute=("layer",), offload_optimizer=True),
            "THUDM/slime scripts/run-qwen3-30B-A3B.sh",
        ),
        Mapping(
            "verl", mapped(work, Layout(ep=8), (), {"tp": 4}, recompute=("layer",), offload_optimizer=True),
            "verl examples/grpo_trainer/run_qwen3moe-30b_megatron_96gb.sh; full recompute, without which 80 GB are too few",
        ),
        Mapping(
            "Megatron-RL", mapped(work, in_gpu, (), {"tp": 4}, recompute=("layer",)),
            "Megatron-LM examples/rl/model_configs/qwen3_30b_a3b_moe.sh; etp = tp and Adam on the GPUs are Megatron's defaults",
        ),
        Mapping(
            "Megatron's defaults", mapped(work, Layout(ep=8), (), {"tp": 4}, recompute=("layer",)),
            "Megatron-LM's distributed optimizer: 6 + 12 / replicas bytes a parameter",
        ),
    )  # fmt: skip
    assumed = "64 x 16 samples (Megatron-RL), responses of 2,500 tokens on average and 8,192 at most"
    return Target("Qwen3-30B-A3B GRPO, 8 H100", work, mappings, assumed, SearchSpace(offload_optimizer=(False, True)))


def qwen_30b_pretraining(gpus: int, name: str, peer: str) -> Target:
    """The row's own run, with everything but its layout as the workload."""
    run = _row(name)
    source = next(row.source for row in ROWS if row.name == name)
    space = SearchSpace(fsdp=(False, True)) if run.training.fsdp else SearchSpace()
    return Target(f"Qwen3-30B-A3B training, {gpus} H100", run, (Mapping(peer, run, source),), space=space)


def qwen_235b_training_256() -> Target:
    work = _row("Qwen3-235B-A22B bf16, 256 GPUs, DeepEP 32 overlapped")
    zoo = [row for row in ROWS if row.family == "zoo qwen3-235b"]
    mappings = []
    for row in zoo:
        if row.run is work:
            continue  # the same layout as "DeepEP 32", and overlap is the workload's
        layout, training = replace(row.run.layout, dp=0), row.run.training
        settings = ("micro_batch_sequences", "recompute", "fsdp", "gradient_dtype_bytes")
        own = {setting: getattr(training, setting) for setting in settings}
        peer = row.name.rsplit(", 256 GPUs, ")[1].replace("DeepEP", "EP").replace("all-to-all", "EP")
        mappings.append(Mapping(peer, mapped(work, layout, row.run.stage_layers, **own), row.source))
    space = SearchSpace(fsdp=(False, True), gradient_dtype_bytes=(2, 4))
    assumed = (
        "dispatch (DeepEP), overlap and batch (2,048) of the ModelZoo's best run for all; bf16 gradients allowed, as FSDP has"
    )
    return Target("Qwen3-235B-A22B training, 256 H100", work, tuple(mappings), assumed, space)


def qwen_235b_grpo_256() -> Target:
    run = _rl_row("nemo-rl Qwen3-235B", "on-policy, 256")
    return Target(
        "Qwen3-235B-A22B GRPO, 256 H100",
        run,
        (Mapping("NeMo-RL", run, "NVIDIA-NeMo/RL grpo-qwen3-235b-32n8g.yaml"),),
        "NeMo-RL's samples, lengths, precision and software",
    )


def deepseek_grpo_256() -> Target:
    work = _rl_row("nemo-rl DeepSeek-V3", "on-policy, 256")
    verl = mapped(work, Layout(pp=16, ep=16), (4, *(4,) * 14, 1), {"tp": 32})
    mappings = (
        Mapping("NeMo-RL", work, "NVIDIA-NeMo/RL grpo-deepseek-v3-32n8g.yaml"),
        Mapping("verl", verl, "verl examples/grpo_trainer/run_deepseek671b_math_megatron_80gb.sh"),
    )
    return Target("DeepSeek-V3 GRPO, 256 H100", work, mappings, "NeMo-RL's samples, lengths, precision and software")


def deepseek_grpo_512() -> Target:
    work = _rl_row("nemo-rl DeepSeek-V3", "on-policy, 512")
    verl = mapped(work, Layout(pp=16, ep=32), (4, *(4,) * 14, 1), {"tp": 32})
    mappings = (
        Mapping("NeMo-RL", work, "NVIDIA-NeMo/RL grpo-deepseek-v3-64n8g.yaml"),
        Mapping("verl", verl, "verl docs/perf/dpsk.md: 512 GPUs, PP16 EP32, generation TP32"),
    )
    return Target("DeepSeek-V3 GRPO, 512 H100", work, mappings, "NeMo-RL's samples, lengths, precision and software")


def deepseek_grpo_512_split() -> Target:
    work = _rl_row("nemo-rl DeepSeek-V3", "1 step off, 256+256")
    return Target(
        "DeepSeek-V3 GRPO one step off, 512 H100",
        work,
        (Mapping("NeMo-RL, 256 + 256", work, "NVIDIA-NeMo/RL grpo-deepseek-v3-64n8g-async-1off.yaml"),),
        "NeMo-RL's samples, lengths, precision and software",
        SearchSpace(placements=("split",), split_shares=(0.25, 0.5, 0.75)),
    )


def deepseek_grpo_2048() -> Target:
    """R1-Zero's lengths and batch, four times the GPUs."""
    r1 = replace(_rl_row("deepseek R1-Zero", "512 H800"), gpus=2048)
    work = replace(r1, layout=replace(r1.layout, dp=0))
    chunked = (7, 8, 8, 8, 8, 8, 8, 6)
    overlapped = {"overlap_expert": True}
    work = replace(work, training=replace(work.training, **overlapped, recompute=()))
    mappings = (
        Mapping("R1 as in planner_rl_rows", mapped(work, replace(r1.layout, dp=0), r1.stage_layers, recompute=("layer",)),
                "unpublished; verl's PP16 EP32 with cp 8 for the limit"),
        Mapping("DeepSeek",
                mapped(work, Layout(pp=16, cp=8, ep=64, schedule="dualpipe"), (*(4,) * 15, 1), recompute=("layer",)),
                "arXiv 2412.19437, section 3 (pretraining; cp 8 and full recompute for sequences of 33k)"),
        Mapping("ModelZoo / Megatron Bridge",
                mapped(work, Layout(tp=8, pp=8, vpp=4, schedule="interleaved", ep=32), chunked, recompute=("layer",)),
                "Megatron-MoE-ModelZoo, DeepSeek-V3 at 32k: TP8 PP8 VPP4 EP32"),
        Mapping("slime", mapped(work, Layout(tp=8, cp=4, pp=4, ep=32), (16, 16, 16, 13), {"tp": 8, "ep": 64},
                                recompute=("layer",), offload_optimizer=True),
                "THUDM/slime scripts/run-deepseek-r1.sh (128 GPUs), more replicas"),
    )  # fmt: skip
    assumed = "R1-Zero's 512 x 16 samples in 16 optimizer steps, limit 32,768, mean 6,500; H800, FP8"
    return Target("DeepSeek-V3 GRPO, 2048 H800", work, mappings, assumed, SearchSpace(offload_optimizer=(False, True)))


TARGETS = {
    "qwen3-30b-grpo-8": qwen_30b_grpo_8,
    "qwen3-30b-8": lambda: qwen_30b_pretraining(8, "Qwen3-30B-A3B bf16, 8 GPUs, FSDP, EP 8", "AutoModel"),
    "qwen3-30b-16": lambda: qwen_30b_pretraining(16, "Qwen3-30B-A3B bf16, 16 GPUs, HybridEP overlapped", "Megatron Bridge"),
    "qwen3-235b-256": qwen_235b_training_256,
    "qwen3-235b-grpo-256": qwen_235b_grpo_256,
    "deepseek-v3-grpo-256": deepseek_grpo_256,
    "deepseek-v3-grpo-512": deepseek_grpo_512,
    "deepseek-v3-grpo-512-split": deepseek_grpo_512_split,
    "deepseek-v3-grpo-2048": deepseek_grpo_2048,
}
"""Name -> target; built when asked for."""
