"""A pool of worker processes for verifiers: one that hangs, dies or lies costs one score, never the run.

A worker (`workers`) is a fresh interpreter, nothing forked from a process that holds torch, in a session of its own,
so that it is killed with whatever it started.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal

from .verifiers import Verifier

WORKER_MODULE = "strop.engine.reward.workers"
START_LIMIT_S = 20.0
"""For a worker to say it is ready (measured: 0.1 s) on a loaded machine."""
START_TRIES = 3
"""What kills a starting worker may be the machine, not the worker: the kernel's out-of-memory killer, a person."""
IMPORT_LIMIT_S = 60.0
"""For the import of a verifier's package (measured: 0.7-1.4 s) on a loaded machine."""
MAX_REPLY_BYTES = 65536
"""A longer line is not a worker's reply but a runaway print."""

Status = Literal["ok", "error", "timeout", "crash"]


@dataclass(frozen=True)
class Job:
    """One question to a verifier; the arguments are JSON (`verifiers` says which each takes)."""

    verifier: Verifier
    arguments: Mapping[str, object]


@dataclass(frozen=True)
class Outcome:
    """ok: `value` is the verifier's. error: it raised. timeout: killed at the limit. crash: its worker died, twice, or ran
    out of memory. `value` is 0.0 but for ok."""

    status: Status
    value: float = 0.0
    detail: str = ""


class WorkerLost(Exception):
    """The worker died, closed its pipe or wrote something that is no reply."""


class WorkerPool:
    """At most `workers` processes, started when first needed, replaced when killed.

    limit_s: wall-clock seconds a job may take (a worker's start and imports don't count). memory_mib: RLIMIT_AS of a worker.
    command: how to start one (default: this module under this interpreter); the limits are appended as flags.
    beat: called after each job, in the thread that runs them: a sign of life while many slow jobs are under way.
    """

    def __init__(
        self,
        workers: int,
        limit_s: float,
        memory_mib: int,
        command: Sequence[str] | None = None,
        beat: Callable[[], None] = lambda: None,
    ):
        self.limit_s = limit_s
        self._beat = beat
        # -P: the current folder stays off sys.path; a repository root there would shadow packages of the same name.
        program = command or [sys.executable, "-P", "-m", WORKER_MODULE]
        self._command = [*program, f"--limit-s={limit_s}", f"--memory-mib={memory_mib}", f"--parent={os.getpid()}"]
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="reward-worker")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()
        self._closed = False

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes in the order of the jobs.

        Blocks at most limit_s * ceil(jobs / workers), plus a start-up for each worker that is lost. A job that exceeds its
        limit is not tried again; one whose worker dies is, once, since what killed the worker may not have been the job
        (the kernel's out-of-memory killer, a person). Raises RuntimeError with the worker's own words if none can start.
        """
        futures = [self._threads.submit(self._run, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                self._beat()
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def close(self) -> None:
        """Kill every worker; returns when none is left."""
        with self._lock:
            self._closed = True
            workers = list(self._alive)
        for worker in workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in list(self._alive):
            self._discard(worker)

    def _run(self, job: Job) -> Outcome:
        for _ in range(2):
            worker = self._take()
            try:
                outcome = worker.ask(job, self.limit_s)
            except TimeoutError:
                self._discard(worker)
                return Outcome("timeout", detail=f"no verdict within {self.limit_s:g} s")
            except WorkerLost as error:
                self._discard(worker)
                lost = str(error)
                continue
            except BaseException:
                self._discard(worker)
                raise
            self._idle.append(worker)
            return outcome
        return Outcome("crash", detail=lost)

    def _take(self) -> "_Worker":
        """An idle worker or a new one. RuntimeError if START_TRIES in a row don't start."""
        lost = None
        for _ in range(START_TRIES):
            with self._lock:
                if self._closed:
                    raise RuntimeError("the reward workers were closed")
                if self._idle:
                    return self._idle.pop()
                worker = _Worker(self._command)
                self._alive.add(worker)
            try:
                worker.wait_until_ready()
                return worker
            except WorkerLost as error:
                self._discard(worker)
                lost = error
        raise RuntimeError(f"{START_TRIES} reward workers in a row did not start: {lost}") from lost

    def _discard(self, worker: "_Worker") -> None:
        worker.kill()
        worker.reap()
        with self._lock:
            self._alive.discard(worker)


class _Worker:
    """The pool's end of one process: writes a line, waits for a line, both with a deadline."""

    def __init__(self, command: Sequence[str]):
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, bufsize=0, start_new_session=True,
            env={**os.environ, **threads, "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        os.set_blocking(self._process.stdin.fileno(), False)
        self._unread = b""
        self._jobs = 0
        self._imported: set[str] = set()

    def wait_until_ready(self) -> None:
        """WorkerLost, with the worker's last words, if it doesn't get there."""
        try:
            self._expect("ready", time.monotonic() + START_LIMIT_S)
        except (TimeoutError, WorkerLost) as error:
            self.kill()
            self._words.seek(0)
            words = self._words.read()[-2000:].decode(errors="replace").strip()
            raise WorkerLost(f"{error or f'not ready after {START_LIMIT_S:g} s'}: {words}") from error

    def ask(self, job: Job, limit_s: float) -> Outcome:
        """The job's outcome. TimeoutError at the limit, WorkerLost if the worker is no longer one; it must be killed then."""
        self._jobs += 1
        imported = job.verifier in self._imported
        start_by = time.monotonic() + (limit_s if imported else IMPORT_LIMIT_S)
        request = {"id": self._jobs, "verifier": job.verifier, "arguments": dict(job.arguments)}
        self._write(json.dumps(request).encode() + b"\n", start_by)
        started = self._expect("started", start_by)
        if started["missing"]:
            raise RuntimeError(f"a verifier's package can't be imported: {started['missing']}: pip install 'strop[train]'")
        self._imported.add(job.verifier)
        reply = self._expect("status", start_by if imported else time.monotonic() + limit_s)
        return Outcome(reply["status"], float(reply["value"]), str(reply["detail"]))

    def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._words):
            pipe.close()

    def _write(self, line: bytes, deadline: float) -> None:
        pipe = self._process.stdin.fileno()
        while line:
            _wait(pipe, select.POLLOUT, deadline)
            try:
                line = line[os.write(pipe, line) :]
            except OSError as error:
                raise WorkerLost(f"the worker is gone ({error.strerror})") from error

    def _expect(self, key: str, deadline: float) -> dict:
        """The next line, which must be a JSON object with `key` and this job's number."""
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if len(self._unread) > MAX_REPLY_BYTES:
                raise WorkerLost("the worker wrote something that is no reply")
            _wait(pipe, select.POLLIN, deadline)
            data = os.read(pipe, MAX_REPLY_BYTES)
            if not data:
                raise WorkerLost("the worker died")
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        try:
            message = json.loads(line)
            if message["id"] != self._jobs or key not in message:
                raise ValueError(message)
        except (ValueError, TypeError, KeyError) as error:
            raise WorkerLost("the worker wrote something that is no reply") from error
        return message


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Until `descriptor` is ready; TimeoutError at the deadline. poll, not select: a trainer may hold over 1024 descriptors."""
    poller = select.poll()
    poller.register(descriptor, event)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
