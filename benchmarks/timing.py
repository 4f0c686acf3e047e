"""How long a call takes: candidates in turn (A, B, A, B, ...), so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_ROUNDS, MOST_ROUNDS = 3, 500
L2_BYTES = 256 * 2**20
"""More than any GPU's last-level cache: zeroing so much before a call leaves nothing of its inputs there."""
CYCLES_A_SECOND = 2e9
"""No GPU here runs faster, so that a wait counted in cycles is never too short."""
LONGEST_WAIT = 0.02
"""Seconds; a call that waits for the GPU itself would otherwise be waited for twice."""

Outputs = dict[str, Tensor]


class Candidate(NamedTuple):
    """One implementation, its inputs bound."""

    run: Callable[[], Outputs]
    calls: int = 1
    """Calls of the op in one run."""
    before: Callable[[], object] | None = None
    """Restores inputs that a run overwrites; not timed."""

    def __call__(self) -> Outputs:
        if self.before is not None:
            self.before()
        return self.run()


class Times(NamedTuple):
    """Milliseconds of a call."""

    median: float
    low: float
    """Fifth part of the calls that were fastest: their slowest."""
    high: float
    calls: int


def interleaved(candidates: Mapping[str, Candidate], device: torch.device, seconds: float) -> dict[str, Times]:
    """Each candidate once unmeasured, then all in turn until `seconds` have passed (3 rounds at least, 500 at most)."""
    for candidate in candidates.values():
        candidate()
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name, candidate in candidates.items():
            samples[name].append(clock(candidate) / candidate.calls)
    return {name: _summary(values) for name, values in samples.items()}


def milliseconds(run: Callable[[], object], device: torch.device, seconds: float = 0.5) -> float:
    """Median of one function."""

    def call() -> Outputs:
        run()
        return {}

    return interleaved({"": Candidate(call)}, device, seconds)[""].median


def in_graph(run: Callable[[], Outputs], calls: int = 20) -> Candidate:
    """`calls` calls captured into one CUDA graph: the device's share of an op that is shorter than its launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            outputs = run()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return Candidate(replay, calls)


def _summary(samples: list[float]) -> Times:
    ordered = sorted(samples)
    return Times(statistics.median(ordered), ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5], len(ordered))


def _cpu_clock(candidate: Candidate) -> float:
    if candidate.before is not None:
        candidate.before()
    start = time.perf_counter()
    candidate.run()
    return (time.perf_counter() - start) * 1e3


def _cuda_clock(device: torch.device) -> Callable[[Candidate], float]:
    scratch = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    queueing: dict[int, float] = {}  # seconds that the host took for a candidate's last call

    def clock(candidate: Candidate) -> float:
        if candidate.before is not None:
            candidate.before()
        scratch.zero_()
        # The GPU idles until the host has queued the whole call, so that the host's time is not what is measured.
        wait = min(2 * queueing.get(id(candidate), 1e-3), LONGEST_WAIT)
        torch.cuda._sleep(int(wait * CYCLES_A_SECOND))
        start.record()
        began = time.perf_counter()
        candidate.run()
        queueing[id(candidate)] = time.perf_counter() - began
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return clock
