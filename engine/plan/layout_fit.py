"""Whether a model, a batch and a number of GPUs divide over the degrees of a layout."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import Layout
from .problem import Problem, nearest_fitting, nearest_multiples, smallest_change

if TYPE_CHECKING:
    from .run import PlannedRun


def rank_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Whether the training GPUs divide over the degrees. Until they do, nothing below can be asked."""
    layout, ranks = run.layout, run.training_gpus
    model_ranks = layout.tp * layout.cp * layout.pp
    if ranks % model_ranks:
        yield _model_ranks_problem(run)
    elif layout.dp not in (0, ranks // model_ranks):
        reason = f"{ranks} training GPUs with tp {layout.tp} x cp {layout.cp} x pp {layout.pp} give another number of replicas"
        yield Problem("layout.dp", layout.dp, reason, (ranks // model_ranks,))
    elif run.shape.moe is not None and ranks // layout.pp % (layout.ep * layout.etp):
        dense_ranks = ranks // layout.pp
        reason = f"ep x etp = {layout.ep * layout.etp} doesn't divide dp x cp x tp = {dense_ranks}"
        if dense_ranks % layout.etp:
            fits = nearest_fitting(layout.etp, dense_ranks, lambda etp: _etp_fits(run, etp))
            yield Problem("layout.etp", layout.etp, reason, fits)
        else:
            fits = nearest_fitting(layout.ep, dense_ranks, lambda ep: _ep_fits(run, ep))
            yield Problem("layout.ep", layout.ep, reason, fits)


def _model_ranks_problem(run: "PlannedRun") -> Problem:
    """The degree that the smallest change makes right: the GPUs are what a person has. The GPUs, where no degree does alone."""
    layout, ranks = run.layout, run.training_gpus
    model_ranks = layout.tp * layout.cp * layout.pp
    reason = f"{ranks} training GPUs can't hold tp {layout.tp} x cp {layout.cp} x pp {layout.pp} = {model_ranks}"
    gpus = tuple(run.gpus - ranks + fit for fit in nearest_multiples(ranks, shared_by(run)))
    degrees = {"layout.tp": (layout.tp, _nearest_tp(run)), "layout.cp": (layout.cp, _nearest_cp(run))}
    if not run.stage_layers:  # which are for this pp
        degrees["layout.pp"] = (layout.pp, _nearest_pp(run))
    setting = smallest_change(degrees)
    if setting is None:
        return Problem("gpus", run.gpus, reason, gpus)
    degree, nearest = degrees[setting]
    return Problem(setting, degree, reason, nearest, (("gpus", gpus),))


def shared_by(run: "PlannedRun") -> int:
    """What the number of training GPUs must be a multiple of: replicas, and where they generate too, engines."""
    model_ranks = run.layout.tp * run.layout.cp * run.layout.pp
    colocated = run.rollout is not None and run.placement == "colocated"
    return math.lcm(model_ranks, run.rollout.engine_gpus) if colocated else model_ranks


def tensor_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Widths that tensor parallelism divides."""
    layout = run.layout
    reasons = _undivided_by_tp(run, layout.tp)
    if reasons:
        yield Problem("layout.tp", layout.tp, ", ".join(reasons), _nearest_tp(run))


def _nearest_tp(run: "PlannedRun") -> tuple[int, ...]:
    most = run.training_gpus // (run.layout.cp * run.layout.pp)
    return nearest_fitting(run.layout.tp, most, lambda tp: _ranks_fit(run, tp=tp) and not _undivided_by_tp(run, tp))


def _undivided_by_tp(run: "PlannedRun", tp: int) -> list[str]:
    shape, moe = run.shape, run.shape.moe
    counts = {"heads": shape.num_heads, "tokens of the vocabulary": shape.vocab_size}
    counts["columns of a dense MLP"] = shape.dense_intermediate_size
    counts["columns of the shared experts"] = moe.shared_intermediate_size if moe is not None else 0
    if run.layout.sp:
        counts["tokens of a micro-batch"] = run.microbatch_tokens
    reasons = [f"doesn't divide {count} {what}" for what, count in counts.items() if count % tp]
    return reasons if kv_heads_fit(run, tp) else [*reasons, kv_reason(run, "it")]


def kv_heads_fit(run: "PlannedRun", ranks: int) -> bool:
    """Every rank gets as many key/value heads, or every head as many copies. Latent attention has a key for each head."""
    kv_heads = run.shape.num_kv_heads
    return run.shape.mla is not None or kv_heads % ranks == 0 or ranks % kv_heads == 0


def kv_reason(run: "PlannedRun", ranks: str) -> str:
    return f"{run.shape.num_kv_heads} key/value heads neither divide by {ranks} nor can all be copied equally often"


def _ranks_fit(run: "PlannedRun", tp: int = 0, cp: int = 0, pp: int = 0) -> bool:
    """Whether the training GPUs would divide with one degree changed."""
    layout = run.layout
    return run.training_gpus % ((tp or layout.tp) * (cp or layout.cp) * (pp or layout.pp)) == 0


def expert_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Experts over ep, their columns over etp, and settings of their exchange."""
    layout, moe = run.layout, run.shape.moe
    if moe is None:
        for name in ("ep", "etp"):
            if getattr(layout, name) > 1:
                yield Problem(f"layout.{name}", getattr(layout, name), f"{run.shape.name} has no experts", (1,))
        return
    dense_ranks = run.training_gpus // layout.pp
    if layout.tp > 1 and not layout.sp:
        reason = "with experts, tensor-parallel ranks divide the tokens between them (as Megatron-LM requires)"
        yield Problem("layout.sp", False, reason, (True,))
    if run.training.expert_imbalance > layout.ep:
        reason = f"the busiest of ep {layout.ep} ranks gets {layout.ep} times the mean at most"
        yield Problem("training.expert_imbalance", run.training.expert_imbalance, reason, (layout.ep,))
    if layout.ep == 1 and run.training.overlap_expert:
        yield Problem("training.overlap_expert", True, "has no effect while layout.ep is 1: no tokens travel", (False,))
    if layout.ep == 1 and run.training.dispatch_dtype_bytes != 2:
        value = run.training.dispatch_dtype_bytes
        yield Problem("training.dispatch_dtype_bytes", value, "has no effect while layout.ep is 1: no tokens travel", (2,))
    if moe.num_experts % layout.ep:
        nearest = nearest_fitting(layout.ep, dense_ranks, lambda ep: _ep_fits(run, ep))
        yield Problem("layout.ep", layout.ep, f"doesn't divide {moe.num_experts} experts", nearest)
    width = moe.expert_intermediate_size
    if width % layout.etp:
        nearest = nearest_fitting(layout.etp, dense_ranks, lambda etp: _etp_fits(run, etp))
        yield Problem("layout.etp", layout.etp, f"doesn't divide {width} columns of an expert", nearest)


def _ep_fits(run: "PlannedRun", ep: int) -> bool:
    """Whether experts and training GPUs of a model that has experts would divide."""
    return run.shape.moe.num_experts % ep == 0 and run.training_gpus // run.layout.pp % (ep * run.layout.etp) == 0


def _etp_fits(run: "PlannedRun", etp: int) -> bool:
    """Whether the columns of an expert and training GPUs would."""
    columns = run.shape.moe.expert_intermediate_size
    return columns % etp == 0 and run.training_gpus // run.layout.pp % (run.layout.ep * etp) == 0


def context_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Sequences, and with ulysses heads, over cp."""
    cp = run.layout.cp
    if cp == 1:
        return
    reasons = _undivided_by_cp(run, cp)
    if reasons:
        yield Problem("layout.cp", cp, ", ".join(reasons), _nearest_cp(run), _lengths_that_cp_divides(run))


def _nearest_cp(run: "PlannedRun") -> tuple[int, ...]:
    most = run.training_gpus // (run.layout.tp * run.layout.pp)
    return nearest_fitting(run.layout.cp, most, lambda cp: _ranks_fit(run, cp=cp) and not _undivided_by_cp(run, cp))


def _lengths_that_cp_divides(run: "PlannedRun") -> tuple[tuple[str, tuple[int, ...]], ...]:
    """For Problem.instead: lengths of a sequence with which nothing is in the way of cp."""
    training, least = run.training, 0 if run.rollout is None else run.rollout.longest_sample_tokens
    unit = (2 if run.layout.cp_kind == "ring" else 1) * run.layout.cp
    if training.sequence_length_tokens % unit == 0 or not _ranks_fit(run):
        return ()
    lengths = []
    for length in nearest_multiples(training.sequence_length_tokens, unit):
        changed = replace(run, training=replace(training, sequence_length_tokens=length))
        if length >= max(least, training.packed_length_tokens) and not _undivided_by_cp(changed, run.layout.cp):
            lengths.append(length)
    return (("training.sequence_length_tokens", tuple(lengths)),)


def _undivided_by_cp(run: "PlannedRun", cp: int) -> list[str]:
    tokens = run.training.sequence_length_tokens
    if cp == 1:
        return []
    if run.layout.cp_kind == "ring":  # each rank has an early and a late part, so that causal attention is balanced
        return [f"a sequence of {tokens} tokens doesn't divide into 2 parts a rank"] if tokens % (2 * cp) else []
    reasons = [f"doesn't divide a sequence of {tokens} tokens"] if tokens % cp else []
    ranks = run.layout.tp * cp
    if run.shape.num_heads % ranks:
        reasons.append(f"ulysses divides {run.shape.num_heads} heads by tp x cp = {ranks}, which doesn't go")
    return reasons if kv_heads_fit(run, ranks) else [*reasons, kv_reason(run, f"tp x cp = {ranks}")]


def pipeline_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Layers over pipeline ranks and their chunks."""
    layout, layers = run.layout, run.shape.num_layers
    undivided = [*_stage_layers_problems(run)] or [*schedule_problems(run)]
    if undivided:
        yield from undivided
    elif not _chunks_filled(run):
        if layout.schedule != "interleaved":
            yield Problem("stage_layers", run.stage_layers, "leaves a rank, or a chunk of one, without layers")
            return
        nearest = nearest_fitting(layout.vpp, layers, lambda vpp: vpp > 1 and _chunks_filled(_with_vpp(run, vpp)))
        fewest = min(run.stage_layers or (layers // layout.pp,))
        yield Problem("layout.vpp", layout.vpp, f"a rank with {fewest} layers doesn't fill as many chunks", nearest)
    else:
        yield from _recompute_layers_problems(run)


def _recompute_layers_problems(run: "PlannedRun") -> Iterator[Problem]:
    """training.recompute_layers over the layers of a rank."""
    given, most = run.training.recompute_layers, max(len(stage.layers) for stage in run.stages())
    if given > most:
        yield Problem("training.recompute_layers", given, f"no rank has more than {most} layers", (most,))


def schedule_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Pipeline ranks that a schedule can't use or layers can't fill, however many GPUs there are."""
    layout, layers = run.layout, run.shape.num_layers
    if layout.schedule == "dualpipe" and layout.pp > 1 and layout.pp % 2:
        yield Problem("layout.pp", layout.pp, "schedule dualpipe pairs the ranks", _nearest_pp(run))
    elif not _layers_fill(run, layout.pp):
        chunks = " of two chunks" if layout.schedule == "dualpipev" else ""
        yield Problem("layout.pp", layout.pp, f"{layers} layers don't fill as many ranks{chunks}", _nearest_pp(run))


def _stage_layers_problems(run: "PlannedRun") -> Iterator[Problem]:
    given, layers = run.stage_layers, run.shape.num_layers
    if given and len(given) != run.layout.pp:
        yield Problem("stage_layers", given, f"is for {len(given)} ranks, and layout.pp is {run.layout.pp}")
    elif given and min(given) < 0:
        yield Problem("stage_layers", given, "a rank has 0 layers or more")
    elif given and sum(given) != layers:
        last = given[-1] + layers - sum(given)
        nearest = ((*given[:-1], last),) if last >= 0 else ()
        yield Problem("stage_layers", given, f"has {sum(given)} layers in all; {run.shape.name} has {layers}", nearest)


def _nearest_pp(run: "PlannedRun") -> tuple[int, ...]:
    return nearest_fitting(run.layout.pp, run.shape.num_layers, lambda pp: _pp_fits(run, pp))


def _pp_fits(run: "PlannedRun", pp: int) -> bool:
    layout = run.layout
    expert_ranks = layout.ep * layout.etp if run.shape.moe is not None else 1
    if not _ranks_fit(run, pp=pp) or run.training_gpus // pp % expert_ranks:
        return False
    return _layers_fill(run, pp) and (layout.schedule != "dualpipe" or pp % 2 == 0)


def _layers_fill(run: "PlannedRun", pp: int) -> bool:
    chunks_per_rank = 2 if run.layout.schedule == "dualpipev" and pp > 1 else 1
    return pp * chunks_per_rank <= run.shape.num_layers


def _chunks_filled(run: "PlannedRun") -> bool:
    return all(run.chunks()[1:-1])  # the first and the last one have embedding and head to work on


def _with_vpp(run: "PlannedRun", vpp: int) -> "PlannedRun":
    return replace(run, layout=replace(run.layout, vpp=vpp))


def microbatch_rule(layout: Layout) -> tuple[int, int]:
    """The number of micro-batches a replica that a schedule takes: (a multiple of this, this many at least)."""
    pp = layout.pp
    return {"interleaved": (pp, pp), "dualpipe": (2, 2 * pp), "dualpipev": (1, 2 * pp)}.get(layout.schedule, (1, 1))


def batch_problems(run: "PlannedRun") -> Iterator[Problem]:
    """Sequences of a step over replicas and micro-batches, and micro-batches over the schedule. With a rollout they follow
    from the samples, so that they always fit (`packing.packed_training`)."""
    if run.rollout is not None:
        return
    layout, training, pp = run.layout, run.training, run.layout.pp
    batch, micro = training.global_batch_sequences, training.micro_batch_sequences
    multiple, fewest = microbatch_rule(layout)

    def divides(sequences: int) -> bool:
        unit = layout.dp * sequences
        return batch % (unit * multiple) == 0 and batch >= unit * fewest

    if divides(micro):
        return
    unit = layout.dp * micro
    reason = f"doesn't divide into micro-batches of {micro} on {layout.dp} replicas"
    if batch % unit == 0:
        needs = {
            "interleaved": f"a multiple of pp = {pp}",
            "dualpipe": f"an even number of at least 2 x pp = {2 * pp}",
            "dualpipev": f"at least 2 x pp = {2 * pp}",
        }[layout.schedule]
        reason = f"gives {batch // unit} micro-batches a replica; schedule {layout.schedule} needs {needs}"
    least = unit * fewest
    batches = (least,) if batch < least else nearest_multiples(batch, unit * multiple)
    setting = "training.global_batch_sequences"
    nearest = nearest_fitting(micro, batch // layout.dp, divides)
    if nearest:
        reason = f"a batch of {batch} {reason}"
        yield Problem("training.micro_batch_sequences", micro, reason, nearest, ((setting, batches),))
    else:
        yield Problem(setting, batch, reason, batches)
