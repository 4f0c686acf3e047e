"""All that is wrong with a planned run, memory included, each with the settings nearest to it that would work."""

from collections.abc import Iterator
from dataclasses import replace

from ..config import GIB, InputError
from .candidates import RECOMPUTE_CHOICES, SearchSpace, divisors, recompute_choices
from .devices import device_named
from .grpo import GrpoStep, grpo_step
from .memory import StageMemory, memory_per_rank, worst_stage
from .packing import with_batch
from .problem import Problem
from .rollout_memory import cache_shortage, holds_a_sequence
from .run import PlannedRun
from .training import StepTime, train_step
from .validation import problems

NEAREST = 4
"""Changes that are named, fastest first."""
MOST_CHANGES = 4
"""Of settings at once, where one alone isn't enough."""
SMALLEST_PART_BYTES = 0.05 * GIB
"""What a message mentions."""
Change = tuple[str, PlannedRun]
"""A flag with its value, and the run with it."""


def check(run: PlannedRun) -> list[Problem]:
    """All problems of a run whose layout is resolved: those of its settings, else those of memory; [] where it works.

    Raises InputError for an unknown device.
    """
    found = problems(run)
    if found:
        return found
    budget_bytes = device_named(run.device).hbm_bytes
    if not works(run, budget_bytes):
        nearest = tuple(nearest_that_fit(run, budget_bytes))
        found.append(replace(memory_problem(run, budget_bytes), nearest=nearest))
    return found


def works(run: PlannedRun, budget_bytes: float) -> bool:
    """Whether a run without other problems fits into this much memory a GPU, its rollout engines too."""
    if run.rollout is not None and not holds_a_sequence(run):
        return False
    return worst_stage(memory_per_rank(run)).total_bytes <= budget_bytes


def memory_problem(run: PlannedRun, budget_bytes: float) -> Problem:
    """What doesn't fit, in GiB by part."""
    if run.rollout is not None and not holds_a_sequence(run):
        return Problem("rollout.tp", run.rollout.tp, cache_shortage(run))
    return Problem("device", run.device, needs(worst_stage(memory_per_rank(run)), budget_bytes))


def needs(worst: StageMemory, budget_bytes: float) -> str:
    """The memory of a rank that needs too much, largest part first."""
    parts = sorted(worst.parts_bytes.items(), key=lambda part: -part[1])
    named = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in parts if size >= SMALLEST_PART_BYTES)
    while_generating = " while generating" if worst.phase == "rollout" else ""
    return (
        f"stage {worst.stage.index} needs {worst.total_bytes / GIB:.1f} GiB of {budget_bytes / GIB:.1f} GiB{while_generating} "
        f"(GiB: {named})"
    )


def predict(run: PlannedRun) -> StepTime | GrpoStep:
    """A step of the run: of training, or with a rollout of GRPO."""
    return train_step(run) if run.rollout is None else grpo_step(run)


def nearest_that_fit(run: PlannedRun, budget_bytes: float) -> Iterator[str]:
    """Changes of one setting that make the run work, the fastest of each setting, fastest first; where there are none, as few
    changes as it takes, always the one that needs least memory."""
    best: dict[str, tuple[float, str]] = {}
    for flag, changed in changes(run):
        if not works(changed, budget_bytes):
            continue
        try:
            seconds = predict(changed).step_seconds
        except InputError:
            continue
        setting = flag.split(" ")[0]
        if setting not in best or seconds < best[setting][0]:
            need = worst_stage(memory_per_rank(changed)).total_bytes
            best[setting] = seconds, f"{flag} ({need / GIB:.1f} GiB, {seconds:.3g} s a step)"
    if best:
        yield from (text for _, text in sorted(best.values())[:NEAREST])
        return
    flags = []
    for _ in range(MOST_CHANGES):
        options = [(worst_stage(memory_per_rank(changed)).total_bytes, flag, changed) for flag, changed in changes(run)]
        options = [option for option in options if option[2].rollout is None or holds_a_sequence(option[2])]
        if not options or min(options)[0] >= worst_stage(memory_per_rank(run)).total_bytes:
            return
        need, flag, run = min(options, key=lambda option: option[:2])
        flags.append(flag)
        if works(run, budget_bytes):
            yield f"{' '.join(flags)} ({need / GIB:.1f} GiB)"
            return


def changes(run: PlannedRun) -> Iterator[Change]:
    """The run with one setting changed, in every way that leaves no other problem; the work of a step stays the same."""
    for flag, changed in _changes(run):
        try:
            settled = with_batch(replace(changed, layout=replace(changed.layout, dp=0).resolve(changed.training_gpus)))
        except InputError:
            continue
        if not problems(settled):
            yield flag, settled


def _changes(run: PlannedRun) -> Iterator[Change]:
    ranks, shape, layout, training = run.training_gpus, run.shape, run.layout, run.training
    degrees = {name: divisors(ranks, device_named(run.device).gpus_per_node) for name in ("tp", "etp")}
    degrees |= {"cp": divisors(ranks, ranks), "pp": divisors(ranks, shape.num_layers), "vpp": range(2, shape.num_layers + 1)}
    degrees["ep"] = [] if shape.moe is None else divisors(shape.moe.num_experts, ranks)
    for name, degree in ((name, degree) for name, values in degrees.items() for degree in values):
        if degree != getattr(layout, name):
            changed = replace(run, layout=replace(layout, **{name: degree}), stage_layers=())
            # What has no effect without tensor or pipeline parallelism goes with it.
            if name == "tp":
                changed = replace(changed, layout=replace(changed.layout, sp=degree > 1))
            if name == "pp" and degree == 1:
                changed = replace(changed, layout=replace(changed.layout, vpp=1, schedule="1f1b"))
            sequence_parallel = " --layout.sp" if changed.layout.sp > layout.sp else ""
            yield f"--layout.{name} {degree}{sequence_parallel}", changed
    for micro in divisors(training.micro_batch_sequences, training.micro_batch_sequences - 1):
        yield _training_change(run, "micro_batch_sequences", micro)
    for recompute in recompute_choices(shape, SearchSpace(recompute=RECOMPUTE_CHOICES)):
        if recompute != training.recompute:
            yield _training_change(run, "recompute", recompute)
    for name, value in (("gradient_dtype_bytes", 2), ("moment_dtype_bytes", 2), ("offload_optimizer", True), ("fsdp", True)):
        if getattr(training, name) != value:
            yield _training_change(run, name, value)
    if run.rollout is not None:
        yield from _rollout_changes(run)


def _training_change(run: PlannedRun, name: str, value: object) -> Change:
    shown = " ".join(value) if isinstance(value, tuple) else str(value)
    flag = "--training." + name.replace("_", "-")
    return flag if value is True else f"{flag} {shown}".rstrip(), replace(run, training=replace(run.training, **{name: value}))


def _rollout_changes(run: PlannedRun) -> Iterator[Change]:
    rollout = run.rollout
    values: dict[str, list] = {"tp": divisors(run.rollout_gpus, run.rollout_gpus), "memory_fraction": [0.7, 0.6, 0.5, 0.4, 0.3]}
    if run.shape.moe is not None:
        values["ep"] = divisors(run.shape.moe.num_experts, run.rollout_gpus)
    if run.placement == "colocated":
        values["offload_training"] = [True]
    for name, value in ((name, value) for name, options in values.items() for value in options):
        if value != getattr(rollout, name):
            flag = "--rollout." + name.replace("_", "-")
            yield flag if value is True else f"{flag} {value}", replace(run, rollout=replace(rollout, **{name: value}))
