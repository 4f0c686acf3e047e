"""`Problem`: one setting of a planned run that can't stay as it is, with the values nearest to it that could."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .text import flag_text, value_text


@dataclass(frozen=True)
class Problem:
    """One setting that makes a run impossible, contradicts another or has no effect."""

    setting: str
    """Its path in PlannedRun, such as layout.tp."""
    value: Any
    reason: str
    nearest: tuple[Any, ...] = ()
    """Values that would do, everything else left alone; () where there is none or the reason names them."""

    def __str__(self) -> str:
        shown = [flag_text(self.setting, fit) if isinstance(fit, bool | tuple) else value_text(fit) for fit in self.nearest]
        fits = f"; nearest that fits: {' or '.join(shown)}" if shown else ""
        return f"{flag_text(self.setting, self.value)}: {self.reason}{fits}"


def nearest_fitting(value: int, most: int, fits: Callable[[int], bool]) -> tuple[int, ...]:
    """The next number below `value` and the next above it, between 1 and `most`, that fit; as many as there are."""
    below = next((number for number in range(min(value - 1, most), 0, -1) if fits(number)), None)
    above = next((number for number in range(max(value + 1, 1), most + 1) if fits(number)), None)
    return tuple(number for number in (below, above) if number is not None)


def nearest_multiples(value: int, unit: int) -> tuple[int, ...]:
    """The positive multiples of `unit` on both sides of `value`, which is none itself."""
    below = value // unit * unit
    return (below, below + unit) if below else (unit,)
