"""plots/*.png: the curves of a run, drawn from its metrics.jsonl. A quantity without data gets no plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import metrics
from .metrics import read_metrics

if TYPE_CHECKING:  # matplotlib takes most of a second to import, and a run draws once, at its end
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GRAY = "#1f5fa8", "#d1661c", "#5b6470"
SMOOTHING_SPAN = 20
"""Steps of the moving average's memory, at most; short runs get a tenth of their length, at least 3."""


@dataclass(frozen=True)
class Panel:
    """One picture: up to two keys of metrics.jsonl over the steps."""

    name: str
    title: str
    unit: str
    curves: Mapping[str, str]
    """Key in metrics.jsonl -> its label."""
    smooth: bool = True
    """False draws the measured points joined by lines: for what is measured once in many steps."""
    log_scale: bool = False
    bounds: tuple[float | None, float | None] = (None, None)
    """Least range of the vertical axis."""


PANELS = (
    Panel("reward", "Training reward", "mean reward a response", {metrics.REWARD: "reward"}),
    Panel(
        "accuracy", "Held-out accuracy", "fraction of questions answered correctly", {metrics.ACCURACY: "greedy, held out"},
        smooth=False, bounds=(0, 1),
    ),
    Panel("length", "Response length", "mean length (tokens)", {metrics.LENGTH: "length"}, bounds=(0, None)),
    Panel(
        "kl", "KL divergence", "mean KL (nats a token)",
        {metrics.KL: "to the reference", metrics.KL_OLD: "to the policy before the step"},
    ),
    Panel("entropy", "Policy entropy", "mean entropy (nats a token)", {metrics.ENTROPY: "entropy"}, bounds=(0, None)),
    Panel(
        "throughput", "Throughput", "response tokens a second, all ranks", {metrics.TOKENS_PER_SECOND: "throughput"},
        bounds=(0, None),
    ),
    Panel(
        "mismatch", "Rollout against trainer", "|difference of log-prob| (nats a token)",
        {metrics.MISMATCH: "mean", metrics.MISMATCH_MAX: "largest of the step"}, log_scale=True,
    ),
)  # fmt: skip


def draw_plots(metrics_file: Path, folder: Path) -> list[Path]:
    """Draw every panel that has data into `folder`, replacing older pictures; returns their paths. 0.1 to 0.2 s a panel."""
    rows = read_metrics(metrics_file) if metrics_file.exists() else []
    drawn = []
    for panel in PANELS:
        series = {label: points for key, label in panel.curves.items() if (points := _points(rows, key))}
        if not series:
            continue
        folder.mkdir(exist_ok=True)
        path = folder / f"{panel.name}.png"
        beside = path.with_suffix(".part")
        _draw(panel, series).savefig(beside, format="png", dpi=150)
        beside.rename(path)
        drawn.append(path)
    return drawn


def smoothed(values: Sequence[float], span: int) -> np.ndarray:
    """Exponential moving average with the weights' centre of mass at (span - 1) / 2 steps, unbiased from the first value on."""
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight)
    return np.array(averages)


def _points(rows: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if key in row]


def _draw(panel: Panel, series: Mapping[str, list[tuple[float, float]]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (label, points), color in zip(series.items(), (BLUE, ORANGE), strict=False):
        steps, values = np.array(points, dtype=float).T
        if panel.smooth and len(values) > 3:
            span = max(3, min(SMOOTHING_SPAN, len(values) // 10))
            axes.plot(steps, values, color=color, alpha=0.28, linewidth=1)
            axes.plot(steps, smoothed(values, span), color=color, linewidth=2, label=f"{label}, average over {span} steps")
        else:
            axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=4, label=label)
    _label(panel, axes)
    return figure


def _label(panel: Panel, axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, loc="left", fontweight="bold", color="#20262e")
    axes.set_xlabel("step", color=GRAY)
    axes.set_ylabel(panel.unit, color=GRAY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if panel.log_scale and axes.dataLim.ymin > 0:
        axes.set_yscale("log")
    low, high = axes.get_ylim()
    least, most = panel.bounds
    axes.set_ylim(low if least is None else min(low, least), high if most is None else max(high, most))
    if least == 0 and axes.dataLim.ymin >= 0:
        axes.set_ylim(bottom=0)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8bec6")
    axes.tick_params(colors=GRAY)
    axes.legend(frameon=False, labelcolor=GRAY)
