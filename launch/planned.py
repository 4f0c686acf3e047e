"""From command lines to the runs that engine.plan predicts: the settings of launch/plan.py, and what grpo.py and evaluate.py
would make of theirs. It imports no torch: a plan shouldn't wait for it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from strop.engine.config import GIB, InputError, Layout, Placement
from strop.engine.plan.candidates import SearchSpace
from strop.engine.plan.check import check, with_batch
from strop.engine.plan.devices import device_named
from strop.engine.plan.models import SHAPES
from strop.engine.plan.report import Prediction
from strop.engine.plan.rollout_memory import holds_a_sequence
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.shape import ModelShape
from strop.engine.plan.states import rank_state_bytes
from strop.engine.plan.validation import Problem, problems
from strop.launch.plan_table import make_console, show, show_generation, show_notes, show_problems

if TYPE_CHECKING:
    from strop.engine.rollout.engine import EngineConfig
    from strop.launch.presets import EvaluateConfig, GrpoConfig

PRECISION_BYTES = {"fp32": 4, "bf16": 2}
ASSUMED_PROMPT_TOKENS = 256
"""Prompts are in the data, which a plan doesn't read."""
ASSUMED_QUESTIONS = 1000
"""Of an evaluation of all questions: how many there are is in the data too."""
QUESTIONS_NOTE = f"How many questions there are is not read either: times are for {ASSUMED_QUESTIONS:,}."
ASSUMED_RESPONSE_SHARE = 0.5
"""Mean length of a response over its limit."""
PROBLEMS_EXIT_CODE = 1


GENERATION = RolloutPlan()


@dataclass(frozen=True)
class PlanConfig:
    """One question to the planner (launch/plan.py)."""

    gpus: int = 8
    """All GPUs of the run."""
    device: str = "h100"
    """Kind of GPU: h100, h800, h200, h20, a100, b200."""
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
    """Try all layouts on these GPUs, rank those that fit, and say why the others don't."""
    space: SearchSpace = field(default_factory=SearchSpace)
    best: int = 10
    """With --search: how many layouts to show."""
    memory_budget_gib: float | None = None
    """With --search: what a rank may take; unset: all that its GPU has."""
    json: Path | None = None
    """Write everything as JSON into this file; units are in its keys."""
    png: Path | None = None
    """Draw memory by part and stage, and the step's timeline, into this file. With --search: of the best layout."""

    def __post_init__(self) -> None:
        for name in ("gpus", "steps", "best"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not self.grpo and (self.rollout != GENERATION or self.placement != "colocated"):
            raise InputError("--rollout.* and --placement have no effect without --grpo: add it, or leave them out")
        if self.grpo and self.training.global_batch_sequences != TrainingPlan().global_batch_sequences:
            raise InputError(
                "--training.global-batch-sequences has no effect with --grpo: the batch is what the samples are packed into, "
                "--rollout.prompts-per-step x --rollout.group-size / --rollout.optimizer-steps of them"
            )
        if self.search and (self.layout != Layout() or self.stage_layers):
            raise InputError("--search tries every layout: fix degrees with --space.* instead of --layout.* and --stage-layers")
        if not self.search and (self.space != SearchSpace() or self.memory_budget_gib is not None):
            raise InputError("--space.* and --memory-budget-gib have no effect without --search: add it, or leave them out")
        if self.search and self.placement != "colocated":
            raise InputError(f"--placement {self.placement}: --search takes placements as --space.placements {self.placement}")
        if self.memory_budget_gib is not None and not self.memory_budget_gib > 0:
            raise InputError(f"--memory-budget-gib {self.memory_budget_gib}: must be above 0")

    def run(self, shape: ModelShape) -> PlannedRun:
        """The run that was asked about; its layout is not resolved yet."""
        return PlannedRun(
            shape, self.gpus, device=self.device, layout=self.layout, stage_layers=self.stage_layers, training=self.training,
            rollout=self.rollout if self.grpo else None, placement=self.placement, steps=self.steps,
        )  # fmt: skip


def shape_at(path: Path) -> ModelShape:
    """The shape of the model in a Hugging Face folder or a config.json. Raises InputError for what is neither."""
    file = path / "config.json" if path.is_dir() else path
    try:
        entries = json.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file} can't be read ({error.strerror}): name a config.json or the folder with it") from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}): name a Hugging Face config.json") from None
    if not isinstance(entries, dict):
        raise InputError(f"{file} holds a {type(entries).__name__}: a Hugging Face config.json holds an object")
    return replace(ModelShape.from_hf(entries, str(file)), name=file.resolve().parent.name)


def shape_of_model(model: str) -> ModelShape:
    """The shape of what --model of a launch file names: tiny, smollm2 or a folder. No weights are made or read."""
    if model == "tiny":
        from strop.engine.model.sources import TINY_CONFIG

        return ModelShape.from_model_config(TINY_CONFIG, "tiny")
    return SHAPES[model] if model in SHAPES else shape_at(Path(model))


def grpo_run(config: "GrpoConfig", gpus: int, device: str) -> PlannedRun:
    """The run that launch/grpo.py makes of this config on `gpus` ranks.

    Its micro-batches are packed, one sequence of microbatch_tokens each. Raises InputError for an unknown device and a layout
    that doesn't fit the ranks.
    """
    train, width = config.train, PRECISION_BYTES[config.precision]
    generation = replace(
        _generation(config.rollout, config.layout, width, config.rollout.max_new_tokens),
        prompts_per_step=config.rollout.prompts_per_step, group_size=config.rollout.group_size,
        prompt_tokens=min(ASSUMED_PROMPT_TOKENS, max(1, train.microbatch_tokens - config.rollout.max_new_tokens)),
        optimizer_steps=train.minibatches, reference=train.loss.kl_coef > 0, old_logprobs=train.minibatches > 1,
    )  # fmt: skip
    training = TrainingPlan(
        sequence_length_tokens=train.microbatch_tokens, precision=config.precision, weights_dtype_bytes=width,
        recompute=("layer",) if train.recompute == "full" else (), resident_gradients=True, overlap_tensor=False,
        overlap_data=False, compiled=False,
    )  # fmt: skip
    run = PlannedRun(
        shape_of_model(config.model), gpus, device=device, layout=config.layout.resolve(gpus), placement=config.placement,
        steps=train.steps, training=training, rollout=generation,
    )  # fmt: skip
    return _with_cache(run, config.rollout.kv_cache_gib)


def evaluation_run(config: "EvaluateConfig", gpus: int, device: str) -> PlannedRun:
    """The generation of launch/evaluate.py with this config on `gpus` ranks; nothing of its training part takes place."""
    width = PRECISION_BYTES[config.precision]
    generation = replace(
        _generation(config.rollout, config.layout, width, config.eval.max_new_tokens),
        prompts_per_step=config.eval.questions or ASSUMED_QUESTIONS, group_size=config.eval.samples,
    )  # fmt: skip
    run = PlannedRun(
        shape_of_model(config.model), gpus, device=device, layout=config.layout.resolve(gpus), rollout=generation,
        training=TrainingPlan(
            ASSUMED_PROMPT_TOKENS + config.eval.max_new_tokens, precision=config.precision, weights_dtype_bytes=width
        ),
    )  # fmt: skip
    return _with_cache(run, config.rollout.kv_cache_gib)


def _generation(engine: "EngineConfig", layout: Layout, width: int, max_new_tokens: int) -> RolloutPlan:
    """What the rollout engine's own settings say: weights are the trainer's and divided as its, kernels are launched one by
    one."""
    return RolloutPlan(
        prompt_tokens=ASSUMED_PROMPT_TOKENS, mean_response_tokens=max(1.0, ASSUMED_RESPONSE_SHARE * max_new_tokens),
        max_response_tokens=max_new_tokens, weights_dtype_bytes=width, kv_dtype_bytes=width, weight_sync="alias",
        tp=layout.tp, pp=layout.pp, ep=layout.ep,
        cuda_graphs=False, max_sequences=engine.max_batch,
    )  # fmt: skip


def _with_cache(run: PlannedRun, kv_cache_gib: float) -> PlannedRun:
    """The run whose engines have a cache of this size: memory_fraction counts it with the weights beside it."""
    weight_bytes = max(rank_state_bytes(run, stage).weights for stage in run.stages())
    fraction = (weight_bytes + kv_cache_gib * GIB) / device_named(run.device).hbm_bytes
    return replace(run, rollout=replace(run.rollout, memory_fraction=fraction))


def assumptions(run: PlannedRun) -> list[str]:
    """What a plan of another launch file's run takes for granted, and what of it the engine can't run yet."""
    rollout = run.rollout
    notes = [
        f"The data is not read: prompts of {rollout.prompt_tokens:,.0f} tokens and responses of "
        f"{rollout.mean_response_tokens:,.0f} on average ({ASSUMED_RESPONSE_SHARE:.0%} of their limit) are assumed. "
        "launch/plan.py takes other lengths."
    ]
    try:
        replace(run.layout, dp=0).require_implemented()
    except InputError as error:
        notes.append(f"The engine can't run this layout yet: {error}.")
    return notes


def predict(run: PlannedRun) -> tuple[Prediction | None, list[Problem]]:
    """(what the run needs and takes, what is wrong with it). None where mistakes leave nothing to predict.

    Raises InputError for an unknown device, and for samples that don't fit into a sequence.
    """
    found = problems(run)
    if found:
        return None, found
    run = with_batch(replace(run, layout=run.layout.resolve(run.training_gpus)))
    found = check(run)
    has_steps = not problems(run) and (run.rollout is None or holds_a_sequence(run))
    return Prediction.of(run) if has_steps else None, found


def show_plan(run: PlannedRun, notes: Sequence[str] = ()) -> tuple[Prediction | None, list[Problem]]:
    """Print the plan of a run, or only what is wrong with it; returns `predict`'s answer."""
    console = make_console()
    prediction, found = predict(run)
    if prediction is None:
        show_problems(found, console)
    else:
        show(prediction, found, console)
    show_notes(notes, console)
    return prediction, found


def plan_grpo(config: "GrpoConfig", gpus: int, device: str) -> int:
    """--plan of launch/grpo.py; returns the exit code."""
    run = grpo_run(config, gpus, device)
    _, found = show_plan(run, assumptions(run))
    return PROBLEMS_EXIT_CODE if found else 0


def plan_evaluation(config: "EvaluateConfig", gpus: int, device: str) -> int:
    """--plan of launch/evaluate.py; returns the exit code."""
    run, console = evaluation_run(config, gpus, device), make_console()
    found = problems(run)
    if found:
        show_problems(found, console)
    else:
        show_generation(run, console)
    show_notes(assumptions(run) + ([] if config.eval.questions else [QUESTIONS_NOTE]), console)
    return PROBLEMS_EXIT_CODE if found else 0
