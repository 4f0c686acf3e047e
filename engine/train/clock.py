"""How long the parts of a training step take on their device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Mark = float | torch.cuda.Event


class StepClock:
    """Adds up the seconds of named parts. On a GPU events in its stream mark the ends, so that nobody waits for them."""

    def __init__(self, device: torch.device):
        self._device = device
        self._parts: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._parts.append((name, begin, self._mark()))

    def take(self) -> dict[str, float]:
        """{"time/train_<part>": seconds} since the last call. Waits for the last part to end on the device."""
        times: dict[str, float] = {}
        for name, begin, end in self._parts:
            key = f"time/train_{name}"
            times[key] = times.get(key, 0.0) + _seconds(begin, end)
        self._parts = []
        return times

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
