"""Plans of the launch files: which model is meant, what runs grpo.py and evaluate.py would make of their settings, and what is
printed of them. Nothing here imports torch, so that launch/plan.py doesn't wait for it.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.engine.config import GIB, InputError, Layout
from strop.engine.plan.check import check
from strop.engine.plan.devices import DEVICES, H100, device_named
from strop.engine.plan.models import SHAPES
from strop.engine.plan.packing import with_batch
from strop.engine.plan.problem import Problem
from strop.engine.plan.report import MemoryPrediction, Prediction
from strop.engine.plan.rollout_memory import generating_weight_bytes, holds_a_sequence, sequence_cache_bytes
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.shape import ModelShape
from strop.engine.plan.text import gib_text
from strop.engine.plan.validation import problems
from strop.launch.plan_table import make_console, show, show_generation, show_notes, show_problems
from strop.launch.planned_memory import LaunchedRun

if TYPE_CHECKING:
    from strop.engine.rollout.engine import EngineConfig
    from strop.launch.presets import EvaluateConfig, GrpoConfig

PRECISION_BYTES = {"fp32": 4, "bf16": 2}
ASSUMED_PROMPT_TOKENS = 256
"""Prompts are in the data, which a plan doesn't read."""
ASSUMED_QUESTIONS = 1000
"""Of an evaluation of all questions: how many there are is in the data too."""
QUESTIONS_NOTE = f"How many questions there are is not read either: times are for {ASSUMED_QUESTIONS:,}."
PROBLEMS_NOTE = "Problems name launch/plan.py's flags: of them the run itself has --plan, --layout.* and --placement."
"""Of settings; those of memory have the run's own flags (`planned_memory`)."""
ASSUMED_RESPONSE_SHARE = 0.5
"""Mean length of a response over its limit."""
PROBLEMS_EXIT_CODE = 3
"""Of a plan that doesn't work; 1 is a failure of the planner, 2 a mistake on the command line."""


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
    """The shape of what --model of a launch file names: tiny, a name of SHAPES, a folder or its config.json. No weights are
    made or read."""
    if model == "tiny":
        from strop.engine.model.tiny import TINY_CONFIG

        return ModelShape.from_model_config(TINY_CONFIG, "tiny")
    return SHAPES[model] if model in SHAPES else shape_at(Path(model))


def grpo_run(config: "GrpoConfig", gpus: int, device: str) -> PlannedRun:
    """The run that launch/grpo.py makes of this config on `gpus` ranks.

    Its micro-batches are packed, one sequence of microbatch_tokens each. Where `problems` finds none, the layout is resolved.
    Raises InputError for an unknown device.
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
        overlap_data=False, attention_kernel="flash2", compiled=False,
    )  # fmt: skip
    run = PlannedRun(
        shape_of_model(config.model), gpus, device=device, layout=config.layout, placement=config.placement,
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
        shape_of_model(config.model), gpus, device=device, layout=config.layout, rollout=generation,
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
    """The run whose engines have a cache of this size: memory_fraction counts it with the weights beside it. As it is where
    other settings are wrong. Raises InputError for a cache that no such GPU holds and that may be smaller."""
    device = device_named(run.device)
    if problems(run):
        return run
    run = replace(run, layout=run.layout.resolve(run.training_gpus))
    weight_bytes = generating_weight_bytes(run)
    least_bytes = float(sequence_cache_bytes(run, run.rollout.longest_sample_tokens))
    fraction = (weight_bytes + kv_cache_gib * GIB) / device.hbm_bytes
    if weight_bytes + least_bytes > device.hbm_bytes:
        fraction = 1.0
    if fraction > 1:
        raise InputError(
            f"--rollout.kv-cache-gib {kv_cache_gib:g}: with weights of {gib_text(weight_bytes)} GiB it is more than the "
            f"{gib_text(device.hbm_bytes)} GiB of a GPU: give less"
        )
    return replace(run, rollout=replace(run.rollout, memory_fraction=fraction))


def assumptions(run: PlannedRun) -> list[str]:
    """What a plan of another launch file's run takes for granted, and what of it the engine can't run yet."""
    rollout = run.rollout
    notes = [
        f"The data is not read: prompts of {rollout.prompt_tokens:,.0f} tokens and responses of "
        f"{rollout.mean_response_tokens:,.0f} on average ({ASSUMED_RESPONSE_SHARE:.0%} of their limit) are assumed. "
        "launch/plan.py takes other lengths.",
        "Not counted: loading; of training also evaluations and checkpoints.",
    ]
    try:
        replace(run.layout, dp=0).require_implemented()
    except InputError as error:
        notes.append(f"The engine can't run this layout yet: {error}.")
    return notes


def predict(run: PlannedRun) -> tuple[MemoryPrediction | None, list[Problem]]:
    """(what is predicted of the run, what is wrong with it). None where mistakes leave nothing to predict.

    Raises InputError for an unknown device, and for samples that don't fit into a sequence.
    """
    found = problems(run)
    if found:
        return None, found
    run = with_batch(replace(run, layout=run.layout.resolve(run.training_gpus)))
    return predicted(run), check(run)


def predicted(run: PlannedRun) -> MemoryPrediction:
    """All that can be said of a run without mistakes: what it needs, and what it takes if its engines hold a sequence."""
    has_steps = run.rollout is None or holds_a_sequence(run)
    return (Prediction if has_steps else MemoryPrediction).of(run)


def plan_grpo(config: "GrpoConfig", gpus: int, device: str) -> int:
    """--plan of launch/grpo.py; returns the exit code."""
    require_device(device, gpus)
    of, console = _with_settings(grpo_run, config, device), make_console()
    run = of(config.layout, gpus, config.rollout.kv_cache_gib)
    found = mistakes = problems(run)
    if mistakes:
        show_problems([as_plan_flag(problem, run) for problem in mistakes], console)
    else:
        run = with_batch(run)
        found = LaunchedRun(run, config.rollout.kv_cache_gib, of, trains=True).problems()
        show(predicted(run), [as_plan_flag(problem, run) for problem in found], console)
    show_notes(assumptions(run) + ([PROBLEMS_NOTE] if mistakes else []), console)
    return PROBLEMS_EXIT_CODE if found else 0


def plan_evaluation(config: "EvaluateConfig", gpus: int, device: str) -> int:
    """--plan of launch/evaluate.py; returns the exit code."""
    require_device(device, gpus)
    of, console = _with_settings(evaluation_run, config, device), make_console()
    run = of(config.layout, gpus, config.rollout.kv_cache_gib)
    mistakes = problems(run)
    found = mistakes or LaunchedRun(run, config.rollout.kv_cache_gib, of, trains=False).problems()
    if found:
        show_problems([as_plan_flag(problem, run) for problem in found], console)
    else:
        show_generation(run, console)
    notes = [] if config.eval.questions else [QUESTIONS_NOTE]
    show_notes(assumptions(run) + notes + ([PROBLEMS_NOTE] if mistakes else []), console)
    return PROBLEMS_EXIT_CODE if found else 0


def _with_settings(planned: Callable[..., PlannedRun], config: Any, device: str) -> Callable[[Layout, int, float], PlannedRun]:
    """grpo_run or evaluation_run of this config with another layout, number of GPUs and GiB of KV cache."""

    def of(layout: Layout, gpus: int, kv_cache_gib: float) -> PlannedRun:
        rollout = replace(config.rollout, kv_cache_gib=kv_cache_gib)
        return planned(replace(config, layout=layout, rollout=rollout), gpus, device)

    return of


def require_device(device: str, gpus: int) -> None:
    """Raises InputError, as of --plan, for a GPU that the planner doesn't know."""
    if device not in DEVICES:
        named = device or f"x{gpus}"
        raise InputError(f"--plan {named}: which GPU is that? Name one of {', '.join(DEVICES)}; {H100.name}x8 is eight of them")


def as_plan_flag(problem: Problem, run: PlannedRun) -> Problem:
    """The problem as a launch file with --plan has it, which names kind and number of GPUs."""

    def named(setting: str, values: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        if setting == "gpus":
            return "plan", tuple(f"{run.device}x{gpus}" for gpus in values)
        return ("plan", tuple(f"{device}x{run.gpus}" for device in values)) if setting == "device" else (setting, values)

    setting, (value,) = named(problem.setting, (problem.value,))
    nearest = problem.nearest if problem.planned else named(problem.setting, problem.nearest)[1]
    instead = tuple(named(*other) for other in problem.instead)
    return replace(problem, setting=setting, value=value, nearest=nearest, instead=instead)
