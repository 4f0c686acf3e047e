"""What an optimizer step takes and holds at the least: cheap enough to order or reject all layouts of a search by.

A search predicts layouts in the order of these bounds and stops where the bound has passed the best predictions, so nothing
faster is left out. What they leave out (waiting for other ranks in the middle of a step, gradients and the optimizer; working
memory and margins) only adds to them.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..config import Layout, PipelineSchedule
from .activations import kept_bytes, layer_working_bytes
from .devices import device_named
from .grpo import SAMPLE_SECONDS, SWITCH_SECONDS, host_copy_seconds, offloaded_states
from .in_flight import most_held_bytes
from .layer_exchange import DISPATCHER_MULTIPROCESSORS, contention_share
from .layer_time import Operation, Work, embedding_operations, head_operations
from .memory import FRAGMENTATION, outside_bytes
from .run import PlannedRun, Stage, TrainingPlan
from .schedules import StageSeconds, pair_seconds
from .shape import ModelShape
from .stages import LayerDivision, chunks_of, ranks_of_chunks
from .states import rank_state_bytes, replicas
from .training import layer_pass
from .update_time import data_parallel_transfers, optimizer_seconds

Array = NDArray[np.float64]


class Bounds:
    """For runs of one search, which differ in what SearchSpace varies; what they share is computed once."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        pieces = _pieces_of_layers(shape)
        self._layers = [pieces.index(piece) for piece in range(max(pieces) + 1)]
        """One layer of each piece."""
        self._seconds: dict[tuple, Array] = {}
        self._states: dict[tuple, Array] = {}
        self._activations: dict[tuple, Array] = {}

    def at_least_seconds(self, run: PlannedRun) -> float:
        """Seconds of an optimizer step of `run`."""
        layout = run.layout
        counts, before = _pipeline(run.shape, layout.pp, layout.schedule, layout.vpp, run.stage_layers)
        pieces = self._piece_seconds(run)
        on_rank = counts @ pieces
        if layout.schedule == "dualpipe" and layout.pp > 1:
            on_rank /= 2  # every stage is on two ranks, which share the micro-batches
        passes, exchanges = on_rank[:, :2].sum(axis=1), on_rank[:, 2:4].sum(axis=1)
        if run.pairs_passes:
            # All as one pair: the time of a pair is convex in its parts, so several pairs together take no less.
            passes = _paired_seconds(run, passes, exchanges)
        else:
            passes += exchanges
        busy = run.microbatches * passes
        waiting = before @ pieces
        # The first micro-batch reaches a rank through the ranks before it, and the last one leaves it backwards through them,
        # while schedules with split backward passes may still compute weight gradients.
        if layout.schedule in ("1f1b", "interleaved"):
            return float((busy + waiting[:, :2].sum(axis=1)).max())
        in_turn = run.microbatches * (on_rank[:, :4].sum(axis=1) - on_rank[:, 4]) + waiting[:, :2].sum(axis=1) - waiting[:, 4]
        without_weights = in_turn.max() if layout.schedule == "zero-bubble" else 0.0
        return float(max((busy + waiting[:, 0]).max(), without_weights))

    def update_at_least_seconds(self, run: PlannedRun) -> float:
        """Of the end of an optimizer step, exchanges of gradients and weights and Adam: of the rank with least of it."""
        layout = run.layout
        counts, _ = _pipeline(run.shape, layout.pp, layout.schedule, layout.vpp, run.stage_layers)
        forward, backward, forward_exchange, backward_exchange, _ = (counts @ self._piece_seconds(run)).T
        work = Work(run, device_named(run.device))
        alike: dict[tuple[float, ...], float] = {}
        for stage, held in zip(run.stages(), map(tuple, counts), strict=True):
            if held not in alike:
                rank = stage.index
                beside = (forward[rank] + forward_exchange[rank], backward[rank] + backward_exchange[rank])
                data = () if run.gathers_in_every_pass else data_parallel_transfers(work, stage, *beside)
                alike[held] = optimizer_seconds(work, stage) + sum(one.exposed_seconds for one in data)
        return min(alike.values())

    def at_least_forward_seconds(self, run: PlannedRun) -> float:
        """Seconds of forward passes of all micro-batches of an optimizer step, as log-probs need them."""
        layout = run.layout
        counts, before = _pipeline(run.shape, layout.pp, layout.schedule, layout.vpp, run.stage_layers)
        pieces = self._piece_seconds(run)
        forward = pieces[:, 0] + pieces[:, 2]
        on_rank = counts @ forward
        if layout.schedule == "dualpipe" and layout.pp > 1:
            on_rank /= 2  # as in at_least_seconds
        through_all = on_rank.sum()  # one micro-batch, which goes through one rank after the other
        if layout.schedule in ("1f1b", "zero-bubble"):
            return float(through_all + (run.microbatches - 1) * on_rank.max())
        return float(max(through_all, (run.microbatches * on_rank + before @ forward).max()))

    def grpo_at_least_seconds(self, run: PlannedRun, step_run: PlannedRun, engine_seconds: float, settled: bool) -> float:
        """Seconds of a GRPO step of `run`, whose trainer sees `step_run` an optimizer step (`grpo.optimizer_step_run`).

        `engine_seconds`: generation, scoring and weight sync with the engines; settled: nothing about its memory is open, so
        that its update and offload are counted.
        """
        plan = run.rollout
        step_seconds = self.at_least_seconds(step_run) + (self.update_at_least_seconds(step_run) if settled else 0.0)
        forward_seconds = self.at_least_forward_seconds(step_run) * (plan.old_logprobs + plan.reference)
        learner_seconds = plan.optimizer_steps * (forward_seconds + plan.train_epochs * step_seconds)
        learner_seconds += plan.samples * SAMPLE_SECONDS
        if run.placement == "colocated" and plan.weight_sync != "alias":
            learner_seconds += SWITCH_SECONDS
        if settled and plan.offload_training:
            learner_seconds += host_copy_seconds(step_run, offloaded_states(plan))
            learner_seconds += host_copy_seconds(step_run, ("weights",)) if plan.reference else 0.0
        return max(engine_seconds, learner_seconds) if plan.steps_ahead else engine_seconds + learner_seconds

    def at_least_bytes(self, run: PlannedRun) -> float:
        """Device memory of the fullest rank while it trains: states, kept activations, a layer's backward pass, margin."""
        layout = run.layout
        counts, _ = _pipeline(run.shape, layout.pp, layout.schedule, layout.vpp, run.stage_layers)
        of_chunks = _layers_of_chunks(run.shape, run.division)
        kept, working = self._piece_activation_bytes(run).T
        held = counts @ self._piece_state_bytes(run) + most_held_bytes(run, of_chunks @ kept)
        held += np.where(of_chunks.any(axis=1), working, 0.0).max(axis=1)
        return float(held.max()) * (1 + FRAGMENTATION) + outside_bytes(run)

    def _piece_seconds(self, run: PlannedRun) -> Array:
        """Of a micro-batch through each piece of the model (layers, embedding, head): forward, backward, both directions'
        expert exchanges, which other passes may hide, and what of backward is for weights."""
        layout, training = run.layout, run.training
        key = (layout.tp, layout.sp, layout.cp, layout.cp_kind, layout.ep, layout.etp, run.edp, run.gathers_in_every_pass)
        key += _settings(training)
        if key not in self._seconds:
            if training.recompute_layers:  # only some of the layers are computed again
                run = replace(run, training=replace(training, recompute=(), recompute_layers=0))
            work = Work(run, device_named(run.device))
            pieces = []
            for layer in self._layers:
                one = layer_pass(work, layer).stage_seconds()
                pieces.append((one.forward, one.backward, one.forward_exchange, one.backward_exchange, one.backward_weight))
            pieces.append(_seconds_of(embedding_operations(work)))
            heads = 1 + self._shape.num_mtp_layers  # each MTP module runs it once more
            pieces.append(heads * np.array(_seconds_of(head_operations(work))))
            self._seconds[key] = np.array(pieces)
        return self._seconds[key]

    def _piece_state_bytes(self, run: PlannedRun) -> Array:
        """Weights, gradients and optimizer states of each piece, and the reference policy's weights."""
        layout, plan = run.layout, run.rollout
        reference = plan is not None and plan.reference and not plan.offload_training
        key = (layout.tp, layout.ep, layout.etp, *replicas(run), reference, *_settings(run.training))
        if key not in self._states:
            layers = [replace(_EMPTY, layers=(layer,)) for layer in self._layers]
            # Of the head's stage only the head: an embedding is weighed once, though MTP has it twice.
            ends = [replace(_EMPTY, has_embedding=True), replace(_EMPTY, has_head=not self._shape.tie_embeddings)]
            found = [rank_state_bytes(run, stage) for stage in layers + ends]
            self._states[key] = np.array([one.on_device + (one.weights if reference else 0.0) for one in found])
        return self._states[key]

    def _piece_activation_bytes(self, run: PlannedRun) -> Array:
        """Of a layer of each kind: what a micro-batch leaves for the backward pass, and what that pass needs in it."""
        layout = run.layout
        key = (layout.tp, layout.sp, layout.cp, layout.cp_kind, layout.etp, layout.ep, *_settings(run.training))
        if key not in self._activations:
            stages = [replace(_EMPTY, layers=(layer,)) for layer in self._layers]
            known = run.training.recompute_layers == 0  # else some of the layers keep less
            kept = [kept_bytes(run, layer) if known else 0.0 for layer in self._layers]
            working = [layer_working_bytes(run, stage) if known else 0.0 for stage in stages]
            self._activations[key] = np.column_stack([kept, working])
        return self._activations[key]


def _settings(training: TrainingPlan) -> tuple:
    """What of a training plan decides a micro-batch's time and memory and differs between the runs of a search."""
    return (
        training.micro_batch_sequences, training.sequence_length_tokens, training.packed_length_tokens, training.recompute,
        training.recompute_layers, training.fsdp, training.gradient_dtype_bytes, training.moment_dtype_bytes,
        training.offload_optimizer, training.precision,
    )  # fmt: skip


_EMPTY = Stage(0, (), False, False)


def _paired_seconds(run: PlannedRun, passes: Array, exchanges: Array) -> Array:
    """Of a micro-batch on each rank, all of its passes beside all of its exchanges; equal ranks are looked at once."""
    contention = contention_share(Work(run, device_named(run.device)), DISPATCHER_MULTIPROCESSORS[run.training.dispatcher])
    nothing = StageSeconds(0.0, 0.0, 0.0)
    ranks = list(zip(passes.tolist(), exchanges.tolist(), strict=True))
    paired = {rank: pair_seconds(StageSeconds(rank[0], 0.0, 0.0, rank[1]), nothing, contention) for rank in set(ranks)}
    return np.array([paired[rank] for rank in ranks])


def _seconds_of(operations: list[Operation]) -> tuple[float, ...]:
    """Of operations without expert exchanges, in the order of `Bounds._piece_seconds`."""
    forward, weight = sum(one.forward_seconds for one in operations), sum(one.backward_weight_seconds for one in operations)
    return forward, sum(one.backward_input_seconds for one in operations) + weight, 0.0, 0.0, weight


@lru_cache(maxsize=8)
def _pieces_of_layers(shape: ModelShape) -> tuple[int, ...]:
    """For each layer and MTP module its piece: layers that cost the same are one piece, numbered as they come."""
    layers = range(shape.num_layers + shape.num_mtp_layers)
    alike = [(shape.kind(layer), shape.window_tokens(layer), layer >= shape.num_layers) for layer in layers]
    pieces = {costs: piece for piece, costs in enumerate(dict.fromkeys(alike))}
    return tuple(pieces[costs] for costs in alike)


@lru_cache(maxsize=512)
def _layers_of_chunks(shape: ModelShape, division: LayerDivision) -> Array:
    """How many layers of each piece a rank has in each of its chunks: [pp, chunk, piece]."""
    pieces = _pieces_of_layers(shape)
    found = [[] for _ in range(division.pp)]
    for layers, ranks in zip(chunks_of(division), ranks_of_chunks(division), strict=True):
        counts = np.bincount([pieces[layer] for layer in layers], minlength=max(pieces) + 1)
        for rank in ranks:
            found[rank].append(counts)
    return np.array(found)


@lru_cache(maxsize=512)
def _pipeline(
    shape: ModelShape, pp: int, schedule: PipelineSchedule, vpp: int, stage_layers: tuple[int, ...]
) -> tuple[Array, Array]:
    """How many of each piece a rank holds, and how many a micro-batch goes through before it reaches the rank."""
    run = PlannedRun(shape, pp, layout=Layout(pp=pp, vpp=vpp, schedule=schedule, dp=1), stage_layers=stage_layers)
    pieces = _pieces_of_layers(shape)
    embedding = max(pieces) + 1
    counts, before = np.zeros((2, pp, embedding + 2))
    for stage in run.stages():
        np.add.at(counts[stage.index], [pieces[layer] for layer in stage.layers], 1)
        counts[stage.index, embedding] = stage.index in run.ranks_of_chunk()[0]
        counts[stage.index, embedding + 1] = stage.has_head
        if schedule != "dualpipe":  # its micro-batches come from both ends
            first = min(stage.layers, default=shape.num_layers if stage.index else 0)
            np.add.at(before[stage.index], [pieces[layer] for layer in range(first)], 1)
    return counts, before
