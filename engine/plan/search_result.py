"""What a search found: layouts in order, and for each reason why others failed the one nearest to working."""

from dataclasses import dataclass, field
from functools import cached_property

from .check import memory_problems
from .grpo import GrpoStep
from .memory import memory_per_rank, worst_stage
from .nearest import Working, ways_out
from .run import PlannedRun
from .text import layout_text, settings_text
from .training import StepTime

MEMORY, HOST_MEMORY = "memory", "host_memory"
"""Causes of rejections: a GPU's, and that of a node's host where the GPU's is enough."""


@dataclass(frozen=True)
class Rejection:
    """A run that doesn't work and why."""

    run: PlannedRun
    cause: str
    """What rejections for the same reason share: the setting that is wrong; MEMORY or HOST_MEMORY where that is the reason."""
    problem: str = ""
    """What is wrong with its settings; "" where memory is the reason."""
    at_least_bytes: float = 0.0
    """Where a GPU's memory is the reason: a bound on what the fullest rank needs."""
    host_shortage_bytes: float = 0.0
    """Where the host's is the reason: what the fullest node lacks."""
    budget_bytes: float = 0.0
    """Of a GPU."""

    @cached_property
    def reason(self) -> str:
        """Why it fails, with the wrong numbers."""
        return self.problem or "; ".join(one.reason for one in memory_problems(self.run, self.budget_bytes))

    @cached_property
    def need_bytes(self) -> float:
        """Where memory is the reason: what the fullest rank needs of its GPU's; else 0."""
        return 0.0 if self.problem else worst_stage(memory_per_rank(self.run)).total_bytes

    @property
    def layout(self) -> str:
        """Of its run, in words."""
        return f"{layout_text(self.run)}; {settings_text(self.run)}"


@dataclass(frozen=True)
class RejectionGroup:
    """Rejections that share a cause."""

    cause: str
    """A setting's path, MEMORY or HOST_MEMORY."""
    count: int
    nearest: Rejection
    """For memory the one that needs or lacks least, which the reason's numbers belong to; else the first."""


@dataclass(frozen=True)
class SearchResult:
    ranked: tuple[tuple[PlannedRun, StepTime | GrpoStep], ...]
    """Fastest first; of equally fast ones the one with fewer ranks a replica. Of layouts with the same degrees tp, cp, pp, ep,
    etp and training GPUs only the fastest."""
    rejected: tuple[Rejection, ...]
    """For lack of memory: a layout with those of the allowed settings that need least."""
    seconds: float
    """That the search took."""
    evaluated_count: int
    """Steps predicted."""
    outpaced_count: int
    """Layouts left out since they can't be faster than the last ranked one by more than search.LEFT_OUT_SHARE; all layouts
    beside the same engines, which generate too slowly, as one."""
    budget_bytes: float
    """Of a GPU, that a layout may need."""
    reserve_bytes: float = 0.0
    """Of a GPU, that layouts leave free."""
    held: dict[str, str] = field(default_factory=dict)
    """What was not varied, by the flag that frees it (`candidates.held_fixed`)."""
    open_count: int = 0
    """Layouts at the least that the limit of time left undecided."""
    open_at_least_seconds: float = 0.0
    """Of a step: none of those takes less."""

    def groups(self) -> list[RejectionGroup]:
        """Rejections by cause, most frequent first."""
        causes: dict[str, list[Rejection]] = {}
        for rejection in self.rejected:
            causes.setdefault(rejection.cause, []).append(rejection)
        groups = [RejectionGroup(cause, len(found), _nearest(found)) for cause, found in causes.items()]
        return sorted(groups, key=lambda group: -group.count)

    def reasons(self) -> list[tuple[str, int]]:
        """(reason and the layout that it is about, how many layouts fail for it), most frequent first."""
        return [(f"{group.nearest.reason}, with {group.nearest.layout}", group.count) for group in self.groups()]

    def ways_out(self) -> list[Working]:
        """Where nothing works: the layout nearest to fitting into memory, changed until it does, or else with more GPUs."""
        return self._ways_out[0]

    def lack_of_ways(self) -> str:
        """What is to be said where nothing works and no change was enough without more GPUs; else ""."""
        return self._ways_out[1]

    @cached_property
    def _ways_out(self) -> tuple[list[Working], str]:
        too_large = [self._for_lack_of(cause) for cause in (HOST_MEMORY, MEMORY)]
        nearest = [] if self.ranked else [_nearest(rejections).run for rejections in too_large if rejections]
        return ways_out(nearest, self.budget_bytes) if nearest else ([], "")

    @property
    def smallest_need_bytes(self) -> float:
        """The least memory that any of the layouts rejected for a GPU's needs of it; 0 if there is none."""
        too_large = self._for_lack_of(MEMORY)
        return _nearest(too_large).need_bytes if too_large else 0.0

    def _for_lack_of(self, cause: str) -> list[Rejection]:
        return [one for one in self.rejected if one.cause == cause]


def _nearest(rejections: list[Rejection]) -> Rejection:
    """The one that needs least memory; its exact need is asked only of those whose bound is below the least found. Of those
    that lack host memory, which all have the same cause, the one that lacks least."""
    if rejections[0].cause == HOST_MEMORY:
        return min(rejections, key=lambda one: one.host_shortage_bytes)
    nearest: Rejection | None = None
    for one in sorted(rejections, key=lambda one: one.at_least_bytes):
        if nearest is not None and one.at_least_bytes >= nearest.need_bytes:
            break
        if nearest is None or one.need_bytes < nearest.need_bytes:
            nearest = one
    return nearest
