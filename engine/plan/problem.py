"""`Problem`: one setting of a planned run that can't stay as it is, with the values nearest to it that could."""

from collections.abc import Callable, Mapping
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
    """Values that would do, everything else left alone; () where there is none or the reason names them. Of a lack of memory:
    flags to type, with what they give."""
    instead: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Other settings, each with its values that would do while this one stays."""
    planned: bool = False
    """`nearest` was planned, memory included; else it is only allowed: nobody asked whether it fits, or what comes next."""

    def __str__(self) -> str:
        nearest = " or ".join(map(self._shown, self.nearest))
        instead = [f"{flag_text(setting, values[0])}{''.join(f' or {value}' for value in values[1:])}"
                   for setting, values in self.instead if values]  # fmt: skip
        fits = ", or ".join(filter(None, [nearest, *instead]))
        allowed = f"; nearest {'that fits' if self.planned else 'allowed'}: {fits}" if fits else ""
        return f"{flag_text(self.setting, self.value)}: {self.reason}{allowed}"

    def _shown(self, value: Any) -> str:
        return flag_text(self.setting, value) if isinstance(value, bool | tuple) else value_text(value)


def nearest_fitting(value: int, most: int, fits: Callable[[int], bool]) -> tuple[int, ...]:
    """The next number below `value` and the next above it, between 1 and `most`, that fit; as many as there are."""
    below = next((number for number in range(min(value - 1, most), 0, -1) if fits(number)), None)
    above = next((number for number in range(max(value + 1, 1), most + 1) if fits(number)), None)
    return tuple(number for number in (below, above) if number is not None)


def nearest_multiples(value: int, unit: int) -> tuple[int, ...]:
    """The positive multiples of `unit` on both sides of `value`, which is none itself."""
    below = value // unit * unit
    return (below, below + unit) if below else (unit,)


def smallest_change(degrees: Mapping[str, tuple[int, tuple[int, ...]]]) -> str | None:
    """Of settings with (value, values that would do), the one that changes by the smallest factor; of equals the first, None
    where none would do."""
    factors = {
        setting: min(max(value / other, other / value) for other in nearest)
        for setting, (value, nearest) in degrees.items() if nearest
    }  # fmt: skip
    return min(factors, key=factors.__getitem__, default=None)
