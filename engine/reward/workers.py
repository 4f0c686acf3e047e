"""One reward worker: scores jobs for `pool.WorkerPool`, in a process that may be killed at any moment.

    python -m strop.engine.reward.workers --limit-s 5 --memory-mib 2048 --parent PID

JSON lines: {"id": 0, "ready": true} once; then for each job {"id", "verifier", "arguments"} on stdin a line "started" (its
packages are imported, the clock runs) and a line with status, value and detail. Memory is limited by RLIMIT_AS. Time is
the pool's to limit; should the pool be gone, an interval timer whose default action is death does. The worker leaves
when its stdin closes, and on Linux the kernel kills it with the thread that started it. An audit hook refuses files,
sub-processes and sockets while an answer is scored, since some reasoning-gym scorers call `eval` on it: a guard
against accidents, not a sandbox.

Imports neither torch nor transformers, so a start takes 0.1 s.
"""

import argparse
import ctypes
import json
import os
import resource
import signal
import sys

from strop.engine.reward import verifiers

PR_SET_PDEATHSIG = 1
FORBIDDEN_EVENTS = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.dlopen", "fcntl.", "sqlite3.", "webbrowser.")
ALLOWED_EVENTS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
"""Reading is left alone: packages load their data lazily."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def serve(limit_s: float, memory_mib: int, parent: int) -> None:
    """Answer jobs until stdin closes. `parent` is the process that must be alive."""
    _die_with(parent)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # a library that prints must not reach the pipe
        os.dup2(nowhere, stream)
    sys.dont_write_bytecode = True
    for limit, value in ((resource.RLIMIT_AS, memory_mib << 20), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))
    guard = _Guard()
    sys.addaudithook(guard)

    def say(**message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    say(id=0, ready=True)
    os.dup2(nowhere, 2)
    for line in requests:
        job = json.loads(line)
        try:
            verify = verifiers.load(job["verifier"])
        except ImportError as error:
            say(id=job["id"], started=False, missing=str(error))
            continue
        say(id=job["id"], started=True, missing="")
        signal.setitimer(signal.ITIMER_REAL, limit_s + 1.0)
        guard.closed = True
        try:
            status, value, detail = "ok", verify(job["arguments"]), ""
        except MemoryError:
            status, value, detail = "crash", 0.0, f"out of memory at {memory_mib} MiB"
        except Exception as error:
            status, value, detail = "error", 0.0, f"{type(error).__name__}: {error}"[:200]
        guard.closed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(id=job["id"], status=status, value=value, detail=detail)
        if status == "crash":  # what survived the MemoryError may be broken
            return


def _die_with(parent: int) -> None:
    """Have the kernel send SIGKILL when the parent's thread ends: it reaches a worker that is stopped or stuck in an import."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        sys.exit()


class _Guard:
    """Audit hook: while `closed`, refuses to write or delete files, start processes, open sockets and load libraries."""

    def __init__(self):
        self.closed = False

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.closed:
            return
        writes = event == "open" and arguments[2] & WRITING
        if writes or (event.startswith(FORBIDDEN_EVENTS) and not event.startswith(ALLOWED_EVENTS)):
            raise PermissionError(f"{event} is refused while an answer is scored")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One reward worker; started by WorkerPool.")
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("--memory-mib", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    serve(**vars(parser.parse_args()))
