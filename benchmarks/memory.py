"""Peak memory of a call beyond its inputs and its results.

On a GPU the allocator's peak. On a CPU the resident set of a fresh child process, which the kernel records (VmHWM of
/proc/self/status); children are forked, in 0.1 s each, from a server that has imported torch and our kernels and run none.
"""

import ctypes
import gc
import importlib
import multiprocessing
import re
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from timing import Candidate, Outputs


def extra_on_cuda(candidate: Candidate, device: torch.device) -> int:
    """Bytes. The candidate has run before: libraries have their workspaces."""
    if candidate.before is not None:
        candidate.before()
    torch.cuda.reset_peak_memory_stats(device)
    outputs = candidate.run()
    extra = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    del outputs  # which was to be held until here
    return extra


class ChildProcesses:
    """Measures candidates of the comparisons that a benchmark file defines, each in a process of its own."""

    def __init__(self, module: str, quick: bool):
        self._arguments = module, quick, torch.get_num_threads()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "strop.kernels"])

    def extra(self, comparison: int, candidate: str) -> int:
        """Bytes; raises RuntimeError where the child dies."""
        ours, theirs = self._context.Pipe(duplex=False)
        child = self._context.Process(target=_measure, args=(*self._arguments, comparison, candidate, theirs))
        child.start()
        theirs.close()
        try:
            return ours.recv()
        except EOFError:
            child.join()
            raise RuntimeError(f"the process measuring the memory of {candidate} ended with {child.exitcode}") from None
        finally:
            child.join()


def _measure(module: str, quick: bool, threads: int, comparison: int, name: str, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    candidate = importlib.import_module(module).comparisons(device, quick)[comparison].make()[name]
    kept = candidate()  # compiles, starts threads, allocates the libraries' buffers; held, so that nothing takes its place
    if candidate.before is not None:
        candidate.before()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not serve the call unseen
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    outputs = candidate.run()
    pipe.send(max(_resident("VmHWM") - before - _new_bytes(outputs, kept), 0))


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _new_bytes(outputs: Outputs, kept: Outputs) -> int:
    """Of the results that the call allocated: not those that it wrote into what was there."""
    old = {tensor.untyped_storage().data_ptr() for tensor in kept.values()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in outputs.values()}
    return sum(size for place, size in storages.items() if place not in old)
