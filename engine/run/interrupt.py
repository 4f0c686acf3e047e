"""Ctrl-C: the run stops at the next safe point, saves and says how to resume. A second Ctrl-C ends it at once.

    with Interrupt() as interrupt:
        for step in ...:
            ...
            if interrupt.requested: (agreed between the ranks, by an all-reduce of the flag) save and leave

Which signal does what:
- SIGINT asks for a stop with a save. torchrun passes a terminal's Ctrl-C on to every rank and kills them 30 s later, so the
  loop should look at `requested` between phases and inside long ones; `torchrun --shutdown-timeout SECONDS` gives more time.
  A second Ctrl-C makes torchrun end the ranks itself.
- SIGTERM ends the process at once, even inside a collective: it is what torchrun sends to the survivors of a rank that died,
  which can neither save nor finish their collective. Its default action is left alone for that reason. Before a scheduler's
  SIGTERM ask it for a SIGINT; SLURM: `#SBATCH --signal=INT@180` with `torchrun --shutdown-timeout 170`. At worst the run
  goes on from its last periodic checkpoint.
- A rank whose torchrun is gone (kill -9, a closed terminal) ends within a second, instead of training on unseen.
"""

import os
import select
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType

from .failure import ERROR_EXIT_CODE, INTERRUPTED_EXIT_CODE
from .torchrun import Torchrun

ORPHAN_CHECK_SECONDS = 1.0


class Interrupt:
    """Context manager, main thread only. Its thread reads the signals, so a main thread inside C code doesn't delay them."""

    def __init__(self) -> None:
        self._torchrun = Torchrun.from_environment()
        self._asked = threading.Event()

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop. Ranks learn it at slightly different times: agree before acting on it."""
        return self._asked.is_set()

    def __enter__(self) -> "Interrupt":
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._old_handler = signal.signal(signal.SIGINT, _leave_it_to_the_thread)
        self._old_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="interrupt", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._old_fd)
        signal.signal(signal.SIGINT, self._old_handler)
        self._sender.close()
        self._thread.join()
        self._receiver.close()

    def _listen(self) -> None:
        while True:
            readable, _, _ = select.select([self._receiver], [], [], ORPHAN_CHECK_SECONDS)
            if self._torchrun.parent not in (None, os.getppid()):
                self._end_process(f"rank {self._torchrun.rank}: torchrun is gone, stopping without a save", ERROR_EXIT_CODE)
            if not readable:
                continue
            received = self._receiver.recv(64)
            if not received:
                return
            for _ in range(received.count(signal.SIGINT)):
                self._on_sigint()

    def _on_sigint(self) -> None:
        if self._asked.is_set():
            self._end_process("stopped at once, without a save", INTERRUPTED_EXIT_CODE)
        self._asked.set()
        if self._torchrun.rank == 0:
            text = "\nstopping at the next safe point, with a save; Ctrl-C again stops at once, without"
            print(text, file=sys.stderr, flush=True)

    @staticmethod
    def _end_process(why: str, code: int) -> None:
        print(why, file=sys.__stderr__, flush=True)
        os._exit(code)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Python writes the signal's number to the wake-up descriptor only while a handler is set."""
