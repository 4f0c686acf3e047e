"""What a person sees while a run goes on: a bar with the newest numbers, or one line a step where there is no terminal."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import metrics
from .watchdog import Watchdog

COLUMNS = (
    ("reward", (metrics.REWARD,), "{:.3f}"),
    ("accuracy", (metrics.ACCURACY,), "{:.3f}"),
    ("length", (metrics.LENGTH,), "{:.1f}"),
    ("KL", (metrics.KL, metrics.KL_OLD), "{:.2e}"),
    ("entropy", (metrics.ENTROPY,), "{:.3f}"),
    ("tok/s", (metrics.TOKENS_PER_SECOND,), "{:.0f}"),
)
"""What a line shows: label, keys (the first that the step's values have), format."""
WIDTH = 9
HEADER_EVERY = 20

CONTENTS = {
    "metrics.jsonl": "what was measured, a line a step",
    "samples.jsonl": "responses with their scores",
    "plots": "curves",
    "tensorboard": "the same for tensorboard --logdir",
    "checkpoints": "for a resume",
}
"""What lies in a run folder, for the closing table."""


class RunProgress:
    """Shows the steps of a run on rank 0, and measures phases on every rank.

        with RunProgress(total_steps, watchdog, rank=mesh.rank) as progress:
            with progress.phase("rollout"): ...
            values |= progress.take_times()
            progress.step(step, values)

    On a terminal a bar stays at the bottom, with the running phase, the newest values and the seconds of each phase, and the
    lines of earlier steps scroll above it.
    """

    def __init__(self, total_steps: int, watchdog: Watchdog, *, done_steps: int = 0, rank: int = 0):
        self.console = Console(highlight=False, markup=False, emoji=False, quiet=rank != 0)
        self._watchdog = watchdog
        self._step = done_steps + 1
        self._times: dict[str, float] = {}
        self._taken: dict[str, float] = {}
        self._lines = 0
        self._newest: dict[str, str] = {}
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self._task = self._bar.add_task("start", total=total_steps, completed=done_steps)
        self._numbers = Text(style="dim")
        self._live = Live(Group(self._bar, self._numbers), console=self.console, refresh_per_second=4)

    def __enter__(self) -> "RunProgress":
        if self.console.is_terminal and not self.console.quiet:
            self._live.start()
            self.console.show_cursor(True)  # a killed process would leave it hidden
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live.is_started:
            self._live.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the seconds of a part of the step (time/<name>; parts of the same name add up) and show it.

        Beats the watchdog at both ends. An exception gets a note with phase and step, which the failure report shows.
        """
        self._watchdog.beat(f"step {self._step}, {name}")
        self._bar.update(self._task, description=f"step {self._step} {name}")
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.add_note(f"in phase {name} of step {self._step}")
            raise
        key = f"time/{name}"
        self._times[key] = self._times.get(key, 0.0) + time.perf_counter() - start
        self._watchdog.beat(f"step {self._step}, after {name}")

    def take_times(self) -> dict[str, float]:
        """{"time/<phase>": seconds} since the last call."""
        self._taken, self._times = self._times, {}
        return dict(self._taken)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Step `step` is over: advance the bar and write its line. Call it on every rank."""
        self._step = step + 1
        self._watchdog.beat(f"step {self._step}")
        if self._lines % HEADER_EVERY == 0:
            self.console.print("step".rjust(6) + "".join(label.rjust(WIDTH + 1) for label, _, _ in COLUMNS) + "  seconds")
        self._lines += 1
        cells = {
            label: form.format(values[found])
            for label, keys, form in COLUMNS
            if (found := next((key for key in keys if key in values), None)) is not None
        }
        phases = ", ".join(f"{key.removeprefix('time/')} {seconds:.1f}" for key, seconds in self._taken.items())
        line = "".join(cells.get(label, "").rjust(WIDTH + 1) for label, _, _ in COLUMNS)
        self.console.print(f"{step:>6}{line}  {phases}", soft_wrap=True)
        self._newest |= cells  # an accuracy stays in the bar until the next evaluation
        self._numbers.plain = "  ".join(f"{label} {text}" for label, text in self._newest.items()) + f"  ({phases})"
        self._bar.update(self._task, completed=step, description=f"step {self._step}")

    def note(self, text: str) -> None:
        """One line above the bar: a save, an evaluation."""
        self.console.print(text, soft_wrap=True)


@dataclass(frozen=True)
class Summary:
    """What the closing table says. Accuracies are of held-out questions; None where not measured."""

    outcome: str
    """What ended the run, in a few words: "finished", "interrupted", "stopped at --run.stop-at 5"."""
    step: int
    total_steps: int
    seconds: float
    """Wall time of this process's part of the run."""
    folder: Path
    accuracy_before: float | None
    accuracy_after: float | None
    best: tuple[float, int] | None
    """(best accuracy, its step)."""
    commands: Mapping[str, str]
    """What one may want to do next -> the command line: {"resume": "torchrun ...", "evaluate": "..."}."""

    def show(self, console: Console) -> None:
        """Print the table, and below it the commands, unbroken so that they can be copied."""
        title = f"{self.outcome} after step {self.step} of {self.total_steps}"
        table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        measured = {"before": self.accuracy_before, "after": self.accuracy_after}
        shown = ", ".join(f"{value:.3f} {when}" for when, value in measured.items() if value is not None)
        if shown:
            table.add_row("held-out accuracy", shown)
        if self.best is not None:
            table.add_row("best", f"{self.best[0]:.3f} after step {self.best[1]}")
        minutes, seconds = divmod(round(self.seconds), 60)
        table.add_row("wall time", f"{minutes} min {seconds:02d} s")
        table.add_row("everything in", str(self.folder))
        for name, what in CONTENTS.items():
            if (self.folder / name).exists():
                table.add_row(f"  {name}", what)
        console.print(table)
        for purpose, command in self.commands.items():
            console.print(f"{purpose}: {command}", soft_wrap=True)
