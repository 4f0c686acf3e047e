"""Which layouts a search looks at: every combination of degrees that divides the GPUs, in a fixed order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ..config import ContextParallelKind, Layout, PipelineSchedule, Placement
from .devices import device_named
from .run import PlannedRun, RecomputePart, TrainingPlan
from .shape import ModelShape
from .stage_balance import balanced_stage_layers
from .stages import even_split

RECOMPUTE_CHOICES: tuple[tuple[RecomputePart, ...], ...] = (
    (),
    ("norms", "activation"),
    ("norms", "activation", "mla_up_projection"),
    ("norms", "activation", "mla_up_projection", "core_attention"),
    ("norms", "activation", "mla_up_projection", "dense_mlp", "experts"),
    ("norms", "activation", "mla_up_projection", "core_attention", "dense_mlp", "experts"),
    ("layer",),
)
"""What recipes use, from nothing to everything; each choice holds those before it except for core_attention, which is apart."""
SHORTEST_CONTEXT_TOKENS = 2048
"""Of a sequence on one context-parallel rank: below, the exchange of keys and values outweighs the attention it divides."""
LARGEST_MICROBATCH_TOKENS = 32768
"""On one rank: products stop getting faster far below this size, while activations grow with it."""
LARGEST_ROLLOUT_ENGINE_GPUS = 64


@dataclass(frozen=True)
class SearchSpace:
    """What a search may vary. () takes every value that the GPUs, the model and the batch admit; one value fixes a setting."""

    tp: tuple[int, ...] = ()
    """(): up to a node. Across nodes its collectives, several a layer, would run over the network cards."""
    cp: tuple[int, ...] = ()
    cp_kinds: tuple[ContextParallelKind, ...] = ("ring", "ulysses")
    pp: tuple[int, ...] = ()
    vpp: tuple[int, ...] = ()
    schedules: tuple[PipelineSchedule, ...] = ("1f1b", "interleaved", "zero-bubble", "dualpipe", "dualpipev")
    ep: tuple[int, ...] = ()
    etp: tuple[int, ...] = ()
    """(): 1 and tp, whole experts or split like the rest."""
    micro_batch_sequences: tuple[int, ...] = ()
    recompute: tuple[tuple[RecomputePart, ...], ...] = RECOMPUTE_CHOICES
    fsdp: tuple[bool, ...] = ()
    """(), here and for the next three: as in the training plan alone. These change what is computed or where, not only how it
    is divided, so the person allows them."""
    gradient_dtype_bytes: tuple[int, ...] = ()
    moment_dtype_bytes: tuple[int, ...] = ()
    offload_optimizer: tuple[bool, ...] = ()
    placements: tuple[Placement, ...] = ("colocated",)
    split_shares: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    """Shares of the GPUs that only generate, where the placement is split."""
    rollout_tp: tuple[int, ...] = ()
    """(): powers of two up to LARGEST_ROLLOUT_ENGINE_GPUS that divide the heads."""
    rollout_ep: tuple[int, ...] = ()
    """(): 1, and every divisor of the experts up to LARGEST_ROLLOUT_ENGINE_GPUS that is no smaller than tp."""
    offload_training: tuple[bool, ...] = ()
    """(): as in the rollout plan."""


def layouts(base: PlannedRun, space: SearchSpace) -> Iterator[PlannedRun]:
    """`base` with every layout, division of layers and micro-batch of `space`. They may still have problems.

    Sequence parallelism is on wherever tp is: it moves the same bytes and keeps 1 / tp of the activations between (arXiv
    2205.05198, section 4.2.2).
    """
    node_gpus = device_named(base.device).gpus_per_node
    ranks, sequence_tokens = base.training_gpus, base.training.sequence_length_tokens
    most_cp = max(1, sequence_tokens // SHORTEST_CONTEXT_TOKENS)
    for tp in space.tp or divisors(ranks, node_gpus):
        for cp in space.cp or divisors(ranks, most_cp):
            for pp in space.pp or divisors(ranks, base.shape.num_layers):
                if ranks % (tp * cp * pp):
                    continue
                dense_ranks = ranks // pp
                for ep, etp in _expert_degrees(base.shape, space, dense_ranks, tp):
                    for cp_kind in space.cp_kinds if cp > 1 else ("ring",):
                        for schedule, vpp in _schedules(base.shape, space, pp):
                            degrees = (tp, tp > 1, cp, cp_kind, pp, vpp, schedule, ep, etp, dense_ranks // (tp * cp))
                            yield from _divided(_with_layout(base, Layout(*degrees)), space)


def _expert_degrees(shape: ModelShape, space: SearchSpace, dense_ranks: int, tp: int) -> Iterator[tuple[int, int]]:
    if shape.moe is None:
        yield 1, 1
        return
    for ep in space.ep or divisors(shape.moe.num_experts, dense_ranks):
        for etp in space.etp or sorted({1, tp}):
            if dense_ranks % (ep * etp) == 0:
                yield ep, etp


def _schedules(shape: ModelShape, space: SearchSpace, pp: int) -> Iterator[tuple[PipelineSchedule, int]]:
    if pp == 1:
        yield "1f1b", 1
        return
    for schedule in space.schedules:
        if schedule != "interleaved":
            yield schedule, 1
            continue
        fewest, most = shape.num_layers // pp, -(-shape.num_layers // pp)
        for vpp in space.vpp or [v for v in range(2, fewest + 1) if most % v == 0 or v in (2, 4, 8)]:
            if vpp > 1:
                yield schedule, vpp


def _with_layout(base: PlannedRun, layout: Layout) -> PlannedRun:
    """Where no tokens travel to experts (ep 1), settings of how they do are those without effect."""
    training = base.training
    if layout.ep == 1 and base.shape.moe is not None:
        training = replace(training, overlap_expert=False, dispatch_dtype_bytes=2, expert_imbalance=1.0)
    return replace(base, layout=layout, training=training)


def _divided(run: PlannedRun, space: SearchSpace) -> Iterator[PlannedRun]:
    """The run with its divisions of layers over stages and its micro-batches."""
    layout, training = run.layout, run.training
    sequences = training.global_batch_sequences // layout.dp
    most = max(1, LARGEST_MICROBATCH_TOKENS * layout.cp // training.sequence_length_tokens)
    powers = [2**k for k in range(most.bit_length()) if sequences % 2**k == 0]
    balanced = balanced_stage_layers(run.shape, layout.pp, training.sequence_length_tokens)
    even = even_split(run.shape.num_layers, layout.pp)
    for stage_layers in ((),) if balanced == even or min(balanced) < layout.vpp else ((), balanced):
        for micro in space.micro_batch_sequences or powers or (1,):
            yield replace(run, stage_layers=stage_layers, training=replace(training, micro_batch_sequences=micro))


def memory_settings(training: TrainingPlan, space: SearchSpace) -> list[TrainingPlan]:
    """`training` with every allowed choice of what is kept where, recomputation apart."""
    return [
        replace(
            training, fsdp=fsdp, gradient_dtype_bytes=gradient, moment_dtype_bytes=moment, offload_optimizer=offload
        )
        for fsdp, gradient, moment, offload in product(
            space.fsdp or (training.fsdp,),
            space.gradient_dtype_bytes or (training.gradient_dtype_bytes,),
            space.moment_dtype_bytes or (training.moment_dtype_bytes,),
            space.offload_optimizer or (training.offload_optimizer,),
        )
    ]  # fmt: skip


def least_work(training: TrainingPlan, space: SearchSpace) -> TrainingPlan:
    """`training` with the allowed settings that make a step shortest; it may not fit into any memory."""
    settings = memory_settings(training, space)
    return replace(
        training,
        recompute=(),
        recompute_layers=0,
        fsdp=all(one.fsdp for one in settings),
        offload_optimizer=all(one.offload_optimizer for one in settings),
        gradient_dtype_bytes=min(one.gradient_dtype_bytes for one in settings),
        moment_dtype_bytes=min(one.moment_dtype_bytes for one in settings),
    )


def recompute_choices(shape: ModelShape, space: SearchSpace) -> tuple[tuple[RecomputePart, ...], ...]:
    """Those of the space without parts that the model lacks, each once, shortest first."""
    kinds = {shape.kind(layer) for layer in range(shape.num_layers)}
    lacking = {"mla_up_projection"} if shape.mla is None else set()
    lacking |= {"dense_mlp"} if "dense" not in kinds else set()
    lacking |= {"experts"} if "moe" not in kinds else set()
    choices = dict.fromkeys(tuple(part for part in choice if part not in lacking) for choice in space.recompute)
    return tuple(sorted(choices, key=lambda choice: (choice == ("layer",), len(choice))))


def rollouts(base: PlannedRun, space: SearchSpace) -> Iterator[PlannedRun]:
    """`base` with every placement and layout of its rollout engines. They may still have problems."""
    node_gpus = device_named(base.device).gpus_per_node
    for placement in space.placements:
        if placement == "colocated":
            for offload in space.offload_training or (base.rollout.offload_training,):
                plan = replace(base.rollout, gpus=0, offload_training=offload)
                yield from _engines(replace(base, placement=placement, rollout=plan), space)
            continue
        unit = node_gpus if base.gpus > node_gpus else 1
        counts = {round(base.gpus * share / unit) * unit for share in space.split_shares}
        for gpus in sorted(count for count in counts if 0 < count < base.gpus):
            plan = replace(base.rollout, gpus=gpus, offload_training=False)
            yield from _engines(replace(base, placement=placement, rollout=plan), space)


def _engines(run: PlannedRun, space: SearchSpace) -> Iterator[PlannedRun]:
    shape, gpus = run.shape, run.rollout_gpus
    most = min(gpus, LARGEST_ROLLOUT_ENGINE_GPUS)
    for tp in space.rollout_tp or [tp for tp in divisors(gpus, most) if shape.num_heads % tp == 0]:
        eps = [1] if shape.moe is None else [1, *(ep for ep in divisors(shape.moe.num_experts, most) if ep >= max(2, tp))]
        for ep in space.rollout_ep or eps:
            if gpus % max(tp * run.rollout.pp, ep) == 0:
                yield replace(run, rollout=replace(run.rollout, tp=tp, ep=ep))


def divisors(number: int, most: int) -> list[int]:
    """Divisors of `number` up to `most`, in order."""
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
