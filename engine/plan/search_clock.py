"""How long a search may take, and its reports meanwhile."""

import time
from collections.abc import Callable

LIMIT_SECONDS = 60.0
PROGRESS_SECONDS = 1.0
"""Between two reports."""
Progress = Callable[[int, int], None]
"""Called with the numbers of steps predicted and of layouts that wait."""


class Clock:
    """Of a search: when it ends and when it reports."""

    def __init__(self, limit_seconds: float, progress: Progress | None) -> None:
        self.started = self.reported = time.perf_counter()
        self.limit_seconds, self.progress = limit_seconds, progress

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def is_over(self) -> bool:
        return self.seconds() >= self.limit_seconds

    def report(self, evaluated: int, waiting: int) -> None:
        now = time.perf_counter()
        if self.progress is not None and now >= self.reported + PROGRESS_SECONDS:
            self.reported = now
            self.progress(evaluated, waiting)
