"""A picture of a prediction: left the memory of one rank of each pipeline stage, right the seconds of a step."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..config import GIB, InputError
from .devices import device_named
from .layer_exchange import DISPATCHER_MULTIPROCESSORS, contention_share
from .layer_time import Work
from .memory import PARTS
from .report import Prediction
from .run import PlannedRun
from .schedules import rank_orders, slot_seconds
from .text import gib_text, layout_text, seconds_text, settings_text, words
from .timeline import Interval, Slot, simulate
from .training import chunk_times, pipeline_hop

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (
    "#1f5fa8", "#d1661c", "#3f8f4f", "#8a5bb0", "#3aa6b8", "#8c6d46", "#d98cbf", "#b8b83a", "#7f7f7f", "#9db8dd",
    "#f2b98a", "#5b6470",
)  # fmt: skip
PASS_COLORS = {
    "forward": "#1f5fa8", "backward": "#d1661c", "backward input": "#e8a06c", "backward weight": "#3f8f4f",
    "forward and backward at once": "#8a5bb0",
}  # fmt: skip
UPDATE_NAME, UPDATE_COLOR = "gradients exchanged, weights updated", "#7f7f7f"
LIMIT_COLOR = "#b8403a"
DARK_TEXT, LIGHT_TEXT = "#1b1b1b", "white"
LABELLED_SHARE = 0.06
"""A part of at least this share of the device's memory has its number written on it."""
MOST_INCHES = 14.0
"""Of the picture's height: with more stages, bars get thinner."""
SHOWN_SHARE = 1e-6
"""Of a step: phases that take less are left out, here and in tables."""


def draw_prediction(prediction: Prediction, file: Path) -> None:
    """Write the picture as PNG. Raises InputError where matplotlib is missing or the file can't be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--png needs matplotlib: pip install 'strop[train]'") from None
    run, bars = prediction.run, len(prediction.memory_rows())
    has_pipeline = run.layout.pp > 1
    ranks = run.layout.pp if has_pipeline else 0
    height = min(MOST_INCHES, max(5.2, 2.4 + 0.36 * bars, 4.2 + 0.3 * ranks))
    figure = Figure(figsize=(15, height), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2 if has_pipeline else 1, 2, width_ratios=(5, 5), height_ratios=(3, 4) if has_pipeline else None)
    draw_memory(prediction, figure.add_subplot(grid[:, 0]))
    draw_time(prediction, figure.add_subplot(grid[0, 1]))
    if has_pipeline:
        draw_pipeline(prediction, figure.add_subplot(grid[1, 1]))
    figure.suptitle(title_text(prediction), x=0.01, ha="left", fontsize=11)
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise InputError(f"--png {file} can't be written ({error.strerror}): choose another file") from None


def title_text(prediction: Prediction) -> str:
    """What was planned and whether it fits, in two lines."""
    run, free_bytes = prediction.run, prediction.headroom_bytes
    verdict = f"fits, {gib_text(free_bytes)} GiB free" if free_bytes >= 0 else f"{gib_text(-free_bytes)} GiB too much"
    return f"{run.shape.name} on {run.gpus} x {run.device}, {layout_text(run)}: {verdict}\n{settings_text(run)}"


def text_color(background: str) -> str:
    """The one that can be read on a color, by its relative luminance (ITU-R BT.709)."""
    red, green, blue = (int(background[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return DARK_TEXT if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.6 else LIGHT_TEXT


def draw_memory(prediction: Prediction, axes: "Axes") -> None:
    """One bar a phase and pipeline stage (alike ones together), part after part; a line at the device's memory, a dotted
    one at a smaller budget."""
    from matplotlib.patches import Patch

    limit, rows = prediction.device.hbm_bytes, prediction.memory_rows()
    colors = {part: color for part, color in zip(PARTS, COLORS, strict=False) if any(row.parts_bytes.get(part) for row in rows)}
    for index, row in enumerate(rows):
        left = 0.0
        for part, color in colors.items():
            size = row.parts_bytes.get(part, 0.0)
            axes.barh(index, size / GIB, left=left / GIB, color=color, height=0.78)
            if size >= LABELLED_SHARE * limit:
                middle = (left + size / 2) / GIB
                axes.text(middle, index, f"{size / GIB:.1f}", ha="center", va="center", color=text_color(color), fontsize=7)
            left += size
        axes.text(left / GIB, index, f" {left / GIB:.1f}", ha="left", va="center", fontsize=8)
    axes.axvline(limit / GIB, color=LIMIT_COLOR, linewidth=1.5, linestyle="--")
    axes.text(
        limit / GIB, 1.01, f"{prediction.run.device} {limit / GIB:.1f}", transform=axes.get_xaxis_transform(), ha="center",
        color=LIMIT_COLOR, fontsize=8,
    )  # fmt: skip
    if prediction.memory_budget_bytes < limit:
        axes.axvline(prediction.memory_budget_bytes / GIB, color=LIMIT_COLOR, linewidth=1.0, linestyle=":")
    phases = {row.phase for row in rows}
    names = [f"{row.label} {words(row.phase)}" if len(phases) > 1 else row.label for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(max(len(rows), 3) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * max(limit, max(row.total_bytes for row in rows)) / GIB)
    axes.set_ylabel("pipeline stage")
    axes.set_xlabel("memory of one rank (GiB)")
    axes.set_title("Memory by pipeline stage", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=color, label=words(part)) for part, color in colors.items()]
    axes.figure.legend(handles=handles, fontsize=8, loc="outside lower left", ncols=len(handles), frameon=False)


def draw_time(prediction: Prediction, axes: "Axes") -> None:
    """The phases of a step, each where the one before ends; seconds and share written beside them."""
    step = prediction.grpo or prediction.training
    total, left = step.step_seconds, 0.0
    parts = {name: seconds for name, seconds in step.parts_seconds.items() if seconds > SHOWN_SHARE * total}
    for index, seconds in enumerate(parts.values()):
        color = COLORS[index % len(COLORS)]
        axes.barh(index, seconds, left=left, color=color, height=0.7)
        right = left + seconds
        written = {"va": "center", "fontsize": 8}
        if right < 0.7 * total:
            place, written["ha"] = right, "left"
        elif left > 0.3 * total:
            place, written["ha"] = left, "right"
        else:
            place, written["ha"], written["color"] = (left + right) / 2, "center", text_color(color)
        axes.text(place, index, f" {seconds_text(seconds)}, {seconds / total:.1%} ", **written)
        left = right
    axes.set_yticks(range(len(parts)), [words(name) for name in parts], fontsize=8)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlim(0, 1.02 * total)
    axes.set_xlabel("seconds")
    title = f"{'GRPO step' if prediction.grpo else 'Optimizer step'}: {seconds_text(total)}"
    if prediction.run.placement == "split" and prediction.grpo is not None:
        generates, waits = prediction.grpo.rollout.total_seconds, prediction.grpo.rollout_idle_seconds
        title += f" of the training GPUs; the others generate {seconds_text(generates)}, wait {seconds_text(waits)}"
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def draw_pipeline(prediction: Prediction, axes: "Axes") -> None:
    """What every pipeline rank does when, in one optimizer step to its end; white is waiting."""
    from matplotlib.patches import Patch

    intervals = pipeline_intervals(prediction.run)
    for name, color in PASS_COLORS.items():
        for rank in range(prediction.run.layout.pp):
            drawn = [one for one in intervals if one.rank == rank and pass_name(one) == name]
            spans = [(one.start_seconds, one.end_seconds - one.start_seconds) for one in drawn]
            axes.broken_barh(spans, (rank - 0.42, 0.84), facecolors=color, edgecolors="white", linewidth=0.15)
    step_seconds, passes_seconds = prediction.training.step_seconds, max(one.end_seconds for one in intervals)
    axes.axvspan(passes_seconds, step_seconds, color=UPDATE_COLOR, linewidth=0)
    axes.set_ylim(prediction.run.layout.pp - 0.4, -0.6)
    axes.set_xlim(0, max(step_seconds, passes_seconds))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("pipeline rank")
    axes.set_xlabel("seconds")
    title = f"One optimizer step, {seconds_text(step_seconds)}: {prediction.run.microbatches} micro-batches"
    axes.set_title(title, loc="left", fontsize=10, pad=18)
    axes.spines[["top", "right"]].set_visible(False)
    names = {pass_name(one) for one in intervals}
    handles = [Patch(color=color, label=name) for name, color in PASS_COLORS.items() if name in names]
    handles.append(Patch(color=UPDATE_COLOR, label=UPDATE_NAME))
    axes.legend(handles=handles, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), frameon=False)


def pipeline_intervals(run: PlannedRun) -> list[Interval]:
    """When every pipeline rank does what in one optimizer step, up to the last backward pass: the same passes as in
    `train_step`, one by one."""
    work = Work(run, device_named(run.device))
    stages = [chunk.stage_seconds() for chunk in chunk_times(work)]
    paired = run.pairs_passes
    contention = contention_share(work, DISPATCHER_MULTIPROCESSORS[run.training.dispatcher]) if paired else None
    orders = rank_orders(run.layout.schedule, run.layout.pp, len(stages) // run.layout.pp, run.microbatches, paired)

    def seconds(_rank: int, slot: Slot) -> float:
        return slot_seconds(stages, [one.work for one in slot], [one.stage for one in slot], contention)

    return simulate(orders, seconds, pipeline_hop(work)[1])


def pass_name(interval: Interval) -> str:
    return "forward and backward at once" if len(interval.passes) > 1 else words(interval.passes[0].work)
