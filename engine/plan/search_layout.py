"""What a search knows of a layout, some of whose settings it has tried."""

from dataclasses import dataclass, field, replace

from .run import PlannedRun, TrainingPlan


@dataclass
class OfLayout:
    """What is known of one layout and micro-batch."""

    open: int
    """Of its settings apart from recomputation, how many have some left."""
    fitting: list[tuple[TrainingPlan, bool]] = field(default_factory=list)
    """With what fits, whether the fastest engines fit beside it."""
    least: tuple[float, PlannedRun] | None = None
    """Of what doesn't fit, the (bound on the) least need."""
    least_host: tuple[float, PlannedRun] | None = None
    """Of what fits the device but not the host of a node, the least shortage."""

    def outdoes(self, training: TrainingPlan) -> bool:
        """Something that fits is at least as fast for sure: less is recomputed and offloaded, else they are the same. What is
        offloaded makes room for faster engines, where they are not the fastest."""
        return any(
            _recomputes_no_more(one, training)
            and (one.offload_optimizer == training.offload_optimizer or (fastest and not one.offload_optimizer))
            and one == replace(training, recompute=one.recompute, offload_optimizer=one.offload_optimizer)
            for one, fastest in self.fitting
        )

    def note(self, need_bytes: float, run: PlannedRun) -> None:
        if self.least is None or need_bytes < self.least[0]:
            self.least = need_bytes, run

    def note_host(self, shortage_bytes: float, run: PlannedRun) -> None:
        if self.least_host is None or shortage_bytes < self.least_host[0]:
            self.least_host = shortage_bytes, run


def _recomputes_no_more(one: TrainingPlan, other: TrainingPlan) -> bool:
    return "layer" in other.recompute or set(one.recompute) <= set(other.recompute)
