"""What is wrong with a planned run before anything is predicted: every mistake at once, with the nearest numbers that fit.

Whether it fits into memory is asked by `check.check`, after this.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from .devices import DEVICES
from .layout_fit import (
    batch_problems,
    context_problems,
    expert_problems,
    pipeline_problems,
    rank_problems,
    schedule_problems,
    tensor_problems,
)
from .problem import Problem, nearest_fitting
from .rollout_fit import rollout_problems

if TYPE_CHECKING:
    from .run import PlannedRun
    from .shape import ModelShape

CHECKS = (tensor_problems, expert_problems, context_problems, pipeline_problems, batch_problems, rollout_problems)
FLOAT_BYTES = (1, 2, 4)
MOST_SPREAD = 5
"""Of the logarithm of response lengths: beyond, its moments leave what a float holds."""


def problems(run: "PlannedRun") -> list[Problem]:
    """All mistakes of a run, its layout resolved or not; [] if there are none.

    Impossible values (a degree of 0) and contradictions come alone: what they make of the rest has no meaning. Where the GPUs
    don't divide over the degrees, what depends on the number of replicas isn't looked at.
    """
    found = settings_problems(run)
    if found:
        return found
    found = list(rank_problems(run))
    if found:
        degrees = [*tensor_problems(run), *context_problems(run), *schedule_problems(run)]
        if degrees:  # which no number of GPUs makes right
            changed = all(one.nearest for one in degrees)  # and with them the ranks that the GPUs must hold
            said = {one.setting for one in degrees}
            found = [replace(one, nearest=(), instead=()) for one in found if not changed and one.setting not in said]
        return [*found, *degrees, *expert_problems(run)]
    layout = run.layout
    replicas = run.training_gpus // (layout.tp * layout.cp * layout.pp)
    resolved = replace(run, layout=replace(layout, dp=replicas))
    return [problem for check in CHECKS for problem in check(resolved)]


def settings_problems(run: "PlannedRun") -> list[Problem]:
    """Mistakes that no other layout of training could make right, of a run whose layout may be anybody's."""
    return list(_value_problems(run)) or [*_training_problems(run), *_device_problems(run), *_placement_problems(run)]


def _value_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Values that no other setting could make right."""
    training, rollout = run.training, run.rollout
    least: dict[str, tuple[float, int]] = {"gpus": (run.gpus, 1), "steps": (run.steps, 1)}
    least["host_memory_gib"] = (run.host_memory_gib, 0)
    least |= {f"layout.{name}": (getattr(run.layout, name), 1) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")}
    for name in ("sequence_length_tokens", "global_batch_sequences", "micro_batch_sequences", "expert_imbalance"):
        least[f"training.{name}"] = (getattr(training, name), 1)
    for name in ("packed_length_tokens", "recompute_layers"):
        least[f"training.{name}"] = (getattr(training, name), 0)
    choices: dict[str, tuple[float, tuple[float, ...]]] = {
        "training.weights_dtype_bytes": (training.weights_dtype_bytes, FLOAT_BYTES),
        "training.gradient_dtype_bytes": (training.gradient_dtype_bytes, (2, 4)),
        "training.moment_dtype_bytes": (training.moment_dtype_bytes, FLOAT_BYTES),
        "training.dispatch_dtype_bytes": (training.dispatch_dtype_bytes, (1, 2)),
    }
    if rollout is not None:
        for name in ("prompts_per_step", "group_size", "prompt_tokens", "mean_response_tokens", "max_response_tokens", "tp",
                     "pp", "ep", "max_sequences", "speculative_tokens", "optimizer_steps", "train_epochs"):  # fmt: skip
            least[f"rollout.{name}"] = (getattr(rollout, name), 1)
        for name in ("gpus", "response_spread", "steps_ahead", "reward_seconds"):
            least[f"rollout.{name}"] = (getattr(rollout, name), 0)
        choices["rollout.weights_dtype_bytes"] = (rollout.weights_dtype_bytes, (0.5, *FLOAT_BYTES))
        choices["rollout.kv_dtype_bytes"] = (rollout.kv_dtype_bytes, FLOAT_BYTES)
        if not 0 < rollout.memory_fraction <= 1:
            yield Problem("rollout.memory_fraction", rollout.memory_fraction, "a share of memory is above 0 and at most 1")
    for path, part in (("", run), ("layout.", run.layout), ("training.", training), ("rollout.", rollout)):
        for name, kind in _number_fields(type(part)).items() if part is not None else ():
            setting, value = f"{path}{name}", getattr(part, name)
            if math.isfinite(value) and (kind is float or isinstance(value, int)):
                continue
            _, *nearest = least.pop(setting, (value,))
            if math.isfinite(value):
                yield Problem(setting, value, "must be a whole number", (max(round(value), *nearest),))
            else:
                yield Problem(setting, value, "must be a finite number", tuple(nearest))
    for setting, (value, minimum) in least.items():
        if value < minimum:
            yield Problem(setting, value, f"must be at least {minimum}", (minimum,))
    if rollout is not None and MOST_SPREAD < rollout.response_spread < math.inf:
        reason = f"is the standard deviation of a logarithm: at most {MOST_SPREAD}"
        yield Problem("rollout.response_spread", rollout.response_spread, reason, (MOST_SPREAD,))
    for setting, (value, allowed) in choices.items():
        if value not in allowed:
            yield Problem(setting, value, f"must be {' or '.join(map(str, allowed))} bytes")
    for path, part in (("", run), ("layout.", run.layout), ("training.", training), ("rollout.", rollout)):
        for name, names in _literal_fields(type(part)).items() if part is not None else ():
            value = getattr(part, name)
            if unknown := [one for one in (value if isinstance(value, tuple) else (value,)) if one not in names]:
                yield Problem(f"{path}{name}", unknown[0], f"must be {' or '.join(names)}")


@cache
def _number_fields(part: type) -> dict[str, type]:
    """Fields of a dataclass that are int or float."""
    return {name: hint for name, hint in get_type_hints(part).items() if hint in (int, float)}


@cache
def _literal_fields(part: type) -> dict[str, tuple[str, ...]]:
    """Fields of a dataclass that are one of some names, or a tuple of such. Only the command line enforces their types."""
    hints = {name: get_args(hint)[0] if get_origin(hint) is tuple else hint for name, hint in get_type_hints(part).items()}
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def _training_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Settings of training that exclude each other or have no effect, whatever the numbers of GPUs."""
    training, layout = run.training, run.layout
    if training.packed_length_tokens > training.sequence_length_tokens:
        value, most = training.packed_length_tokens, training.sequence_length_tokens
        yield Problem("training.packed_length_tokens", value, f"what is packed into {most} tokens is no longer", (most,))
    if training.precision == "fp32" and training.weights_dtype_bytes != 4:
        value = training.weights_dtype_bytes
        yield Problem("training.weights_dtype_bytes", value, "precision fp32 has weights of 4 bytes", (4,))
    if training.precision == "bf16" and training.weights_dtype_bytes == 1:
        yield Problem("training.weights_dtype_bytes", 1, "precision bf16 has weights of 2 or 4 bytes", (2, 4))
    yield from _recompute_problems(run)
    if training.resident_gradients and run.rollout is None:
        yield Problem("training.resident_gradients", True, "has no effect without a rollout", (False,))
    if training.recompute_layers > 0 and not training.recompute:
        yield Problem("training.recompute_layers", training.recompute_layers, "has no effect without training.recompute", (0,))
    idle = {"overlap_expert": False, "expert_imbalance": 1, "dispatch_dtype_bytes": 2} if run.shape.moe is None else {}
    for name, without_experts in idle.items():
        if (value := getattr(training, name)) != without_experts:
            yield Problem(f"training.{name}", value, f"{run.shape.name} has no experts", (without_experts,))
    if training.overlap_expert and layout.schedule == "zero-bubble":
        fits = ("1f1b", "interleaved", "dualpipe", "dualpipev")
        yield Problem("layout.schedule", layout.schedule, "has no pairs of passes for training.overlap_expert", fits)
    if layout.sp and layout.tp == 1:
        yield Problem("layout.sp", True, "splits tokens over tensor-parallel ranks, and layout.tp is 1", (False,))
    if layout.cp == 1 and layout.cp_kind != "ring":
        yield Problem("layout.cp_kind", layout.cp_kind, "has no effect while layout.cp is 1", ("ring",))
    if layout.pp == 1 and layout.schedule != "1f1b":
        yield Problem("layout.schedule", layout.schedule, "has no effect while layout.pp is 1", ("1f1b",))
    if layout.vpp > 1 and (layout.pp == 1 or layout.schedule != "interleaved"):
        because = "layout.pp is 1" if layout.pp == 1 else f"layout.schedule is {layout.schedule}, not interleaved"
        yield Problem("layout.vpp", layout.vpp, f"has no effect while {because}", (1,))
    if layout.vpp == 1 and layout.pp > 1 and layout.schedule == "interleaved":
        fits = (2,) if run.shape.num_layers >= 2 * layout.pp else ()
        yield Problem("layout.vpp", layout.vpp, "schedule interleaved needs several chunks a rank", fits)


def _recompute_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Parts that a model doesn't have, or that hold each other."""
    recompute, shape = run.training.recompute, run.shape
    if "layer" in recompute and len(recompute) > 1:
        yield Problem("training.recompute", recompute, "'layer' holds all other parts", (("layer",),))
        return
    lacking = lacking_parts(shape)
    kept = tuple(dict.fromkeys(part for part in recompute if part not in lacking))
    if len(kept) < len(recompute):
        yield Problem("training.recompute", recompute, f"names a part twice, or one that {shape.name} doesn't have", (kept,))
    if "every_second_product" in recompute and (shape.moe is not None or shape.mla is not None):
        reason = f"every_second_product counts the products of a dense Llama layer; {shape.name} has other ones"
        yield Problem("training.recompute", recompute, reason, (("norms", "activation"),))


def lacking_parts(shape: "ModelShape") -> set[str]:
    """Parts of layers that may be recomputed, but that this model doesn't have."""
    kinds = {shape.kind(layer) for layer in range(shape.num_layers)}
    lacks = {"mla_up_projection": shape.mla is None, "dense_mlp": "dense" not in kinds, "experts": "moe" not in kinds}
    return {part for part, lacking in lacks.items() if lacking}


def _device_problems(run: "PlannedRun") -> Iterator[Problem]:
    """FP8 products on a device that has none. An unknown device is `devices.device_named`'s to refuse."""
    if run.device not in DEVICES or DEVICES[run.device].fp8_flops_per_second:
        return
    if run.training.precision.startswith("fp8"):
        yield Problem("training.precision", run.training.precision, f"{run.device} has no FP8 products", ("bf16",))
    if run.rollout is not None and run.rollout.weights_dtype_bytes == 1:
        yield Problem("rollout.weights_dtype_bytes", 1, f"{run.device} has no FP8 products", (2,))


def _placement_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Settings of the rollout that exclude each other or those of training."""
    plan, split = run.rollout, run.placement == "split"
    if plan is None:
        if split:
            yield Problem("placement", run.placement, "nothing is generated: there is no rollout part", ("colocated",))
        return
    if split and not 0 < plan.gpus < run.gpus:
        reason = f"with split placement some of the {run.gpus} GPUs generate and the others train"
        most = (run.gpus - 1) // plan.engine_gpus * plan.engine_gpus
        fits = () if most < 1 else (plan.engine_gpus,) if plan.gpus < 1 else (most,)
        yield Problem("rollout.gpus", plan.gpus, reason, fits)
    if split and plan.shares_weights:
        reason = "with split placement weights come from other GPUs"
        yield Problem("rollout.weight_sync", plan.weight_sync, reason, ("reshard", "broadcast", "stream"))
    if split and plan.offload_training:
        yield Problem("rollout.offload_training", True, "with split placement nobody waits for the trainer's memory", (False,))
    if not split and plan.gpus > 0:
        yield Problem("rollout.gpus", plan.gpus, "with colocated placement all GPUs generate", (0,))
    if not split and plan.steps_ahead > 0:
        yield Problem("rollout.steps_ahead", plan.steps_ahead, "with colocated placement generation waits for training", (0,))
    if plan.mean_response_tokens > plan.max_response_tokens:
        reason = f"responses are cut at {plan.max_response_tokens} tokens, so their mean is no longer"
        yield Problem("rollout.mean_response_tokens", plan.mean_response_tokens, reason, (plan.max_response_tokens,))
    if plan.longest_sample_tokens > run.training.sequence_length_tokens:
        reason = f"a prompt of {plan.prompt_tokens:g} tokens and a response of up to {plan.max_response_tokens} must fit"
        value, fits = run.training.sequence_length_tokens, (plan.longest_sample_tokens,)
        yield Problem("training.sequence_length_tokens", value, reason, fits)
    if plan.speculative_tokens > plan.max_response_tokens:
        reason = f"a step accepts no more than a response of {plan.max_response_tokens} tokens"
        yield Problem("rollout.speculative_tokens", plan.speculative_tokens, reason, (plan.max_response_tokens,))
    if plan.samples % plan.optimizer_steps:
        reason = f"{plan.samples} samples don't divide into as many mini-batches"
        fits = nearest_fitting(plan.optimizer_steps, plan.samples, lambda steps: plan.samples % steps == 0)
        yield Problem("rollout.optimizer_steps", plan.optimizer_steps, reason, fits)
