"""A plan as people read it: tables on a terminal, or 80 columns of text in a pipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from strop.engine.config import GIB
from strop.engine.plan.drawing import layout_text, seconds_text, words
from strop.engine.plan.facts import active_parameters, kv_bytes_per_token, parameters, total_parameters, train_flops_per_token
from strop.engine.plan.grpo import GrpoStep
from strop.engine.plan.memory import PARTS
from strop.engine.plan.report import Prediction
from strop.engine.plan.rollout import RolloutTime, rollout_time
from strop.engine.plan.rollout_memory import rollout_kv_cache_bytes, rollout_weight_bytes
from strop.engine.plan.run import PlannedRun
from strop.engine.plan.training import StepTime
from strop.engine.plan.validation import Problem

if TYPE_CHECKING:
    from strop.engine.plan.search import SearchResult

ACCURACY = "How far off such predictions were from published runs: benchmarks/results/planner.md"
AXIS_NAMES = {
    "tp": "tp (tensor)", "cp": "cp (context)", "pp": "pp (pipeline)", "dp": "dp (data)", "ep": "ep (expert)",
    "etp": "etp (tensor in experts)", "edp": "edp (data of experts)", "zero": "dp x cp",
}  # fmt: skip
COLUMN_NAMES = {
    "gradients": "grads", "optimizer": "optim", "activations": "activ", "communication": "comm", "kv_cache": "kv cache",
    "reference_weights": "reference weights", "rollout_weights": "rollout weights",
}  # fmt: skip
"""Shorter where a word would make the table wider than 80 columns."""
TEXT_COLUMNS = ("a group lies", "layout", "kind", "recompute", "reason")
SHOWN_SHARE = 1e-6
"""Of a step: phases that take less are left out."""


@dataclass(frozen=True)
class Section:
    """A table between its heading and a line below, which rich would wrap to the table's width if they were parts of it."""

    heading: str
    table: Table
    below: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"\n{self.heading}", style="bold")
        if self.table.row_count:
            yield self.table
        if self.below:
            yield Text(self.below)


def make_console() -> Console:
    return Console(highlight=False, emoji=False)


def show(prediction: Prediction, problems: Sequence[Problem], to: Console) -> None:
    """Print everything about one run."""
    run = prediction.run
    verdict = "does not work" if problems else f"fits, {gib(prediction.headroom_bytes)} GiB free on the fullest rank"
    to.print(Text(f"{run.shape.name} on {run.gpus} x {run.device}: {verdict}", style="bold"))
    to.print(model_section(run))
    to.print(layout_section(prediction))
    to.print(memory_section(prediction))
    to.print(training_section(prediction.training))
    if prediction.training.transfers:
        to.print(transfer_section(prediction))
    if prediction.grpo is not None:
        to.print(generation_section(prediction.grpo.rollout, run))
        to.print(grpo_section(prediction.grpo))
    to.print(whole_run_section(prediction))
    to.print()
    show_problems(problems, to)
    to.print(Text(ACCURACY, style="dim"), soft_wrap=True)


def show_generation(run: PlannedRun, to: Console) -> None:
    """Print what generation alone takes."""
    to.print(Text(f"{run.shape.name} on {run.gpus} x {run.device}", style="bold"))
    to.print(model_section(run))
    to.print(generation_section(rollout_time(run), run))
    to.print()
    to.print(Text(ACCURACY, style="dim"), soft_wrap=True)


def show_problems(problems: Sequence[Problem], to: Console) -> None:
    """A line each, unbroken, so that they can be searched for."""
    for problem in problems:
        to.print(Text.assemble(("problem: ", "bold red"), str(problem)), soft_wrap=True)


def show_notes(notes: Sequence[str], to: Console) -> None:
    for note in notes:
        to.print(Text(f"note: {note}"), soft_wrap=True)


def model_section(run: PlannedRun) -> Section:
    shape, length = run.shape, run.training.sequence_length_tokens
    table = pairs()
    active = f", {short(active_parameters(shape))} of them active in a token" if shape.moe else ""
    table.add_row("parameters", short(total_parameters(shape)) + active)
    table.add_row("by kind", ", ".join(f"{words(kind)} {short(count)}" for kind, count in parameters(shape).items() if count))
    table.add_row("training", f"{train_flops_per_token(shape, length) / 1e9:,.3g} GFLOP a token in sequences of {length:,}")
    table.add_row("KV cache", f"{kv_bytes_per_token(shape):,} bytes a token")
    return Section("Model", table)


def layout_section(prediction: Prediction) -> Section:
    run, training, layout = prediction.run, prediction.run.training, prediction.run.layout
    table = grid("axis", "ranks", "groups", "a group lies")
    for span in prediction.spans():
        where = f"across nodes, {span.ranks_per_node} a node" if span.spans_nodes else "inside a node"
        table.add_row(AXIS_NAMES[span.axis], str(span.ranks), str(span.groups), where)
    facts = [
        f"{run.microbatches} micro-batches of {training.micro_batch_sequences} x {training.sequence_length_tokens:,} tokens",
        training.precision,
        f"recompute {', '.join(map(words, training.recompute))}" if training.recompute else "no recompute",
        f"schedule {layout.schedule}" if layout.pp > 1 else "",
        f"vpp {layout.vpp}" if layout.vpp > 1 else "",
        "sequence parallel" if layout.sp else "",
        "FSDP" if training.fsdp else "ZeRO-1",
    ]
    return Section("Layout", table, "; ".join(filter(None, facts)))


def memory_section(prediction: Prediction) -> Section:
    """The worst stage is bold."""
    worst = prediction.worst
    parts = [part for part in PARTS if any(one.parts_bytes[part] for one in prediction.memory)]
    table = grid("stage", *(COLUMN_NAMES.get(part, part) for part in parts), "total")
    for stages, memory in prediction.alike_memory():
        same_as_worst = memory.phase == worst.phase and memory.parts_bytes == worst.parts_bytes
        cells = [gib(memory.parts_bytes[part]) for part in parts]
        table.add_row(f"{stages} {memory.phase}", *cells, gib(memory.total_bytes), style="bold" if same_as_worst else "")
    free = prediction.headroom_bytes
    left = f"{gib(free)} GiB left" if free >= 0 else f"{gib(-free)} GiB too much"
    host = f", and {gib(worst.host_bytes)} GiB of the host's memory" if worst.host_bytes else ""
    heading = f"Memory of a rank in GiB, of {gib(prediction.device.hbm_bytes)}"
    return Section(heading, table, f"Worst: stage {worst.stage.index} in {worst.phase}, {left}{host}.")


def training_section(step: StepTime) -> Section:
    speed = (
        f"{step.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, {step.model_flops_per_gpu_per_second / 1e12:,.0f} TFLOPS a GPU, "
        f"MFU {step.model_flops_utilization:.1%} of the bf16 peak"
    )
    return Section(f"Optimizer step: {seconds_text(step.step_seconds)}", phases(step.parts_seconds), speed)


def grpo_section(step: GrpoStep) -> Section:
    speed = f"{step.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, prompts and responses over all GPUs"
    return Section(f"GRPO step: {seconds_text(step.step_seconds)}", phases(step.parts_seconds), speed)


def phases(parts_seconds: Mapping[str, float]) -> Table:
    table, total = grid("phase", "time", "share"), sum(parts_seconds.values())
    for part, seconds in parts_seconds.items():
        if seconds > SHOWN_SHARE * total:
            table.add_row(words(part), seconds_text(seconds), f"{seconds / total:.1%}")
    return table


def generation_section(rollout: RolloutTime, run: PlannedRun) -> Section:
    plan, table = run.rollout, pairs()
    lengths = f"{plan.mean_response_tokens:,.0f} tokens on average, {plan.max_response_tokens:,} at most"
    table.add_row("samples", f"{plan.prompts_per_step * plan.group_size:,} of {lengths}")
    full, alone = map(seconds_text, rollout.step_seconds)
    table.add_row("decoding step", f"{full} with {rollout.sequences_per_engine:,.0f} sequences an engine, {alone} with one")
    table.add_row("the tail", f"{seconds_text(rollout.tail_seconds)} with at most a tenth of the sequences left")
    table.add_row("throughput", f"{rollout.tokens_per_second_per_gpu:,.0f} response tokens/s/GPU")
    weights, cache = gib(rollout_weight_bytes(run)), gib(rollout_kv_cache_bytes(run))
    table.add_row("memory", f"weights {weights} GiB a GPU, KV cache {cache} GiB")
    return Section(f"Generation: {seconds_text(rollout.total_seconds)}", table)


def transfer_section(prediction: Prediction) -> Section:
    table = grid("axis", "kind", "calls", "GB sent", "time", "not hidden")
    for transfers in prediction.transfers_by_axis().values():
        for one in transfers:
            table.add_row(
                AXIS_NAMES[one.axis], words(one.kind), f"{one.count:,}", f"{one.bytes_per_rank / 1e9:,.3f}",
                seconds_text(one.seconds), seconds_text(one.exposed_seconds),
            )  # fmt: skip
    return Section("Collectives of one rank in an optimizer step", table)


def whole_run_section(prediction: Prediction) -> Section:
    whole, steps, table = prediction.whole, prediction.run.steps, pairs()
    table.add_row("GPU-hours", f"{whole.gpu_hours:,.3g}" if whole.gpu_hours < 100 else f"{whole.gpu_hours:,.0f}")
    table.add_row("energy", f"{whole.energy_kwh:,.3g} kWh" if whole.energy_kwh < 100 else f"{whole.energy_kwh:,.0f} kWh")
    return Section(f"Whole run, {steps:,} step{'s' if steps > 1 else ''}", table)


def show_search(result: "SearchResult", shown: Sequence[Prediction], to: Console) -> None:
    """Print the best layouts, and the reasons why others were rejected, each with how many it met."""
    table = grid("", "layout", "micro", "recompute", "step", "tokens/s/GPU", "GiB", "GiB free")
    for index, prediction in enumerate(shown, 1):
        training, step = prediction.run.training, prediction.grpo or prediction.training
        table.add_row(
            str(index), layout_text(prediction), str(training.micro_batch_sequences),
            ", ".join(map(words, training.recompute)) or "-", seconds_text(step.step_seconds),
            f"{step.tokens_per_second_per_gpu:,.0f}", gib(prediction.worst.total_bytes), gib(prediction.headroom_bytes),
        )  # fmt: skip
    looked = f"{result.evaluated_count:,} predicted, {result.outpaced_count:,} that can't be faster left out"
    heading = "Fastest layouts" if shown else "No layout works"
    to.print(Section(heading, table, f"{looked}, in {result.seconds:.1f} s."))
    reasons = grid("runs", "reason")
    for reason, count in result.reasons():
        reasons.add_row(f"{count:,}", reason)
    if reasons.row_count:
        to.print(Section(f"Rejected: {len(result.rejected):,}", reasons))


def grid(*columns: str) -> Table:
    """A table with a header; numbers are aligned right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column in TEXT_COLUMNS else "right", overflow="fold")
    return table


def pairs() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.1f}"


def short(count: float) -> str:
    """A number of parameters: 30.53B, 134.52M."""
    return f"{count / 1e9:,.2f}B" if count >= 1e9 else f"{count / 1e6:,.2f}M"
