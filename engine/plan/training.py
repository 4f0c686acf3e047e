"""Seconds of one optimizer step: what a pipeline rank computes and says for a micro-batch, through the pipeline, to the update.

layer_time       operations of a layer on one rank
layer_exchange   its collectives, and what hides them
schedules        micro-batches through the pipeline
update_time      gradients, weights and Adam
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .collectives import Transfer
from .devices import device_named
from .facts import train_flops_per_token
from .layer_exchange import (
    DISPATCHER_MULTIPROCESSORS,
    Exchange,
    collective,
    column,
    contention_share,
    embedding_exchanges,
    gathered_weights,
    layer_exchanges,
)
from .layer_time import (
    Operation,
    Work,
    embedding_operations,
    head_operations,
    layer_operations,
    recomputed_share,
)
from .run import PlannedRun, RecomputePart, Stage
from .schedules import PipelineTime, StageSeconds, pipeline_time
from .states import RankParameters, layer_rank_parameters
from .update_time import data_parallel_transfers, gathered_cast_seconds, optimizer_seconds

PARTS = (
    "forward", "backward_input", "backward_weight", "recompute", "launch", "exposed_tensor", "exposed_context",
    "exposed_expert", "exposed_pipeline", "bubble", "exposed_data", "optimizer",
)  # fmt: skip
"""Of StepTime.parts_seconds. The first four are computation, launch is what an eager step loses between kernels."""
EAGER_GAP_SECONDS = 9e-6
"""Lost from one kernel's end to the next one's start in an eager step, beyond what efficiency.LAUNCH_SECONDS has. Fitted on
rows (benchmarks/planner.py --fit).

It stands for two things that the rows don't tell apart: waiting for the CPU's PyTorch, autograd and Python where they don't
stay ahead (short kernels; after a dropless router has synchronised with the host), and whatever else of a GPU-bound pass grows
with the number of its kernels. It is added to every kernel, however long. Charging a pass with the CPU's seconds beyond the
GPU's alone, and a router with its stall, fits worse: FUSED_PASSES becomes 3.5 in its place, near that of eager code, and the
farthest fitted row is off by 31% instead of 25%. Where kernels are long the CPU runs ahead, so that the gain of cuda_graphs is
an upper bound there, and so is what more tensor-parallel ranks or smaller micro-batches cost by having more kernels."""
EXPOSED_PART = {"tp": "exposed_tensor", "cp": "exposed_context", "ep": "exposed_expert", "etp": "exposed_expert"}


@dataclass(frozen=True)
class StepTime:
    """One optimizer step of the busiest pipeline rank, which the others wait for."""

    parts_seconds: dict[str, float]
    """By PARTS; together they are step_seconds."""
    step_seconds: float
    tokens_per_second_per_gpu: float
    """Over the GPUs that train."""
    model_flops_per_gpu_per_second: float
    """Causal attention, nothing counted twice."""
    model_flops_utilization: float
    """Of the device's dense bf16 peak, whatever the precision: FP8 products may take it beyond 1."""
    transfers: tuple[Transfer, ...]
    """Of the busiest rank; those of gradients and weights of the rank that takes longest for them."""
    stage_seconds: tuple[float, ...]
    """What each pipeline rank is busy with its micro-batches."""


PassName = Literal["forward", "backward_input", "backward_weight"]


@dataclass(frozen=True)
class PassTime:
    """A micro-batch through some operations on one rank."""

    seconds: dict[tuple[str, PassName], float]
    """By part of the step (PARTS) and the pass that it belongs to; expert exchanges as if nothing ran beside them."""
    exchanges: tuple[Exchange, ...]

    def __add__(self, other: "PassTime") -> "PassTime":
        total = Counter(self.seconds)
        total.update(other.seconds)
        return PassTime(dict(total), self.exchanges + other.exchanges)

    def stage_seconds(self) -> StageSeconds:
        passes = dict.fromkeys(("forward", "backward_input", "backward_weight"), 0.0)
        exchange = dict(passes)
        for (part, name), seconds in self.seconds.items():
            (exchange if part == "exposed_expert" else passes)[name] += seconds
        return StageSeconds(**passes, forward_exchange=exchange["forward"], backward_exchange=exchange["backward_input"])


NOTHING = PassTime({}, ())


def train_step(run: PlannedRun) -> StepTime:
    """Predict one optimizer step of `run`'s training side.

    Raises InputError for an unknown device, a precision it lacks, or a schedule that the micro-batches don't fit;
    `engine.plan.validation` finds every other mistake.
    """
    work = Work(run, device_named(run.device))
    chunks = chunk_times(work)
    pipeline = pipeline_of(work, chunks)
    stage = run.stages()[pipeline.bottleneck]
    visits = _visits(run, stage)
    parts = _parts(run, chunks, visits, pipeline)
    transfers = _layer_transfers(run, chunks, visits, parts["exposed_expert"])
    if run.layout.pp > 1:
        sent, hop_seconds = pipeline_hop(work)
        count = pipeline_messages(run, stage.index)
        seconds = count * hop_seconds
        # The step waits for hops between other ranks too; those aren't this rank's.
        transfers.append(Transfer("pp", "send_recv", count * sent, count, seconds, min(seconds, pipeline.hop_seconds)))
    exposed, parts["optimizer"], data = _update(work, chunks)
    parts["exposed_data"] += exposed
    transfers += data
    step_seconds = sum(parts.values())
    tokens_per_second = run.step_tokens / step_seconds / run.training_gpus
    shape = run.shape
    flops = train_flops_per_token(shape, run.training.attention_length_tokens, mtp=shape.num_mtp_layers > 0)
    return StepTime(
        parts_seconds=parts,
        step_seconds=step_seconds,
        tokens_per_second_per_gpu=tokens_per_second,
        model_flops_per_gpu_per_second=tokens_per_second * flops,
        model_flops_utilization=tokens_per_second * flops / work.device.bf16_flops_per_second,
        transfers=tuple(transfers),
        stage_seconds=pipeline.busy_seconds,
    )


def _update(work: Work, chunks: Sequence[PassTime]) -> tuple[float, float, list[Transfer]]:
    """(seconds of exposed exchange, seconds of the optimizer, transfers) of the pipeline rank whose update takes longest: all
    ranks wait for each other in the gradients' norm."""
    run = work.run
    updates = {}
    for stage in run.stages():
        held = (*sorted(run.shape.kind(layer) for layer in stage.layers), stage.has_embedding, stage.has_head)
        if held in updates:
            continue
        passes = sum((chunks[chunk] for chunk in _visits(run, stage)), NOTHING).stage_seconds()
        beside = (passes.forward + passes.forward_exchange, passes.backward + passes.backward_exchange)
        data = [] if run.gathers_in_every_pass else data_parallel_transfers(work, stage, *beside)
        updates[held] = sum(one.exposed_seconds for one in data), optimizer_seconds(work, stage), data
    return max(updates.values(), key=lambda update: update[0] + update[1])


def chunk_times(work: Work) -> list[PassTime]:
    """A micro-batch through each chunk of layers, embedding and head with the first and the last one."""
    run, chunks = work.run, work.run.chunks()
    recomputed = run.recomputed_layers()
    made: dict[tuple, PassTime] = {}

    def of_layer(layer: int, recompute: bool) -> PassTime:
        key = (run.shape.kind(layer), run.shape.window_tokens(layer), layer >= run.shape.num_layers, recompute)
        if key not in made:
            made[key] = layer_pass(work, layer, recompute)
        return made[key]

    times = []
    for index, layers in enumerate(chunks):
        total = NOTHING
        for layer in layers:
            total += of_layer(layer, layer in recomputed)
        if index == 0:
            total += _embedding_pass(work)
        if index == len(chunks) - 1:
            head = _head_pass(work)
            for _ in range(1 + run.shape.num_mtp_layers):
                total += head
        times.append(total)
    return times


def layer_pass(work: Work, layer: int, recompute: bool = True) -> PassTime:
    """A micro-batch through one layer (layer >= num_layers: an MTP module, without its head)."""
    operations = layer_operations(work, layer)
    recomputed = work.run.training.recompute if recompute else ()
    exchanges = layer_exchanges(work, layer, {one.name: one for one in operations}, recomputed)
    return _pass(work, operations, exchanges, layer_rank_parameters(work.run, layer), recomputed)


def _vocabulary_matrix(work: Work) -> RankParameters:
    """Embedding or head; where they are one tensor, both passes gather it all the same."""
    return RankParameters(0.0, 0.0, work.run.shape.vocab_size * work.run.shape.hidden_size / work.run.layout.tp)


def _embedding_pass(work: Work) -> PassTime:
    return _pass(work, embedding_operations(work), embedding_exchanges(work), _vocabulary_matrix(work))


def _head_pass(work: Work) -> PassTime:
    operations = head_operations(work)
    exchanges = []
    if work.run.layout.tp > 1:
        exchanges = column(work, work.element_bytes * work.tokens * work.run.shape.hidden_size, operations[1])
    return _pass(work, operations, exchanges, _vocabulary_matrix(work))


def _pass(
    work: Work,
    operations: Sequence[Operation],
    exchanges: list[Exchange],
    held: RankParameters,
    recompute: tuple[RecomputePart, ...] = (),
) -> PassTime:
    """`held`: the parameters that the operations use, on this rank before FSDP divides them."""
    gap = 0.0 if work.run.training.cuda_graphs else EAGER_GAP_SECONDS
    seconds: dict[tuple[str, PassName], float] = defaultdict(float)
    for one in operations:
        again = recomputed_share(one, recompute)
        weight_kernels = one.backward_kernels / 2 if one.backward_weight_seconds else 0.0
        seconds["forward", "forward"] += one.forward_seconds
        seconds["backward_input", "backward_input"] += one.backward_input_seconds
        seconds["backward_weight", "backward_weight"] += one.backward_weight_seconds
        seconds["recompute", "backward_input"] += again * one.forward_seconds
        seconds["launch", "forward"] += gap * one.forward_kernels
        seconds["launch", "backward_input"] += gap * (one.backward_kernels - weight_kernels + again * one.forward_kernels)
        seconds["launch", "backward_weight"] += gap * weight_kernels
    if work.run.gathers_in_every_pass:
        cast_seconds = gathered_cast_seconds(work, held)
        seconds["forward", "forward"] += cast_seconds
        seconds["backward_input", "backward_input"] += cast_seconds
        forward = sum(value for (_, name), value in seconds.items() if name == "forward")
        busy_seconds = {"forward": forward, "backward": sum(seconds.values()) - forward}
        exchanges = exchanges + gathered_weights(work, held, exchanges, busy_seconds)
    for one in exchanges:
        name = "forward" if one.direction == "forward" else "backward_input"
        seconds[EXPOSED_PART.get(one.axis, "exposed_data"), name] += one.exposed_seconds
    return PassTime(dict(seconds), tuple(exchanges))


def pipeline_of(work: Work, chunks: Sequence[PassTime]) -> PipelineTime:
    """The chunks' micro-batches through the run's schedule."""
    run, layout = work.run, work.run.layout
    contention = contention_share(work, DISPATCHER_MULTIPROCESSORS[run.training.dispatcher])
    stages = [chunk.stage_seconds() for chunk in chunks]
    hop_seconds = pipeline_hop(work)[1]
    return pipeline_time(layout.schedule, stages, layout.pp, run.microbatches, hop_seconds, run.pairs_passes, contention)


def pipeline_hop(work: Work) -> tuple[float, float]:
    """(bytes, seconds) of a micro-batch's hidden states from one pipeline rank to the next."""
    if work.run.layout.pp == 1:
        return 0.0, 0.0
    return collective(work, "pp", "send_recv", work.element_bytes * work.tokens_outside * work.run.shape.hidden_size)


def pipeline_messages(run: PlannedRun, rank: int) -> int:
    """Messages that a pipeline rank sends in a step: activations to the rank of each next chunk, gradients to that of the one
    before, unless it holds that chunk itself."""
    ranks = run.ranks_of_chunk()
    count = 0
    for chunk, holders in enumerate(ranks):
        if rank in holders:
            way = holders.index(rank)  # of DualPipe's two directions
            neighbours = [ranks[other][way] for other in (chunk - 1, chunk + 1) if 0 <= other < len(ranks)]
            count += run.microbatches // len(holders) * sum(other != rank for other in neighbours)
    return count


def _visits(run: PlannedRun, stage: Stage) -> dict[int, float]:
    """Chunks of a rank and the share of the micro-batches that pass them there (DualPipe: half in each direction)."""
    return {chunk: 1 / len(ranks) for chunk, ranks in enumerate(run.ranks_of_chunk()) if stage.index in ranks}


def _parts(run: PlannedRun, chunks: Sequence[PassTime], visits: dict[int, float], pipeline: PipelineTime) -> dict[str, float]:
    parts = dict.fromkeys(PARTS, 0.0)
    for chunk, share in visits.items():
        for (part, _), seconds in chunks[chunk].seconds.items():
            parts[part] += run.microbatches * share * seconds
    if run.pairs_passes and parts["exposed_expert"]:
        # What pairs hide of the experts' exchanges, less what they slow down, is missing from the rank's busy time.
        parts["exposed_expert"] += pipeline.busy_seconds[pipeline.bottleneck] - sum(parts.values())
    parts["bubble"] = pipeline.bubble_seconds
    parts["exposed_pipeline"] = pipeline.hop_seconds
    return parts


def _layer_transfers(
    run: PlannedRun, chunks: Sequence[PassTime], visits: dict[int, float], exposed_expert_seconds: float
) -> list[Transfer]:
    """The exchanges of all micro-batches in layers, by axis and kind; what is exposed of the experts' is shared out."""
    found: dict[tuple, list[float]] = {}
    for chunk, share in visits.items():
        for one in chunks[chunk].exchanges:
            sums = found.setdefault((one.axis, one.kind), [0.0, 0.0, 0.0, 0.0])
            for i, value in enumerate((one.sent_bytes, one.count, one.seconds, one.exposed_seconds)):
                sums[i] += run.microbatches * share * value
    expert_seconds = sum(sums[3] for (axis, _), sums in found.items() if axis in ("ep", "etp"))
    transfers = []
    for (axis, kind), (sent, count, seconds, exposed) in found.items():
        if axis in ("ep", "etp"):
            exposed = min(seconds, exposed * exposed_expert_seconds / expert_seconds)
        transfers.append(Transfer(axis, kind, sent, round(count), seconds, exposed))
    return transfers
