"""Ends a run that makes no progress, and says where every thread stood.

A hang otherwise shows nothing: the bar stands still, and a collective gives up after half an hour without naming who was
missing. Every rank watches itself. The rank that is stuck has been silent for longest, so it reports before those that wait
for it in a collective; torchrun then takes those down.
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from .torchrun import Torchrun

STALL_EXIT_CODE = 3
REPORT_SECONDS = 20.0
"""Bound for writing the report itself: the file system may be what hangs."""


class Watchdog:
    """`with Watchdog(600, folder) as watchdog:` ... `watchdog.beat("step 3, rollout")` at every sign of life.

    After `stall_seconds` without a beat the process prints rank, phase, seconds and the stacks of all threads, writes the
    same into `folder`/stall-rank-N.txt and exits with code 3. That works while the main thread is inside C code (a
    collective, a sleep, a kernel). Should that code even hold Python's lock, so that no Python thread runs, faulthandler's
    timer, which needs no lock, prints the stacks and exits with code 1. A process suspended for as long counts as stalled.
    stall_seconds 0 watches nothing.
    """

    def __init__(self, stall_seconds: float, folder: Path | None = None):
        self.stall_seconds = stall_seconds
        self.phase = "start"
        self._folder = folder
        self._torchrun = Torchrun.from_environment()
        self._last_beat = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, phase: str | None = None) -> None:
        """Progress was made; `phase` (kept when None) is what a report would name. Costs 0.1 us."""
        if phase is not None:
            self.phase = phase
        self._last_beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self.stall_seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        period = min(1.0, self.stall_seconds / 4)
        while True:
            # Re-armed by this thread, the timer fires when even this thread can't run.
            faulthandler.dump_traceback_later(self.stall_seconds + period, exit=True, file=sys.__stderr__)
            if self._stopped.wait(period):
                return
            silent = time.monotonic() - self._last_beat
            if silent >= self.stall_seconds:
                self._end_process(silent)

    def _end_process(self, silent: float) -> None:
        faulthandler.dump_traceback_later(REPORT_SECONDS, exit=True, file=sys.__stderr__)
        rank = self._torchrun.rank
        limit = f"--run.stall-seconds {self.stall_seconds:g}"
        title = f"rank {rank}: no progress for {silent:.0f} s in phase '{self.phase}' ({limit})"
        try:
            self._torchrun.record(f"{title}; stacks above" + ("" if self._folder is None else f" and in {self._folder}"))
            self._report(sys.__stderr__, title)
            if self._folder is not None:
                with (self._folder / f"stall-rank-{rank}.txt").open("w") as file:
                    self._report(file, title)
        finally:
            os._exit(STALL_EXIT_CODE)

    @staticmethod
    def _report(file: TextIO, title: str) -> None:
        file.write(f"\n{title}; the stacks of its threads:\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
