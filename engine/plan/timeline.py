"""Who computes what when: the order of work of each pipeline rank, and the event simulation of it.

`schedules` compiles these orders once and runs them fast for a search; it is tested against `simulate`, and the timeline of a
picture is drawn from here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Work = Literal["forward", "backward", "backward_input", "backward_weight"]


@dataclass(frozen=True)
class Pass:
    """One pass of a micro-batch through one virtual stage. "backward" is backward_input and backward_weight at once."""

    work: Work
    stage: int
    """Virtual stage, 0 at the embedding; pp x vpp of them (DualPipeV: 2 pp)."""
    microbatch: int

    def needs(self, last_stage: int) -> tuple[str, int, int] | None:
        """What must have been made before; None for a forward pass of the first stage."""
        if self.work == "forward":
            return ("forward", self.stage - 1, self.microbatch) if self.stage else None
        if self.work == "backward_weight":
            return ("gradient", self.stage, self.microbatch)
        if self.stage == last_stage:
            return ("forward", self.stage, self.microbatch)
        return ("gradient", self.stage + 1, self.microbatch)

    @property
    def makes(self) -> tuple[str, int, int]:
        made = {"forward": "forward", "backward_weight": "weight gradient"}.get(self.work, "gradient")
        return (made, self.stage, self.microbatch)

    def is_local(self, last_stage: int) -> bool:
        """Whether what it needs was made on its own rank."""
        return self.work == "backward_weight" or (self.work != "forward" and self.stage == last_stage)


Slot = tuple[Pass, ...]
"""What a rank does at once: one pass, or a forward and a backward that run beside each other."""


@dataclass(frozen=True)
class Interval:
    """A slot and when it ran."""

    rank: int
    passes: Slot
    start_seconds: float
    end_seconds: float


def one_forward_one_backward(pp: int, microbatches: int, paired: bool = False) -> list[list[Slot]]:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): rank r warms up with pp - 1 - r forwards; slots of each rank.

    paired: each forward runs beside the backward after it, for which a rank warms up with 2 (pp - 1 - r) + 1 forwards
    (neighbours would wait a whole slot for each other otherwise).
    """
    orders = []
    for rank in range(pp):
        warmup = min(microbatches, 2 * (pp - 1 - rank) + 1 if paired else pp - 1 - rank)
        forwards = [Pass("forward", rank, i) for i in range(microbatches)]
        orders.append(_steady(forwards, [Pass("backward", rank, i) for i in range(microbatches)], warmup, paired))
    return orders


def _steady(forwards: Sequence[Pass], backwards: Sequence[Pass], warmup: int, paired: bool) -> list[Slot]:
    """Forwards alone, then one forward and one backward in turn (paired: at once), then backwards alone."""
    order: list[Slot] = [(forward,) for forward in forwards[:warmup]]
    for i, backward in enumerate(backwards):
        beside = tuple(forwards[warmup + i : warmup + i + 1])
        order += [(*beside, backward)] if paired or not beside else [beside, (backward,)]
    return order


def interleaved(pp: int, vpp: int, microbatches: int, paired: bool = False) -> list[list[Slot]]:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2): rank r holds chunks r, r + pp, ...; micro-batches go in groups of pp.

    paired: as `one_forward_one_backward`; one more forward warms up.
    """
    assert microbatches % pp == 0, f"{microbatches} micro-batches are no multiple of pp {pp}"
    total = microbatches * vpp

    def stage_and_microbatch(index: int, rank: int, backward: bool) -> tuple[int, int]:
        group, inside = divmod(index, pp * vpp)
        chunk, position = divmod(inside, pp)
        return (vpp - 1 - chunk if backward else chunk) * pp + rank, group * pp + position

    orders = []
    for rank in range(pp):
        warmup = min(total, 2 * (pp - 1 - rank) + (vpp - 1) * pp + paired)
        forwards = [Pass("forward", *stage_and_microbatch(i, rank, False)) for i in range(total)]
        backwards = [Pass("backward", *stage_and_microbatch(i, rank, True)) for i in range(total)]
        orders.append(_steady(forwards, backwards, warmup, paired))
    return orders


def zero_bubble(pp: int, microbatches: int) -> list[list[Slot]]:
    """ZB-H1 (arXiv 2401.10241), ZB1P in DeepSeek-V3's tables: 1F1B whose weight gradients wait, rank r's for r passes."""
    orders = []
    for rank in range(pp):
        warmup = min(microbatches, pp - 1 - rank)
        order: list[Slot] = [(Pass("forward", rank, i),) for i in range(warmup)]
        for i in range(microbatches):
            if i + warmup < microbatches:
                order.append((Pass("forward", rank, i + warmup),))
            order.append((Pass("backward_input", rank, i),))
            if i >= rank:
                order.append((Pass("backward_weight", rank, i - rank),))
        order += [(Pass("backward_weight", rank, i),) for i in range(max(0, microbatches - rank), microbatches)]
        orders.append(order)
    return orders


def dualpipe(pp: int, microbatches: int) -> list[list[Slot]]:
    """DualPipe (arXiv 2412.19437, section 3.2.1; the eight phases of deepseek-ai/DualPipe dualpipe.py).

    Micro-batches 0 .. m/2 - 1 enter at rank 0, the others at the last rank, whose stages are counted from there.
    """
    assert pp % 2 == 0 and microbatches % 2 == 0 and microbatches >= 2 * pp, (
        f"DualPipe with pp {pp}, {microbatches} micro-batches"
    )
    orders = []
    for rank in range(pp):
        near, far = (rank, pp - 1 - rank) if rank < pp // 2 else (pp - 1 - rank, rank)
        first = 0 if rank < pp // 2 else microbatches // 2
        starts = (first, microbatches // 2 - first)
        orders.append(_two_way_order(pp // 2, near, (near, far), starts, microbatches // 2))
    return orders


def dualpipev(pp: int, microbatches: int) -> list[list[Slot]]:
    """DualPipeV ("cut in half", deepseek-ai/DualPipe dualpipev.py): rank r holds virtual stages r and 2 pp - 1 - r."""
    assert microbatches >= 2 * pp, f"DualPipeV with pp {pp} needs {2 * pp} micro-batches, not {microbatches}"
    return [_two_way_order(pp, rank, (rank, 2 * pp - 1 - rank), (0, 0), microbatches) for rank in range(pp)]


def _two_way_order(half: int, position: int, stages: tuple[int, int], starts: tuple[int, int], count: int) -> list[Slot]:
    """A rank's eight phases; phase 0 is the direction (DualPipeV: the leg) that reaches it early, phase 1 the late one."""
    done = {(work, phase): 0 for work in ("forward", "backward") for phase in (0, 1)}
    waiting: list[Pass] = []
    order: list[Slot] = []

    def next_pass(work: Work, phase: int) -> Pass:
        counted = "forward" if work == "forward" else "backward"
        index = done[counted, phase]
        done[counted, phase] += 1
        made = Pass(work, stages[phase], starts[phase] + index)
        if work == "backward_input":
            waiting.append(Pass("backward_weight", made.stage, made.microbatch))
        return made

    def alone(work: Work, phase: int) -> None:
        order.append((next_pass(work, phase),))

    def together(forward_phase: int, backward_phase: int) -> None:
        order.append((next_pass("forward", forward_phase), next_pass("backward", backward_phase)))

    after = half - 1 - position
    for _ in range(2 * after):
        alone("forward", 0)
    for _ in range(position + 1):
        alone("forward", 0)
        alone("forward", 1)
    for _ in range(after):
        alone("backward_input", 1)
        order.append((waiting.pop(0),))
        alone("forward", 1)
    for i in range(count - 2 * half + position + 1):
        if i == 0 and position == half - 1:
            alone("forward", 0)
            alone("backward", 1)
        else:
            together(0, 1)
        together(1, 0)
    for _ in range(after):
        alone("backward", 1)
        together(1, 0)
    split = False
    for i in range(position + 1):
        split |= i == (position + 1) // 2 and position % 2 == 1
        alone("backward_input" if split else "backward", 1)
        split |= i == (position + 1) // 2 and position % 2 == 0
        alone("backward_input" if split else "backward", 0)
    for _ in range(after):
        order.append((waiting.pop(0),))
        alone("backward_input", 0)
    order += [(made,) for made in waiting]
    return order


def simulate(
    orders: Sequence[Sequence[Slot]], seconds: Callable[[int, Slot], float], hop_seconds: float = 0.0
) -> list[Interval]:
    """Run every rank's slots in order, each as soon as what it needs has arrived; intervals of all ranks, by rank and time.

    `seconds(rank, slot)` is the duration of a slot; `hop_seconds` is the time from one stage to the next.
    Raises RuntimeError where the orders wait for each other for ever.
    """
    last = max(one.stage for order in orders for slot in order for one in slot)
    ends: dict[tuple[str, int, int], float] = {}
    places = [0] * len(orders)
    free_seconds = [0.0] * len(orders)
    intervals: list[list[Interval]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                slot = order[places[rank]]
                needs = [one.needs(last) for one in slot]
                if any(need is not None and need not in ends for need in needs):
                    break
                start = free_seconds[rank]
                for one, need in zip(slot, needs, strict=True):
                    if need is not None:
                        start = max(start, ends[need] + (0.0 if one.is_local(last) else hop_seconds))
                end = start + seconds(rank, slot)
                ends.update((one.makes, end) for one in slot)
                free_seconds[rank] = end
                intervals[rank].append(Interval(rank, slot, start, end))
                places[rank] += 1
                moved = True
    stuck = [rank for rank, order in enumerate(orders) if places[rank] < len(order)]
    if stuck:
        raise RuntimeError(f"pipeline ranks {stuck} wait for each other: {[orders[rank][places[rank]] for rank in stuck]}")
    return [interval for of_rank in intervals for interval in of_rank]
