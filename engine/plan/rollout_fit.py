"""Whether a model divides over the GPUs of a generation engine, and can use the trainer's weights where it is asked to."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from .layout_fit import kv_heads_fit, kv_reason, shared_by
from .problem import Problem, nearest_fitting, nearest_multiples, smallest_change

if TYPE_CHECKING:
    from .run import PlannedRun, RolloutPlan


def rollout_problems(run: "PlannedRun") -> Iterator[Problem]:
    """The model over the GPUs of a generation engine, and engines over the GPUs that generate."""
    plan = run.rollout
    if plan is None:
        return
    found = list(_degree_problems(run))
    replicas = plan.ep // plan.tp
    if plan.max_sequences < replicas:
        reason = f"an engine of ep {plan.ep} and tp {plan.tp} has {replicas} replicas, each with a sequence of its own"
        found.append(Problem("rollout.max_sequences", plan.max_sequences, reason, (replicas,)))
    if plan.shares_weights:
        found += _same_weights_problems(run)
    degrees = {"rollout.tp", "rollout.pp", "rollout.ep"}
    if run.rollout_gpus % plan.engine_gpus and not any(one.setting in degrees and one.nearest for one in found):
        engines = _engines_problem(run)
        found.append(replace(engines, nearest=(), instead=()) if degrees & {one.setting for one in found} else engines)
    yield from found


def _degree_problems(run: "PlannedRun") -> Iterator[Problem]:
    """The model over the degrees of an engine. What is proposed divides the GPUs that generate too."""
    plan, shape, moe = run.rollout, run.shape, run.shape.moe
    reasons = _undivided_by_rollout_tp(run, plan)
    if reasons:
        yield Problem("rollout.tp", plan.tp, ", ".join(reasons), _nearest_degrees(run, "tp"))
    if plan.ep > 1 and moe is None:
        yield Problem("rollout.ep", plan.ep, f"{shape.name} has no experts", (1,))
    elif _undivided_by_rollout_ep(run, plan):
        reason = f"must divide {moe.num_experts} experts and be a multiple of rollout.tp {plan.tp}"
        yield Problem("rollout.ep", plan.ep, reason, _nearest_degrees(run, "ep"))
    if plan.pp > shape.num_layers:
        reason = f"{shape.num_layers} layers don't fill as many ranks"
        yield Problem("rollout.pp", plan.pp, reason, _nearest_degrees(run, "pp"))


def _engines_problem(run: "PlannedRun") -> Problem:
    """Engines over the GPUs that generate: the degree that the smallest change makes right, since the GPUs are what a person
    has. The GPUs, where no degree does alone."""
    plan = run.rollout
    reason = f"engines take max(tp {plan.tp}, ep {plan.ep}) x pp {plan.pp} = {plan.engine_gpus} GPUs each, and "
    reason += f"{run.rollout_gpus} generate"
    setting, value, gpus = "gpus", run.gpus, nearest_multiples(run.gpus, shared_by(run))
    if run.placement == "split":
        setting, value = "rollout.gpus", plan.gpus
        gpus = tuple(count for count in nearest_multiples(plan.gpus, plan.engine_gpus) if count < run.gpus)
    degrees = {f"rollout.{name}": (getattr(plan, name), _nearest_degrees(run, name)) for name in ("tp", "ep", "pp")}
    blamed = smallest_change(degrees)
    if blamed is None:
        return Problem(setting, value, reason, gpus)
    degree, nearest = degrees[blamed]
    return Problem(blamed, degree, reason, nearest, ((setting, gpus),))


def _nearest_degrees(run: "PlannedRun", name: str) -> tuple[int, ...]:
    """Of a degree of the engines, with which model and GPUs divide."""

    def fits(degree: int) -> bool:
        plan = replace(run.rollout, **{name: degree})
        if run.rollout_gpus % plan.engine_gpus or plan.pp > run.shape.num_layers:
            return False
        return not _undivided_by_rollout_tp(run, plan) and not _undivided_by_rollout_ep(run, plan)

    return nearest_fitting(getattr(run.rollout, name), run.rollout_gpus, fits)


def _undivided_by_rollout_ep(run: "PlannedRun", plan: "RolloutPlan") -> bool:
    """Of a model without experts: whether there are several ranks for them."""
    moe = run.shape.moe
    return plan.ep > 1 and (moe is None or moe.num_experts % plan.ep > 0 or plan.ep % plan.tp > 0)


def _undivided_by_rollout_tp(run: "PlannedRun", plan: "RolloutPlan") -> list[str]:
    shape, moe, tp = run.shape, run.shape.moe, plan.tp
    counts = {"heads": shape.num_heads, "columns of a dense MLP": shape.dense_intermediate_size}
    if moe is not None and plan.ep == 1:
        counts["columns of an expert"] = moe.expert_intermediate_size
    reasons = [f"doesn't divide {count} {what}" for what, count in counts.items() if count % tp]
    return reasons if kv_heads_fit(run, tp) else [*reasons, kv_reason(run, "it")]


def _same_weights_problems(run: "PlannedRun") -> Iterator[Problem]:
    """weight_sync alias and local_copy: a GPU generates with the weights that it trains, so both layouts are the same."""
    plan, layout, training = run.rollout, run.layout, run.training
    sync = f"weight_sync {plan.weight_sync} generates with the weights that a GPU trains"
    for axis in ("tp", "pp", "ep"):
        degree = getattr(layout, axis)
        if getattr(plan, axis) != degree:
            yield Problem(f"rollout.{axis}", getattr(plan, axis), f"{sync}, and layout.{axis} is {degree}", (degree,))
    etp = layout.tp if layout.ep == 1 else 1
    if run.shape.moe is not None and layout.etp != etp:
        reason = f"{sync}; engines of tp {layout.tp} and ep {layout.ep} split an expert by {etp}"
        yield Problem("layout.etp", layout.etp, reason, (etp,))
    if layout.pp > 1 and layout.schedule not in ("1f1b", "zero-bubble"):
        reason = f"{sync}, and schedule {layout.schedule} leaves it no consecutive layers"
        yield Problem("rollout.weight_sync", plan.weight_sync, reason, ("reshard",))
    if training.fsdp and layout.dp * layout.cp > 1:
        yield Problem("rollout.weight_sync", plan.weight_sync, f"{sync}, and training.fsdp leaves it a shard", ("reshard",))
    if plan.weight_sync == "alias" and plan.weights_dtype_bytes != training.weights_dtype_bytes:
        reason = f"{sync}, of {training.weights_dtype_bytes} bytes"
        yield Problem("rollout.weights_dtype_bytes", plan.weights_dtype_bytes, reason, (training.weights_dtype_bytes,))
