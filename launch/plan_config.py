"""The settings of launch/plan.py, and the command line that gives a run again."""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro

from strop.engine.config import GIB, InputError, Layout, Placement
from strop.engine.plan.candidates import RECOMPUTE_CHOICES, SEARCHED_SETTINGS, SearchSpace
from strop.engine.plan.devices import DEVICES, device_named
from strop.engine.plan.host_memory import SYSTEM_BYTES_PER_GPU, USABLE_FRACTION
from strop.engine.plan.run import PlannedRun, RecomputePart, RolloutPlan, TrainingPlan
from strop.engine.plan.search_clock import LIMIT_SECONDS
from strop.engine.plan.shape import ModelShape
from strop.engine.plan.text import flag_text, gib_text

GENERATION = RolloutPlan()
HOST_MEMORY_HELP = (
    "Installed memory of a node's host, in GiB; 0: what NVIDIA's own server with this GPU has, "
    f"{device_named('h100').node_host_bytes / GIB:,.0f}. {USABLE_FRACTION:.0%} of it can be used, "
    f"{SYSTEM_BYTES_PER_GPU / GIB:.0f} GiB a GPU by all that isn't the trainer's."
)
DEFAULT_SETTINGS = {"training": TrainingPlan(), "rollout": GENERATION}


@dataclass(frozen=True)
class SpaceFlags(SearchSpace):
    """The search space as flags: --training.recompute fixes what is recomputed."""

    recompute: Annotated[tuple[tuple[RecomputePart, ...], ...], tyro.conf.Suppress] = RECOMPUTE_CHOICES


@dataclass(frozen=True)
class PlanConfig:
    """One question to the planner (launch/plan.py)."""

    gpus: int = 8
    """All GPUs of the run."""
    device: Annotated[str, tyro.conf.arg(help=f"Kind of GPU: {', '.join(DEVICES)}.")] = "h100"
    host_memory_gib: Annotated[float, tyro.conf.arg(help=HOST_MEMORY_HELP)] = 0.0
    grpo: bool = False
    """Plan steps of GRPO: --rollout.* generates, then --training.* learns. Without it: optimizer steps alone."""
    placement: Placement = "colocated"
    """With --grpo. colocated: all GPUs generate, then train; split: --rollout.gpus of them only generate."""
    steps: int = 1
    """Steps of the whole run, for its GPU-hours and energy."""
    stage_layers: tuple[int, ...] = ()
    """Layers of each pipeline stage, first to last; unset divides them evenly."""
    layout: Layout = field(default_factory=Layout)
    training: TrainingPlan = field(default_factory=TrainingPlan)
    rollout: RolloutPlan = GENERATION
    search: bool = False
    """Rank the layouts of --space.* that fit on these GPUs, and say why the others don't. A --training.recompute is kept."""
    space: SpaceFlags = field(default_factory=SpaceFlags)
    best: int = 10
    """With --search: how many layouts to show."""
    search_seconds: float = LIMIT_SECONDS
    """With --search: after these it ends with what it has found, and says what it left open."""
    memory_budget_gib: float | None = None
    """With --search: what a rank may take; unset: what its GPU has, less a reserve of 3%."""
    json: Path | None = None
    """Write everything as JSON into this file; units are in its keys."""
    png: Path | None = None
    """Draw memory by part and stage, and the step's timeline, into this .png file. With --search: of the best layout."""

    def __post_init__(self) -> None:
        for name in ("gpus", "steps", "best"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.png is not None and self.png.suffix.lower() != ".png":
            raise InputError(f"--png {self.png}: a PNG file is written, so name one that ends in .png")
        if self.json is not None and self.png is not None and self.json.resolve() == self.png.resolve():
            raise InputError(f"--json {self.json} and --png {self.png} are one file: name two")
        if not self.grpo and (self.rollout != GENERATION or self.placement != "colocated"):
            raise InputError("--rollout.* and --placement have no effect without --grpo: add it, or leave them out")
        if self.grpo and self.training.global_batch_sequences != TrainingPlan().global_batch_sequences:
            raise InputError(
                "--training.global-batch-sequences has no effect with --grpo: the batch is what the samples are packed into, "
                "--rollout.prompts-per-step x --rollout.group-size / --rollout.optimizer-steps of them"
            )
        if self.search_seconds <= 0:
            raise InputError(f"--search-seconds {self.search_seconds:g}: must be above 0")
        asked = self.space != SpaceFlags() or self.memory_budget_gib is not None or self.search_seconds != LIMIT_SECONDS
        if not self.search and asked:
            raise InputError(
                "--space.*, --search-seconds and --memory-budget-gib have no effect without --search: add it, or leave them out"
            )
        if self.search:
            self._require_unsearched()

    def _require_unsearched(self) -> None:
        """Raises InputError for settings that a search decides itself."""
        if self.layout != Layout() or self.stage_layers:
            raise InputError("--search tries every layout: fix degrees with --space.* instead of --layout.* and --stage-layers")
        if self.placement != "colocated":
            raise InputError(f"--placement {self.placement}: --search takes placements as --space.placements {self.placement}")
        for setting, fixed_by in SEARCHED_SETTINGS.items():
            part, _, name = setting.rpartition(".")
            if part not in DEFAULT_SETTINGS or setting == "training.recompute":
                continue
            value = getattr(getattr(self, part), name)
            if value != getattr(DEFAULT_SETTINGS[part], name):
                flag = flag_text(setting, value)
                if setting == "training.recompute_layers":
                    raise InputError(f"{flag}: --search recomputes in all layers of a rank: leave it out")
                raise InputError(f"{flag}: --search decides it; --{fixed_by.replace('_', '-')} says among which values")
        for name in ("fsdp", "precision", "gradient_dtype_bytes", "moment_dtype_bytes", "offload_optimizer"):
            axis = "precisions" if name == "precision" else name
            value, allowed = getattr(self.training, name), getattr(self.space, axis)
            if value != getattr(TrainingPlan(), name) and allowed and value not in allowed:
                one, other = flag_text(f"training.{name}", value), flag_text(f"space.{axis}", allowed)
                raise InputError(f"{one} and {other} contradict each other: leave one out")

    def memory_budget_bytes(self) -> float | None:
        """What a rank may take; None: not asked for. Raises InputError for what no GPU has."""
        if self.memory_budget_gib is None:
            return None
        budget_bytes, device_bytes = self.memory_budget_gib * GIB, device_named(self.device.lower()).hbm_bytes
        if not 0 < budget_bytes <= device_bytes:
            most = f"{self.device} has {gib_text(device_bytes)} GiB"
            raise InputError(f"--memory-budget-gib {self.memory_budget_gib:g}: must be above 0, and {most}")
        return budget_bytes

    def search_space(self) -> SearchSpace:
        """Of the flags; recomputation as asked for."""
        asked = self.training.recompute
        values = {one.name: getattr(self.space, one.name) for one in fields(SearchSpace)}
        return SearchSpace(**values | ({"recompute": (asked,)} if asked else {}))

    def run(self, shape: ModelShape) -> PlannedRun:
        """The run that was asked about; its layout is not resolved yet."""
        return PlannedRun(
            shape, self.gpus, device=self.device.lower(), host_memory_gib=self.host_memory_gib, layout=self.layout,
            stage_layers=self.stage_layers, training=self.training, rollout=self.rollout if self.grpo else None,
            placement=self.placement, steps=self.steps,
        )  # fmt: skip


def command_of(model: str, run: PlannedRun) -> str:
    """The command line of launch/plan.py that plans a run of this model again."""
    parts = [("", PlanConfig(), run), ("layout.", Layout(), run.layout), ("training.", TrainingPlan(), run.training)]
    skipped = {"shape", "layout", "training", "rollout", "layout.dp"}
    words = ["--grpo"] if run.rollout is not None else []
    if run.rollout is not None:
        parts.append(("rollout.", GENERATION, run.rollout))
        skipped |= {"training.global_batch_sequences", "training.packed_length_tokens"}  # they follow from the samples
    for path, default, part in parts:
        for one in fields(part):
            value, setting = getattr(part, one.name), f"{path}{one.name}"
            if setting not in skipped and (setting == "gpus" or value != getattr(default, one.name)):
                words.append(flag_text(setting, value))
    return " ".join(["python launch/plan.py", shlex.quote(model), *words])
