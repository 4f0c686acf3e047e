"""All that is wrong with a planned run, memory included, each with the settings nearest to it that would work."""

import math
from collections.abc import Iterator
from dataclasses import replace

from ..config import GIB, Layout
from .devices import device_named
from .host_memory import SYSTEM_BYTES_PER_GPU, NodeMemory, fullest_node
from .memory import Phase, StageMemory, fits, generating_gpu_bytes, memory_per_rank, memory_phases, worst_stage
from .nearest import fewest_gpus, least_memory_fraction, ways_out
from .problem import Problem
from .rollout_memory import cache_shortage, holds_a_sequence
from .run import PlannedRun
from .text import gib_text, words
from .validation import problems

SMALLEST_PART_BYTES = 0.05 * GIB
"""What a message mentions."""
MEANWHILE: dict[Phase, str] = {
    "training": "", "weight_sync": " while engines get the trainer's weights", "rollout": " while generating"
}  # fmt: skip


def check(run: PlannedRun) -> list[Problem]:
    """All problems of a run whose layout is resolved: those of its settings, else those of memory; [] where it works.

    Raises InputError for an unknown device.
    """
    found = problems(run)
    if found:
        return found
    budget_bytes = device_named(run.device).hbm_bytes
    if not fits(run, budget_bytes):
        *before, last = memory_problems(run, budget_bytes)
        ways, said = ways_out([run], budget_bytes)
        reason = "; ".join(filter(None, [last.reason, said]))
        found = [*before, replace(last, reason=reason, nearest=tuple(map(str, ways)), planned=True)]
    return found


def memory_problems(run: PlannedRun, budget_bytes: float) -> list[Problem]:
    """What doesn't fit of a run that doesn't: its engines, and its trainer with what is on the same GPUs."""
    return [*_engine_memory_problems(run, budget_bytes), *trainer_memory_problems(run, budget_bytes)]


def _engine_memory_problems(run: PlannedRun, budget_bytes: float) -> Iterator[Problem]:
    """A KV cache that doesn't hold a sequence, else a GPU that only generates and needs too much."""
    if run.rollout is None:
        return
    if not holds_a_sequence(run):
        setting = "memory_fraction" if least_memory_fraction(run) < 1 else "tp"
        yield Problem(f"rollout.{setting}", getattr(run.rollout, setting), cache_shortage(run))
    elif run.placement == "split":
        parts_bytes = generating_gpu_bytes(run)
        total_bytes = sum(parts_bytes.values())
        if total_bytes > budget_bytes:
            reason = (
                f"a GPU that generates needs {gib_text(total_bytes)} GiB of {gib_text(budget_bytes)} GiB "
                f"(GiB: {_named(parts_bytes)}); {gib_text(parts_bytes['margin'])} of it beside the engine's share"
            )
            yield Problem("rollout.memory_fraction", run.rollout.memory_fraction, reason)


def trainer_memory_problems(run: PlannedRun, budget_bytes: float) -> Iterator[Problem]:
    """In GiB by part, of each phase: on the device, and on the host of a node."""
    fewest = fewest_gpus(run, budget_bytes)
    if fewest > run.training_gpus:
        filled = f"{fewest:,} GPUs of {gib_text(budget_bytes)} GiB"
        reason = f"weights, gradients and optimizer states alone fill {filled}, and {run.training_gpus:,} train"
        yield Problem("gpus", run.gpus, f"{reason}; {needs(worst_stage(memory_per_rank(run)), budget_bytes)}")
        return
    phases = memory_phases(run)
    worst, node = [worst_stage(phase) for phase in phases], fullest_node(run, phases)
    too_large = [needs(one, budget_bytes) for one in worst if one.total_bytes > budget_bytes]
    if too_large:
        too_large += [host_needs(node)] if node.shortage_bytes else []
        yield Problem("device", run.device, "; ".join(too_large))
    elif node.shortage_bytes:
        fewest = fewest_gpus_of_hosts(run)
        too_few = f"; the hosts of {fewest:,} GPUs at the least hold so much" if fewest > run.training_gpus else ""
        yield Problem("host_memory_gib", f"{node.installed_bytes / GIB:g}", host_needs(node) + too_few)


def needs(worst: StageMemory, budget_bytes: float) -> str:
    """The memory of a rank that needs too much, largest part first."""
    meanwhile = MEANWHILE[worst.phase]
    digits = 1 if round(worst.total_bytes / GIB, 1) != round(budget_bytes / GIB, 1) else 3
    return (
        f"stage {worst.stage.index} needs {worst.total_bytes / GIB:.{digits}f} GiB of {budget_bytes / GIB:.{digits}f} "
        f"GiB{meanwhile} (GiB: {_named(worst.parts_bytes)})"
    )


def host_needs(node: NodeMemory) -> str:
    """The host memory of a node that needs too much, largest part first."""
    return (
        f"the host of a node needs {node.total_bytes / GIB:,.1f} GiB of {node.usable_bytes / GIB:,.1f} usable "
        f"GiB{MEANWHILE[node.phase]} (GiB: {_named(node.parts_bytes)})"
    )


def fewest_gpus_of_hosts(run: PlannedRun) -> int:
    """GPUs whose hosts hold what the run keeps there, each once, however it is laid out."""
    rollout = None if run.rollout is None else replace(run.rollout, gpus=0, tp=1, pp=1, ep=1)
    alone = replace(run, gpus=1, layout=Layout(dp=1), stage_layers=(), rollout=rollout, placement="colocated")
    node = fullest_node(alone, memory_phases(alone))
    held_bytes = node.total_bytes - node.parts_bytes["system"]
    spare_bytes = node.usable_bytes / device_named(run.device).gpus_per_node - SYSTEM_BYTES_PER_GPU
    return math.ceil(held_bytes / spare_bytes) if spare_bytes > 0 else 0


def _named(parts_bytes: dict[str, float]) -> str:
    parts = sorted(parts_bytes.items(), key=lambda part: -part[1])
    return ", ".join(f"{words(name)} {size / GIB:,.1f}" for name, size in parts if size >= SMALLEST_PART_BYTES)
