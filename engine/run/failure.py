"""One clear error: what a launch file prints when it fails, and how it exits.

    with FailureReport() as failure:
        ...
        failure.folder = run_folder.path

A mistake of the user (InputError) is one line and exit code 2. Anything else is a traceback, once, under a header with rank
and phase, and exit code 1. Of several ranks the first to fail prints in full; the others say one line; a rank that fails
only because another one died waits for that one's error to end the run. torchrun repeats the reason in its box at the very
bottom. Nothing is swallowed: every rank's traceback is in the run folder too (error-rank-N.txt). Before there is a run folder,
printing is all that happens: where nobody reads it any longer (| head), the process ends in silence.
"""

import faulthandler
import os
import re
import sys
import time
import traceback
from datetime import datetime
from pathlib import Path
from types import TracebackType

from ..config import InputError
from .torchrun import Torchrun

ERROR_EXIT_CODE = 1
INPUT_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130

AGREEMENT_SECONDS = 1.0
"""How long the first rank with an InputError waits to learn whether all ranks have the same one."""
LOST_PEER_SECONDS = 10.0
"""How long a rank that lost another waits for torchrun to end it: torchrun needs 0.2 s on one node."""

LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Socket (closed|not connected)|"
    r"remote process exit(ed|ing)|failed to recv, got 0 bytes|Failed to connect|connectFullMesh failed",
    re.IGNORECASE,
)
"""What gloo and the TCP store of torch 2.13 were seen to say, and NCCL's sources say, when the other end is gone."""
LOST_PEER_TYPES = {"RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError"}


class FailureReport:
    """Context manager around everything a launch file does. Leaves SystemExit (--help, a command-line mistake) alone.

    With several ranks the process ends without Python's shutdown: that would wait for threads (an asynchronous save in a
    collective) whose partners may be gone.
    """

    folder: Path | None = None
    """Set it once the run folder exists: full tracebacks are written there."""

    def __init__(self) -> None:
        self._torchrun = Torchrun.from_environment()

    def __enter__(self) -> "FailureReport":
        faulthandler.enable(sys.__stderr__)  # a crash in C code shows the Python stack too
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.folder is None and (error is None or isinstance(error, SystemExit | OSError)):
            self._end_where_nothing_can_be_printed(probe="\n" if isinstance(error, OSError) else "")
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, KeyboardInterrupt):
            if self._torchrun.rank == 0:
                self._print("interrupted: nothing was saved")
            self._exit(INTERRUPTED_EXIT_CODE)
        elif isinstance(error, InputError):
            self._report_mistake(str(error))
            self._exit(INPUT_ERROR_EXIT_CODE)
        else:
            self._report_error(error)
            self._exit(ERROR_EXIT_CODE)

    def _end_where_nothing_can_be_printed(self, probe: str) -> None:
        """Of standard output: a closed pipe or a full disk. The probe meets again what failed with what was printed; without
        one, what is still in the buffer does."""
        try:
            print(probe, end="", flush=True)
        except OSError as lost:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
            if not isinstance(lost, BrokenPipeError):
                self._print(f"error: standard output can't be written ({lost.strerror})")
            self._exit(ERROR_EXIT_CODE)

    def _report_mistake(self, message: str) -> None:
        ranks = self._torchrun
        text = f"error: {message}"
        ranks.record(text)
        if (first := ranks.first_to_fail()) == ranks.local_rank:
            deadline = time.monotonic() + AGREEMENT_SECONDS
            while len(ranks.recorded()) < ranks.local_world_size > 1 and time.monotonic() < deadline:
                time.sleep(0.02)
            everywhere = ranks.world_size == 1 or list(ranks.recorded().values()).count(text) == ranks.local_world_size
            self._print(text if everywhere else f"error (rank {ranks.rank}): {message}")
            return
        if ranks.recorded().get(first) != text:
            self._print(f"error (rank {ranks.rank}): {message}")
        time.sleep(2 * AGREEMENT_SECONDS)  # torchrun ends the others as soon as one is gone: let the first print

    def _report_error(self, error: BaseException) -> None:
        rank = self._torchrun.rank
        where = "".join(f" {note}" for note in getattr(error, "__notes__", [])[:1])
        text = f"rank {rank} failed{where}:\n" + "".join(traceback.format_exception(error)).rstrip()
        summary = f"rank {rank} failed{where}: {type(error).__name__}: {error}"
        written = self._write(text)
        if written is not None:
            summary += f" (traceback: {written})"
        if self._torchrun.world_size > 1 and is_lost_peer(error):
            self._print(f"rank {rank} lost another rank{where}; that one's error is the cause")
            time.sleep(LOST_PEER_SECONDS)
            self._print(f"nothing ended rank {rank} in {LOST_PEER_SECONDS:.0f} s. {text}")
        elif self._torchrun.first_to_fail() == self._torchrun.local_rank or written is None:
            self._print(text)
        else:
            self._print(summary)
        self._torchrun.record(summary)

    def _write(self, text: str) -> Path | None:
        """Where the text was written in the run folder; None when there is no folder yet, or no space left."""
        if self.folder is None:
            return None
        path = self.folder / f"error-rank-{self._torchrun.rank}.txt"
        try:
            path.write_text(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")
        except OSError:
            return None
        return path

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _exit(self, code: int) -> None:
        if self._torchrun.world_size == 1:
            raise SystemExit(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` began with a connection to another rank that broke, and not with anything this rank did."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return type(error).__name__ in LOST_PEER_TYPES | {"CheckpointException"} and bool(LOST_PEER.search(str(error)))
