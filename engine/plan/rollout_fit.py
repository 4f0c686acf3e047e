"""Whether a model divides over the GPUs of a generation engine, and can use the trainer's weights where it is asked to."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .layout_fit import kv_heads_fit, kv_reason, shared_by
from .problem import Problem, nearest_fitting, nearest_multiples

if TYPE_CHECKING:
    from .run import PlannedRun


def rollout_problems(run: "PlannedRun") -> Iterator[Problem]:
    """The model over the GPUs of a generation engine, and engines over the GPUs that generate."""
    plan, shape, moe = run.rollout, run.shape, run.shape.moe
    if plan is None:
        return
    reasons = _undivided_by_rollout_tp(run, plan.tp)
    nearest = nearest_fitting(plan.tp, run.rollout_gpus, lambda tp: not _undivided_by_rollout_tp(run, tp)) if reasons else ()
    yield from (Problem("rollout.tp", plan.tp, reason, nearest) for reason in reasons)
    if plan.ep > 1 and moe is None:
        yield Problem("rollout.ep", plan.ep, f"{shape.name} has no experts", (1,))
    elif plan.ep > 1 and (moe.num_experts % plan.ep or plan.ep % plan.tp):
        reason = f"must divide {moe.num_experts} experts and be a multiple of rollout.tp {plan.tp}"
        fits = nearest_fitting(plan.ep, run.rollout_gpus, lambda ep: moe.num_experts % ep == 0 and ep % plan.tp == 0)
        yield Problem("rollout.ep", plan.ep, reason, fits)
    if plan.pp > shape.num_layers:
        yield Problem("rollout.pp", plan.pp, f"{shape.num_layers} layers don't fill as many ranks", (shape.num_layers,))
    replicas = plan.ep // plan.tp
    if plan.max_sequences < replicas:
        reason = f"an engine of ep {plan.ep} and tp {plan.tp} has {replicas} replicas, each with a sequence of its own"
        yield Problem("rollout.max_sequences", plan.max_sequences, reason, (replicas,))
    if plan.weight_sync in ("alias", "local_copy"):
        yield from _same_weights_problems(run)
    if run.rollout_gpus % plan.engine_gpus:
        reason = f"generation engines take max(tp {plan.tp}, ep {plan.ep}) x pp {plan.pp} = {plan.engine_gpus} GPUs each"
        if run.placement == "split":
            fits = tuple(gpus for gpus in nearest_multiples(plan.gpus, plan.engine_gpus) if gpus < run.gpus)
            yield Problem("rollout.gpus", plan.gpus, reason, fits)
        else:
            yield Problem("gpus", run.gpus, reason, nearest_multiples(run.gpus, shared_by(run)))


def _undivided_by_rollout_tp(run: "PlannedRun", tp: int) -> list[str]:
    shape, moe = run.shape, run.shape.moe
    counts = {"heads": shape.num_heads, "columns of a dense MLP": shape.dense_intermediate_size}
    if moe is not None and run.rollout.ep == 1:
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
