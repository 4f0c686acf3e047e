"""Which layouts a search looks at: every combination of degrees that divides the GPUs, in a fixed order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ..config import ContextParallelKind, InputError, Layout, PipelineSchedule, Placement
from .devices import device_named
from .run import PlannedRun, RecomputePart, TrainingPlan, TrainingPrecision
from .shape import ModelShape
from .stage_balance import balanced_stage_layers
from .stages import even_split
from .validation import lacking_parts

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
SHORTEST_CONTEXT_TOKENS = 4096
"""Of a sequence on one context-parallel rank: recipes divide only longer ones, and below 2,048 the exchange of keys and values
outweighs the attention that it divides."""
MOST_CHUNKS = 8
"""Of an interleaved pipeline rank: recipes have 2 to 8, and each more sends every micro-batch round the ranks once more."""
LARGEST_MICROBATCH_TOKENS = 32768
"""On one rank: products stop getting faster far below this size, while activations grow with it."""
SEARCHED_SETTINGS = {
    "training.micro_batch_sequences": "space.micro_batch_sequences", "training.recompute": "space.recompute",
    "training.recompute_layers": "space.recompute", "rollout.tp": "space.rollout_tp", "rollout.ep": "space.rollout_ep",
    "rollout.gpus": "space.split_shares", "placement": "space.placements",
}  # fmt: skip
"""Settings of a run that a search decides, beside the layout's, and what fixes them there; it takes all others as they are."""


@dataclass(frozen=True)
class SearchSpace:
    """What a search may vary. Unset, a setting takes every value that the GPUs, the model and the batch admit; one value fixes
    it. Raises InputError for values that no run could have."""

    tp: tuple[int, ...] = ()
    """Unset: up to a node. Across nodes its collectives, several a layer, would run over the network cards."""
    cp: tuple[int, ...] = ()
    """Unset: as many as leave each rank 4,096 tokens of a sequence."""
    cp_kinds: tuple[ContextParallelKind, ...] = ("ring", "ulysses")
    """Tried where a sequence is divided."""
    pp: tuple[int, ...] = ()
    """Unset: every divisor of the GPUs up to the number of layers."""
    vpp: tuple[int, ...] = ()
    """Unset: up to 8 chunks a rank."""
    schedules: tuple[PipelineSchedule, ...] = ("1f1b", "interleaved", "zero-bubble", "dualpipe", "dualpipev")
    """Tried where there is a pipeline."""
    ep: tuple[int, ...] = ()
    """Unset: every divisor of the experts."""
    etp: tuple[int, ...] = ()
    """Unset: 1 and tp, whole experts or split like the rest."""
    micro_batch_sequences: tuple[int, ...] = ()
    """Unset: powers of two up to 32,768 tokens a rank."""
    recompute: tuple[tuple[RecomputePart, ...], ...] = RECOMPUTE_CHOICES
    fsdp: tuple[bool, ...] = ()
    """Unset: both where there is no pipeline, else as in --training.fsdp."""
    precisions: tuple[TrainingPrecision, ...] = ()
    """Unset, here and in the next two: as in --training. These change what is computed, so the person allows them."""
    gradient_dtype_bytes: tuple[int, ...] = ()
    """4: fp32; 2: bf16."""
    moment_dtype_bytes: tuple[int, ...] = ()
    """Of each of Adam's two moments."""
    offload_optimizer: tuple[bool, ...] = ()
    """Unset: as in --training.offload-optimizer, and on where nothing fits without."""
    placements: tuple[Placement, ...] = ("colocated",)
    """With --grpo: whether all GPUs take turns, or some only generate. With both, --rollout.steps-ahead is that of the
    latter; the former generate and train in turn."""
    split_shares: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    """Shares of the GPUs that only generate, where the placement is split."""
    rollout_tp: tuple[int, ...] = ()
    """Unset: every divisor of the GPUs, up to 64, that the model divides over."""
    rollout_ep: tuple[int, ...] = ()
    """Unset: 1, and every divisor of the experts up to 64 GPUs that is a multiple of the engine's tp."""
    memory_fractions: tuple[float, ...] = ()
    """Unset: --rollout.memory-fraction and, colocated, 0.1 less at a time. Of equally fast ones the least is taken."""
    offload_training: tuple[bool, ...] = ()
    """Unset: both where engines are colocated; on if --rollout.offload-training is."""

    def __post_init__(self) -> None:
        for name in ("tp", "cp", "pp", "vpp", "ep", "etp", "micro_batch_sequences", "rollout_tp", "rollout_ep"):
            for value in getattr(self, name):
                if value < 1:
                    raise InputError(f"{_flag(name)} {value}: must be at least 1")
        for name in ("gradient_dtype_bytes", "moment_dtype_bytes"):
            for value in getattr(self, name):
                if value not in (1, 2, 4):
                    raise InputError(f"{_flag(name)} {value}: must be 1, 2 or 4 bytes")
        for name, most in (("split_shares", "below 1"), ("memory_fractions", "at most 1")):
            for value in getattr(self, name):
                if not 0 < value <= 1 or (name == "split_shares" and value == 1):
                    raise InputError(f"{_flag(name)} {value:g}: a share is above 0 and {most}")
        for name in ("cp_kinds", "schedules", "recompute", "placements", "split_shares"):
            if not getattr(self, name):
                raise InputError(f"{_flag(name)} without a value leaves nothing to search: name one, or leave it out")

    def require_effect(self, base: PlannedRun) -> None:
        """Raises InputError where a value can't take part in a search of this run, with those that can."""
        shape, everything = base.shape, SearchSpace()
        if base.rollout is None:
            for name in ("placements", "split_shares", "rollout_tp", "rollout_ep", "memory_fractions", "offload_training"):
                if getattr(self, name) != getattr(everything, name):
                    raise InputError(f"{_flag(name)} has no effect without a rollout (--grpo): add it, or leave this out")
        if "split" not in self.placements and self.split_shares != everything.split_shares:
            raise InputError(f"{_flag('split_shares')} has no effect without --space.placements split: add it")
        if shape.moe is None and {*self.ep, *self.etp, *self.rollout_ep} - {1}:
            raise InputError(f"--space.ep, --space.etp, --space.rollout-ep: {shape.name} has no experts, so leave them out")
        for name in ("tp", "cp", "pp"):
            given, fits = getattr(self, name), divisors(base.gpus, base.gpus)
            if name == "pp":
                fits = [value for value in fits if value <= shape.num_layers]
            elif name == "tp":
                fits = [value for value in fits if shape.num_heads % value == 0]
            if given and self.placements == ("colocated",) and not set(given) & set(fits):
                what = {"tp": f" and {shape.num_heads} heads", "pp": f" with at most {shape.num_layers}, one a layer"}
                values, fitting = " ".join(map(str, given)), ", ".join(map(str, fits))
                raise InputError(f"{_flag(name)} {values}: can't divide {base.gpus} GPUs{what.get(name, '')}; {fitting} can")


def _flag(name: str) -> str:
    return "--space." + name.replace("_", "-")


def layouts(base: PlannedRun, space: SearchSpace) -> Iterator[PlannedRun]:
    """`base` with every layout, division of layers and micro-batch of `space`. They may still have problems.

    Sequence parallelism is on wherever tp is: it moves the same bytes and keeps 1 / tp of the activations between (arXiv
    2205.05198, section 4.2.2).
    """
    node_gpus = device_named(base.device).gpus_per_node
    ranks, sequence_tokens = base.training_gpus, base.training.sequence_length_tokens
    most_cp = max(1, sequence_tokens // SHORTEST_CONTEXT_TOKENS)
    for tp in space.tp or [tp for tp in divisors(ranks, node_gpus) if base.shape.num_heads % tp == 0]:
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
            unfit = {"dualpipe": pp % 2 == 1, "dualpipev": 2 * pp > shape.num_layers}  # pairs of ranks; two chunks a rank
            if not unfit.get(schedule, False):
                yield schedule, 1
            continue
        fewest, most = shape.num_layers // pp, -(-shape.num_layers // pp)
        for vpp in space.vpp or [v for v in range(2, min(fewest, MOST_CHUNKS) + 1) if most % v == 0 or v in (2, 4, 8)]:
            if vpp > 1:
                yield schedule, vpp


def _with_layout(base: PlannedRun, layout: Layout) -> PlannedRun:
    """Where no tokens travel to experts (ep 1), settings of how they do are those without effect."""
    training = base.training
    if layout.ep == 1 and base.shape.moe is not None:
        training = replace(training, overlap_expert=False, dispatch_dtype_bytes=2, expert_imbalance=1.0)
    return replace(base, layout=layout, training=training)


def _divided(run: PlannedRun, space: SearchSpace) -> Iterator[PlannedRun]:
    """The run with its divisions of layers over stages, its micro-batches and precisions."""
    layout, training = run.layout, run.training
    sequences = training.global_batch_sequences // layout.dp
    most = max(1, LARGEST_MICROBATCH_TOKENS * layout.cp // training.sequence_length_tokens)
    powers = [2**k for k in range(most.bit_length()) if sequences % 2**k == 0]
    balanced = balanced_stage_layers(run.shape, layout.pp, training.sequence_length_tokens)
    even = even_split(run.shape.num_layers, layout.pp)
    chunks = 2 if layout.schedule == "dualpipev" else layout.vpp
    for stage_layers in ((),) if balanced == even or min(balanced) < chunks else ((), balanced):
        for micro, precision in product(
            space.micro_batch_sequences or powers or (1,), space.precisions or (training.precision,)
        ):
            changed = replace(training, micro_batch_sequences=micro, precision=precision)
            yield replace(run, stage_layers=stage_layers, training=changed)


def memory_settings(training: TrainingPlan, space: SearchSpace, pp: int) -> list[TrainingPlan]:
    """`training` with every allowed choice of what is kept where, recomputation apart, on a pipeline of pp ranks."""
    return [
        replace(
            training, fsdp=fsdp, gradient_dtype_bytes=gradient, moment_dtype_bytes=moment, offload_optimizer=offload
        )
        for fsdp, gradient, moment, offload in product(
            space.fsdp or ((training.fsdp,) if training.fsdp or pp > 1 else (False, True)),
            space.gradient_dtype_bytes or (training.gradient_dtype_bytes,),
            space.moment_dtype_bytes or (training.moment_dtype_bytes,),
            space.offload_optimizer or (training.offload_optimizer,),
        )
    ]  # fmt: skip


def least_work(training: TrainingPlan, space: SearchSpace) -> TrainingPlan:
    """`training` with the allowed settings that make a step shortest; it may not fit into any memory."""
    settings = memory_settings(training, space, pp=1)
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
    lacking = lacking_parts(shape)
    choices = dict.fromkeys(tuple(part for part in choice if part not in lacking) for choice in space.recompute)
    return tuple(sorted(choices, key=lambda choice: (choice == ("layer",), len(choice))))


def held_fixed(base: PlannedRun, space: SearchSpace) -> dict[str, str]:
    """What a search of this run doesn't vary though it could be faster or smaller otherwise, in words, each with the flag that
    frees it."""
    training, moe = base.training, base.shape.moe
    offloaded = (space.offload_optimizer or (training.offload_optimizer,))[0]
    where = "host" if offloaded else "device" if space.offload_optimizer else "device wherever that fits"
    held = {
        "precisions": (space.precisions or (training.precision,))[0],
        "gradient_dtype_bytes": f"gradients of {(space.gradient_dtype_bytes or (training.gradient_dtype_bytes,))[0]} bytes",
        "moment_dtype_bytes": f"moments of {(space.moment_dtype_bytes or (training.moment_dtype_bytes,))[0]} bytes",
        "offload_optimizer": f"optimizer on the {where}",
    }
    found = {_flag(name): text for name, text in held.items() if len(getattr(space, name)) < 2}
    if base.rollout is not None and len(space.placements) == 1:
        found[_flag("placements")] = f"{space.placements[0]} placement"
    if moe is not None:
        found["--training.dispatcher"] = f"dispatcher {training.dispatcher}"
        overlap = training.overlap_expert
        found[f"--training.{'no-' if overlap else ''}overlap-expert"] = f"expert exchange {'' if overlap else 'not '}overlapped"
    return found


def divisors(number: int, most: int) -> list[int]:
    """Divisors of `number` up to `most`, in order."""
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
