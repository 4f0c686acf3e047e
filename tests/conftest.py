"""Fixtures shared by all tests."""

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(world_size, fn, *args, time_limit=60)` -> [fn(*args) on rank 0, on rank 1, ...].

    Each rank is a fork of this process (0.1 s; torch is already imported) with torchrun's environment set, in which
    `Mesh.start(Layout(), "cpu")` works. `fn` may be a closure; results are pickled. When a rank raises or dies, or the
    time limit (seconds) passes, all are killed and the first failure is raised here with its traceback.
    """
    return _run_ranks


def _run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, time_limit: float = 60.0) -> list[Any]:
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank_main, args=(rank, world_size, theirs, fn, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    # Hosting the store here (as torchrun's agent does) lets the system choose a free port without a race. After the forks:
    # serving the first ranks, its thread may hold a lock of the C library, which the copy in a later fork would wait for.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for pipe in pipes:
        pipe.send(store.port)
    try:
        return _collect(processes, pipes, time_limit)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(processes: list[Any], pipes: list[Connection], time_limit: float) -> list[Any]:
    deadline = time.monotonic() + time_limit
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipes[rank]: rank for rank in range(len(pipes)) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in waiting.values():
                os.kill(processes[rank].pid, signal.SIGUSR1)  # prints its stacks
            time.sleep(0.2)
            raise TimeoutError(f"ranks {sorted(waiting.values())} still ran after {time_limit} s (stacks: captured stderr)")
        for pipe in ready:
            rank = waiting[pipe]
            try:
                succeeded, payload = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                raise RuntimeError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{payload}")
            results[rank] = payload
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    rank: int, world_size: int, pipe: Connection, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    gc.freeze()  # collecting a store of the parent here would join its thread, which a fork doesn't have
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed pytest leaves no ranks behind
    # Not dump_traceback_later: pytest's own use of it (faulthandler_timeout) holds a lock that no thread of a fork can release.
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    torch.set_num_threads(1)  # the parent's OpenMP threads don't exist in a fork
    port = pipe.recv()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    try:
        message = pickle.dumps((True, fn(*args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
