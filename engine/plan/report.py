"""Everything that is predicted of one run, together: `Prediction`, and the same as a dict for JSON with a unit in every key."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from .collectives import Axis, Transfer, members_per_node
from .devices import DeviceFacts, device_named
from .facts import (
    active_parameters,
    forward_flops_per_token,
    kv_bytes_per_token,
    parameters,
    total_parameters,
    train_flops_per_token,
)
from .grpo import GrpoStep, WholeRun, grpo_step, optimizer_step_run, whole_run
from .host_memory import NodeMemory, fullest_node
from .memory import Phase, StageMemory, generating_gpu_bytes, memory_phases, outside_bytes, worst_stage
from .rollout_memory import generating_weight_bytes, rollout_kv_cache_bytes
from .run import PlannedRun
from .text import gib_text
from .training import StepTime, train_step

AXES: tuple[Axis, ...] = ("tp", "cp", "pp", "dp", "etp", "ep", "edp")


@dataclass(frozen=True)
class AxisSpan:
    """The groups of one axis of the layout."""

    axis: Axis
    ranks: int
    """Of one group."""
    groups: int
    """Of all training GPUs."""
    ranks_per_node: int
    """Members of one group that share a node."""

    @property
    def spans_nodes(self) -> bool:
        return self.ranks > self.ranks_per_node


@dataclass(frozen=True)
class MemoryRow:
    """The memory of one GPU of several that need the same, to the digit that people are shown."""

    label: str
    """Pipeline stages, "0-2"; "engines" for GPUs that only generate."""
    phase: Phase
    parts_bytes: Mapping[str, float]
    total_bytes: float
    is_worst: bool
    """Whether the fullest rank of the fullest phase is among them."""


@dataclass(frozen=True)
class MemoryPrediction:
    """What one run needs."""

    run: PlannedRun
    """With a rollout, its training plan's batch is what follows from the samples (`optimizer_step_run`)."""
    device: DeviceFacts
    memory: tuple[StageMemory, ...]
    """Of one rank of each pipeline stage, one phase after another (`memory_phases`)."""
    memory_budget_bytes: float
    """What a rank may take."""

    @staticmethod
    def of(run: PlannedRun, memory_budget_bytes: float | None = None) -> "MemoryPrediction":
        """Of a run whose layout is resolved and in which `engine.plan.validation.problems` finds nothing.

        memory_budget_bytes: what a rank may take; None: all that the device has. Raises InputError for an unknown device and
        where samples don't fit into a sequence.
        """
        device = device_named(run.device)
        budget_bytes = device.hbm_bytes if memory_budget_bytes is None else min(memory_budget_bytes, device.hbm_bytes)
        if run.rollout is not None:
            run = replace(run, training=optimizer_step_run(run).training)
        return MemoryPrediction(run, device, tuple(rank for phase in memory_phases(run) for rank in phase), budget_bytes)

    @property
    def worst(self) -> StageMemory:
        return worst_stage(self.memory)

    @property
    def headroom_bytes(self) -> float:
        """Left of the budget on the fullest rank in its fullest phase; negative where the run doesn't fit."""
        return self.memory_budget_bytes - self.worst.total_bytes

    def worst_of_phases(self) -> tuple[StageMemory, ...]:
        """The fullest rank of each phase."""
        return tuple(map(worst_stage, self._phases()))

    def fullest_node(self) -> NodeMemory:
        """The node that needs most of its host, in the phase that needs most."""
        return fullest_node(self.run, self._phases())

    def _phases(self) -> list[tuple[StageMemory, ...]]:
        return [tuple(ranks) for _, ranks in groupby(self.memory, key=lambda one: one.phase)]

    def spans(self) -> tuple[AxisSpan, ...]:
        """Axes with more than one rank a group."""
        layout, node = self.run.layout, self.device.gpus_per_node
        sizes = {axis: self.run.edp if axis == "edp" else getattr(layout, axis) for axis in AXES}
        if self.run.shape.moe is None:
            sizes = {axis: size for axis, size in sizes.items() if axis not in ("etp", "ep", "edp")}
        return tuple(
            AxisSpan(axis, size, self.run.training_gpus // size, members_per_node(layout, axis, node))
            for axis, size in sizes.items() if size > 1
        )  # fmt: skip

    def memory_rows(self) -> list[MemoryRow]:
        """Consecutive stages together that look the same in the same phase; then the GPUs that only generate."""
        found = []
        for _, group in groupby(self.memory, key=_as_shown):
            stages = list(group)
            fullest = worst_stage(tuple(stages))
            label = "-".join(str(index) for index in dict.fromkeys((stages[0].stage.index, stages[-1].stage.index)))
            is_worst = any(one is self.worst for one in stages)
            found.append(MemoryRow(label, fullest.phase, fullest.parts_bytes, fullest.total_bytes, is_worst))
        if self.run.rollout is not None and self.run.placement == "split":
            parts_bytes = generating_gpu_bytes(self.run)
            found.append(MemoryRow("engines", "rollout", parts_bytes, sum(parts_bytes.values()), False))
        return found

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        run, shape = self.run, self.run.shape
        return {
            "model": {
                "name": shape.name,
                "notes": list(shape.notes),
                "total_parameters": total_parameters(shape),
                "active_parameters": active_parameters(shape),
                "active_non_embedding_parameters": active_parameters(shape, embedding=False),
                "parameters_by_kind": parameters(shape),
                "forward_flops_per_token": forward_flops_per_token(shape, run.training.sequence_length_tokens),
                "train_flops_per_token": train_flops_per_token(shape, run.training.sequence_length_tokens),
                "kv_cache_bytes_per_token": kv_bytes_per_token(shape),
            },
            "gpus": run.gpus,
            "training_gpus": run.training_gpus,
            "rollout_gpus": run.rollout_gpus,
            "placement": run.placement,
            "device": asdict(self.device),
            "layout": asdict(run.layout) | {"stage_layers": list(run.stage_layers)},
            "axes": [asdict(span) | {"spans_nodes": span.spans_nodes} for span in self.spans()],
            "training": asdict(run.training),
            "rollout": None if run.rollout is None else asdict(run.rollout),
            "memory_per_rank": {
                "stages": [stage_as_dict(one) for one in self.memory],
                "worst_stage_index": self.worst.stage.index,
                "worst_phase": self.worst.phase,
                "memory_budget_bytes": self.memory_budget_bytes,
                "headroom_bytes": self.headroom_bytes,
            },
            "host_memory_per_node": node_as_dict(self.fullest_node()),
            "generating_gpu": None
            if run.rollout is None
            else {
                "weights_bytes": generating_weight_bytes(run),
                "kv_cache_bytes": rollout_kv_cache_bytes(run),
                "margin_bytes": generating_gpu_bytes(run)["margin"] if run.placement == "split" else outside_bytes(run),
            },
        }


@dataclass(frozen=True)
class Prediction(MemoryPrediction):
    """What one run needs and takes."""

    training: StepTime
    """One optimizer step."""
    grpo: GrpoStep | None
    """None where training alone was planned."""
    whole: WholeRun

    @staticmethod
    def of(run: PlannedRun, memory_budget_bytes: float | None = None) -> "Prediction":
        """As `MemoryPrediction.of`. Raises InputError also where engines have no memory for a KV cache."""
        grpo = None if run.rollout is None else grpo_step(run)
        training, whole = train_step(run) if grpo is None else grpo.training, whole_run(run)
        return Prediction(**vars(MemoryPrediction.of(run, memory_budget_bytes)), training=training, grpo=grpo, whole=whole)

    def transfers_by_axis(self) -> dict[str, tuple[Transfer, ...]]:
        """Transfers of the training step, grouped."""
        axes = dict.fromkeys(transfer.axis for transfer in self.training.transfers)
        return {axis: tuple(one for one in self.training.transfers if one.axis == axis) for axis in axes}

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return super().as_dict() | {
            "training_step": asdict(self.training),
            "grpo_step": None if self.grpo is None else grpo_as_dict(self.grpo),
            "whole_run": asdict(self.whole) | {"steps": self.run.steps},
        }


def _as_shown(memory: StageMemory) -> tuple:
    return memory.phase, gib_text(memory.total_bytes), *map(gib_text, memory.parts_bytes.values())


def stage_as_dict(memory: StageMemory) -> dict[str, Any]:
    stage = memory.stage
    return {
        "stage_index": stage.index,
        "layers": list(stage.layers),
        "phase": memory.phase,
        "parts_bytes": dict(memory.parts_bytes),
        "total_bytes": memory.total_bytes,
        "host_parts_bytes": dict(memory.host_parts_bytes),
        "host_bytes": memory.host_bytes,
    }


def node_as_dict(node: NodeMemory) -> dict[str, Any]:
    return asdict(node) | {"total_bytes": node.total_bytes, "usable_bytes": node.usable_bytes}


def grpo_as_dict(step: GrpoStep) -> dict[str, Any]:
    """Without its optimizer step, which stands beside it."""
    content = asdict(step)
    del content["training"]
    rollout = content["rollout"]
    full, alone = rollout.pop("step_seconds")
    rollout["decoding_step_seconds"] = {"with_most_sequences": full, "with_one_sequence": alone}
    curve = rollout.pop("curve")
    rollout["curve"] = [{"decoding_seconds": seconds, "active_sequences": active} for seconds, active in curve]
    return content
