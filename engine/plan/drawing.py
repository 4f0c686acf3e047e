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
LIMIT_COLOR = "#b8403a"
LABELLED_SHARE = 0.06
"""A part of at least this share of the device's memory has its number written on it."""


def draw_prediction(prediction: Prediction, file: Path) -> None:
    """Write the picture as PNG. Raises InputError where matplotlib is missing or the file can't be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--png needs matplotlib: pip install 'strop[train]'") from None
    run, bars = prediction.run, len(prediction.alike_memory())
    has_pipeline = run.layout.pp > 1
    ranks = run.layout.pp if has_pipeline else 0
    figure = Figure(figsize=(15, max(5.2, 2.4 + 0.36 * bars, 4.2 + 0.3 * ranks)), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2 if has_pipeline else 1, 2, width_ratios=(5, 5), height_ratios=(3, 4) if has_pipeline else None)
    draw_memory(prediction, figure.add_subplot(grid[:, 0]))
    draw_time(prediction, figure.add_subplot(grid[0, 1]))
    if has_pipeline:
        draw_pipeline(prediction, figure.add_subplot(grid[1, 1]))
    title = f"{run.shape.name} on {run.gpus} x {run.device}: {layout_text(prediction)}"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise InputError(f"--png {file} can't be written ({error.strerror}): choose another file") from None


def layout_text(prediction: Prediction) -> str:
    """The layout in a few words: "tp 4 sp · pp 8 vpp 4 interleaved · dp 8 · ep 32"."""
    layout = prediction.run.layout
    more = {
        "tp": " sp" if layout.sp else "",
        "cp": f" {layout.cp_kind}",
        "pp": (f" vpp {layout.vpp}" if layout.vpp > 1 else "") + f" {layout.schedule}",
    }
    spans = [span for span in prediction.spans() if span.axis != "edp"]
    return " · ".join(f"{span.axis} {span.ranks}{more.get(span.axis, '')}" for span in spans) or "one rank"


def draw_memory(prediction: Prediction, axes: "Axes") -> None:
    """One bar a phase and pipeline stage (alike ones together), part after part; a line at the device's memory."""
    from matplotlib.patches import Patch

    limit, labels = prediction.device.hbm_bytes, [label for label, _ in prediction.alike_memory()]
    rows = [memory for _, memory in prediction.alike_memory()]
    colors = {part: color for part, color in zip(PARTS, COLORS, strict=False) if any(row.parts_bytes[part] for row in rows)}
    for index, row in enumerate(rows):
        left = 0.0
        for part, color in colors.items():
            size = row.parts_bytes[part]
            axes.barh(index, size / GIB, left=left / GIB, color=color, height=0.78)
            if size >= LABELLED_SHARE * limit:
                middle = (left + size / 2) / GIB
                axes.text(middle, index, f"{size / GIB:.1f}", ha="center", va="center", color="white", fontsize=7)
            left += size
        axes.text(left / GIB, index, f" {left / GIB:.1f}", ha="left", va="center", fontsize=8)
    axes.axvline(limit / GIB, color=LIMIT_COLOR, linewidth=1.5, linestyle="--")
    axes.text(
        limit / GIB, 1.01, f"{prediction.run.device} {limit / GIB:.1f}", transform=axes.get_xaxis_transform(), ha="center",
        color=LIMIT_COLOR, fontsize=8,
    )  # fmt: skip
    phases = {row.phase for row in rows}
    names = [f"{label} {row.phase}" if len(phases) > 1 else label for label, row in zip(labels, rows, strict=True)]
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
    parts = {name: seconds for name, seconds in step.parts_seconds.items() if seconds > 0}
    total, left = sum(parts.values()), 0.0
    for index, seconds in enumerate(parts.values()):
        axes.barh(index, seconds, left=left, color=COLORS[index % len(COLORS)], height=0.7)
        right = left + seconds
        on_the_right = right < 0.7 * total
        text = f" {seconds_text(seconds)}, {seconds / total:.1%} "
        axes.text(right if on_the_right else left, index, text, ha="left" if on_the_right else "right", va="center", fontsize=8)
        left = right
    axes.set_yticks(range(len(parts)), [words(name) for name in parts], fontsize=8)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlim(0, 1.02 * total)
    axes.set_xlabel("seconds")
    axes.set_title(f"{'GRPO step' if prediction.grpo else 'Optimizer step'}: {seconds_text(total)}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def draw_pipeline(prediction: Prediction, axes: "Axes") -> None:
    """What every pipeline rank does when, in one optimizer step; white is waiting."""
    from matplotlib.patches import Patch

    intervals = pipeline_intervals(prediction.run)
    for name, color in PASS_COLORS.items():
        for rank in range(prediction.run.layout.pp):
            drawn = [one for one in intervals if one.rank == rank and pass_name(one) == name]
            spans = [(one.start_seconds, one.end_seconds - one.start_seconds) for one in drawn]
            axes.broken_barh(spans, (rank - 0.42, 0.84), facecolors=color, edgecolors="white", linewidth=0.15)
    axes.set_ylim(prediction.run.layout.pp - 0.4, -0.6)
    axes.set_xlim(0, max(one.end_seconds for one in intervals))
    axes.set_ylabel("pipeline rank")
    axes.set_xlabel("seconds")
    axes.set_title(f"{prediction.run.microbatches} micro-batches", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    names = {pass_name(one) for one in intervals}
    handles = [Patch(color=color, label=name) for name, color in PASS_COLORS.items() if name in names]
    axes.legend(handles=handles, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), frameon=False)


def pipeline_intervals(run: PlannedRun) -> list[Interval]:
    """When every pipeline rank does what in one optimizer step, up to the last backward pass: the same passes as in
    `train_step`, one by one."""
    work = Work(run, device_named(run.device))
    stages = [chunk.stage_seconds() for chunk in chunk_times(work)]
    paired = run.training.overlap_expert and run.layout.ep > 1
    contention = contention_share(work, DISPATCHER_MULTIPROCESSORS[run.training.dispatcher]) if paired else None
    orders = rank_orders(run.layout.schedule, run.layout.pp, len(stages) // run.layout.pp, run.microbatches, paired)

    def seconds(_rank: int, slot: Slot) -> float:
        return slot_seconds(stages, [one.work for one in slot], [one.stage for one in slot], contention)

    return simulate(orders, seconds, pipeline_hop(work)[1])


def pass_name(interval: Interval) -> str:
    return "forward and backward at once" if len(interval.passes) > 1 else words(interval.passes[0].work)


def words(name: str) -> str:
    return name.replace("_", " ")


def seconds_text(seconds: float) -> str:
    """Seconds with three digits: 21.3 s, 840 ms, 12.5 us."""
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
