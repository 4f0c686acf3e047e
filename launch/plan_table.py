"""A plan as people read it: tables on a terminal, or 80 columns of text in a pipe."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from strop.engine.plan.drawing import SHOWN_SHARE
from strop.engine.plan.facts import active_parameters, kv_bytes_per_token, parameters, total_parameters, train_flops_per_token
from strop.engine.plan.grpo import GrpoStep
from strop.engine.plan.memory import PARTS, Phase
from strop.engine.plan.report import MemoryPrediction, Prediction
from strop.engine.plan.rollout import RolloutTime, rollout_time
from strop.engine.plan.rollout_memory import generating_weight_bytes, rollout_kv_cache_bytes
from strop.engine.plan.run import PlannedRun
from strop.engine.plan.shape import ModelShape
from strop.engine.plan.text import (
    engines_text,
    gib_text,
    layout_text,
    recompute_text,
    seconds_text,
    settings_text,
    states_texts,
    value_text,
    words,
)
from strop.engine.plan.training import StepTime
from strop.engine.plan.validation import Problem

if TYPE_CHECKING:
    from strop.engine.plan.search import SearchResult

ACCURACY = "How far off such predictions were from published runs: benchmarks/results/planner.md; names explained: README.md"
AXIS_NAMES = {
    "tp": "tp (tensor)", "cp": "cp (context)", "pp": "pp (pipeline)", "dp": "dp (data)", "ep": "ep (expert)",
    "etp": "etp (tensor in experts)", "edp": "edp (data of experts)", "zero": "dp x cp",
}  # fmt: skip
COLUMN_NAMES = {
    "gradients": "grads", "optimizer": "optim", "activations": "activ", "communication": "comm", "kv_cache": "kv cache",
    "reference_weights": "ref", "rollout_weights": "engine",
}  # fmt: skip
"""Shorter where a word would make the table wider than 80 columns."""
TEXT_COLUMNS = ("a group lies", "layout", "kind", "settings", "reason")
NARROWEST = 80
"""Columns that tables take at least; a narrower terminal breaks their lines itself, which cuts no number in two."""
PHASE_WORDS = {"training": "training", "weight_sync": "syncing weights", "rollout": "generating"}


@dataclass(frozen=True)
class Section:
    """A table between its heading and a line below, which rich would wrap to the table's width if they were parts of it."""

    heading: str
    table: Table
    below: str = ""
    more: tuple[Table, ...] = ()
    """Under the first one."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"\n{self.heading}", style="bold")
        if self.table.row_count:
            yield with_all_digits(self.table, options.max_width)
        for table in self.more:
            yield Text("")
            yield with_all_digits(table, options.max_width)
        if self.below:
            yield Text(self.below)


def make_console() -> Console:
    console = Console(highlight=False, emoji=False)
    console.width = max(console.width, NARROWEST)
    return console


def show(prediction: MemoryPrediction, problems: Sequence[Problem], to: Console) -> None:
    """Print everything that was predicted of one run."""
    run = prediction.run
    verdict = "does not work" if problems else f"fits, {gib_text(prediction.headroom_bytes)} GiB free on the fullest rank"
    to.print(Text(f"{run.shape.name} on {run.gpus} x {run.device}: {verdict}", style="bold"))
    to.print(model_section(run))
    to.print(layout_section(prediction))
    to.print(memory_section(prediction), crop=False)
    if isinstance(prediction, Prediction):
        to.print(training_section(prediction.training))
        if prediction.training.transfers:
            to.print(transfer_section(prediction))
        if prediction.grpo is not None:
            to.print(generation_section(prediction.grpo.rollout, run))
            to.print(grpo_section(prediction.grpo, run))
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
    table.add_row("parameters", short(total_parameters(shape)) + active_text(shape))
    table.add_row("by kind", ", ".join(f"{words(kind)} {short(count)}" for kind, count in parameters(shape).items() if count))
    table.add_row("training", f"{train_flops_per_token(shape, length) / 1e9:,.3g} GFLOP a token in sequences of {length:,}")
    table.add_row("KV cache", f"{kv_bytes_per_token(shape):,} bytes a token")
    return Section("Model", table, "\n".join(f"note: {note}" for note in shape.notes))


def active_text(shape: ModelShape) -> str:
    """Behind a model's total. Its card may count the input embedding or not."""
    if shape.moe is None:
        return ""
    active, without = (short(active_parameters(shape, embedding)) for embedding in (True, False))
    return f"; active in a token {active}" + (f", without input embedding {without}" if without != active else "")


def layout_section(prediction: MemoryPrediction) -> Section:
    run, training, layout = prediction.run, prediction.run.training, prediction.run.layout
    table = grid("axis", "ranks", "groups", "a group lies")
    for span in prediction.spans():
        where = f"across nodes, {span.ranks_per_node} a node" if span.spans_nodes else "inside a node"
        table.add_row(AXIS_NAMES[span.axis], str(span.ranks), str(span.groups), where)
    facts = [
        f"{run.microbatches} micro-batches of {training.micro_batch_sequences} x {training.sequence_length_tokens:,} tokens",
        training.precision,
        recompute_text(run),
        f"schedule {layout.schedule}" if layout.pp > 1 else "",
        f"vpp {layout.vpp}" if layout.vpp > 1 else "",
        f"stages of {value_text(run.stage_layers)} layers" if run.stage_layers else "",
        "sequence parallel" if layout.sp else "",
        *states_texts(run),
        "" if run.rollout is None else engines_text(run),
    ]
    return Section("Layout", table, "; ".join(filter(None, facts)))


def memory_section(prediction: MemoryPrediction) -> Section:
    """A table a phase, as its parts differ; the worst stage is bold."""
    phases = dict.fromkeys(row.phase for row in prediction.memory_rows())
    tables = [memory_table(prediction, phase) for phase in phases]
    said = []
    for worst in prediction.worst_of_phases():
        free = prediction.memory_budget_bytes - worst.total_bytes
        left = f"{gib_text(free)} GiB left" if free >= 0 else f"{gib_text(-free)} GiB too much"
        said.append(f"Fullest while {PHASE_WORDS[worst.phase]}: stage {worst.stage.index}, {left}.")
    node = prediction.fullest_node()
    if node.gpu_bytes:
        parts = ", ".join(f"{words(part)} {gib_text(size)}" for part, size in node.parts_bytes.items())
        total, usable = gib_text(node.total_bytes), gib_text(node.usable_bytes)
        said.append(f"Host: {gib_text(node.gpu_bytes)} GiB a GPU, {total} of {usable} usable GiB a node ({parts}).")
    heading = f"Memory of a rank in GiB, of {gib_text(prediction.memory_budget_bytes)}"
    if prediction.memory_budget_bytes < prediction.device.hbm_bytes:
        heading += f" (the budget; the device has {gib_text(prediction.device.hbm_bytes)})"
    return Section(heading, tables[0], "\n".join(said), tuple(tables[1:]))


def memory_table(prediction: MemoryPrediction, phase: Phase) -> Table:
    rows = [row for row in prediction.memory_rows() if row.phase == phase]
    parts = [part for part in PARTS if any(row.parts_bytes.get(part) for row in rows)]
    table = grid(PHASE_WORDS[phase], *(COLUMN_NAMES.get(part, part) for part in parts), "total")
    for row in rows:
        label = row.label if row.label == "engines" else f"stage {row.label}"
        cells = [gib_text(row.parts_bytes.get(part, 0.0)) for part in parts]
        table.add_row(label, *cells, gib_text(row.total_bytes), style="bold" if row.is_worst else "")
    return table


def training_section(step: StepTime) -> Section:
    tera_flops = step.model_flops_per_gpu_per_second / 1e12
    speed = f"{rate_text(step.tokens_per_second_per_gpu)} tokens/s/GPU, {tera_flops:,.0f} TFLOPS a GPU, "
    speed += f"MFU {step.model_flops_utilization:.1%} of the bf16 peak"
    return Section(f"Optimizer step: {seconds_text(step.step_seconds)}", phases(step.parts_seconds), speed)


def grpo_section(step: GrpoStep, run: PlannedRun) -> Section:
    plan, received = run.rollout, step.weight_sync.received_bytes_per_gpu
    speed = f"{rate_text(step.tokens_per_second_per_gpu)} tokens/s/GPU, prompts and responses over all GPUs\n"
    speed += f"Weight sync: {words(plan.weight_sync)}, {gib_text(received)} GiB received a generating GPU."
    if run.placement == "split":
        steps = "step" if plan.steps_ahead == 1 else "steps"
        ahead = f"at most {plan.steps_ahead} {steps} ahead" if plan.steps_ahead else "before them"
        speed += f"\nThe phases are the training GPUs'. The others generate {ahead}, for "
        speed += f"{seconds_text(step.rollout.total_seconds)}, and wait for {seconds_text(step.rollout_idle_seconds)}."
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
    table.add_row("samples", f"{plan.samples:,} of {lengths}")
    full, alone = map(seconds_text, rollout.step_seconds)
    table.add_row("decoding step", f"{full} with {rollout.sequences_per_engine:,.0f} sequences an engine, {alone} with one")
    if rollout.tail_seconds:
        table.add_row("the tail", f"{seconds_text(rollout.tail_seconds)} with at most a tenth of the sequences left")
    table.add_row("throughput", f"{rate_text(rollout.tokens_per_second_per_gpu)} response tokens/s/GPU")
    weights, cache = gib_text(generating_weight_bytes(run)), gib_text(rollout_kv_cache_bytes(run))
    table.add_row("memory", f"weights {weights} GiB a GPU, KV cache {cache} GiB")
    table.add_row("GPUs", engines_text(run))
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


def show_search(result: "SearchResult", shown: Sequence[Prediction], commands: Sequence[str], to: Console) -> None:
    """Print the best layouts with the command that plans the first alone, and the reasons why others were rejected, each with
    how many it met."""
    table = grid("", "layout", "settings", "step", "tokens/s/GPU", "GiB free")
    for index, prediction in enumerate(shown, 1):
        run, step = prediction.run, prediction.grpo or prediction.training
        table.add_row(
            str(index), layout_text(run), settings_text(run), seconds_text(step.step_seconds),
            rate_text(step.tokens_per_second_per_gpu), gib_text(prediction.headroom_bytes),
        )  # fmt: skip
    looked = f"{result.evaluated_count:,} predicted, {result.outpaced_count:,} that can't be faster left out"
    if result.open_count:
        least = seconds_text(result.open_at_least_seconds)
        looked += f", at least {result.open_count:,} left open by --search-seconds, which take {least} or more"
    budget = f"at most {gib_text(result.budget_bytes)} GiB a GPU"
    heading = "Fastest layouts" if shown else "No layout found yet" if result.open_count else "No layout works"
    to.print(Section(heading, table, f"{looked}, {budget}, in {result.seconds:.1f} s."))
    held = ", ".join(f"{text} ({flag})" for flag, text in result.held.items())
    kept = (
        f"; {gib_text(result.reserve_bytes)} GiB of a GPU are kept free (--memory-budget-gib)" if result.reserve_bytes else ""
    )
    to.print(Text(f"Held fixed: {held}{kept}."), soft_wrap=True)
    if shown:
        to.print(Text(f"The first one alone: {commands[0]}"), soft_wrap=True)
    reasons = grid("runs", "reason")
    for reason, count in result.reasons():
        reasons.add_row(f"{count:,}", reason)
    if reasons.row_count:
        to.print(Section(f"Rejected: {len(result.rejected):,}", reasons))
    if lack := result.lack_of_ways():
        to.print(Text(f"Of the layout that is nearest to fitting: {lack}."), soft_wrap=True)
    for way in result.ways_out():
        to.print(Text(f"nearest that works: {way}"), soft_wrap=True)


def show_progress(evaluated: int, waiting: int) -> None:
    """Of a search, on one line of a terminal that the next one overwrites."""
    print(f"\r{evaluated:,} steps predicted, {waiting:,} layouts wait\033[K", end="\r", file=sys.stderr, flush=True)


def grid(*columns: str) -> Table:
    """A table with a header; numbers are aligned right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        is_text = column in TEXT_COLUMNS
        justify = "left" if index == 0 or is_text else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=not is_text)
    return table


def with_all_digits(table: Table, columns: int) -> Table:
    """Numbers keep their width. Where a table of numbers alone is wider than the console, its columns stand closer; what is
    wider still is the terminal's to break."""
    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(map(cell_len, (column.header, *column.cells)))
    between = 3 * (len(table.columns) - 1)
    if all(column.no_wrap for column in table.columns) and between + sum(one.min_width for one in table.columns) > columns:
        table.padding = 0
    return table


def pairs() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def rate_text(per_second: float) -> str:
    """Tokens a second, at least two digits: 53,351 or 2.0."""
    return f"{per_second:,.0f}" if per_second >= 9.95 else f"{per_second:#.2g}"


def short(count: float) -> str:
    """A number of parameters: 30.53B, 134.52M."""
    return f"{count / 1e9:,.2f}B" if count >= 1e9 else f"{count / 1e6:,.2f}M"
