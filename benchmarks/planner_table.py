"""A published figure beside the planner's, and a section of such figures as Markdown and JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Compared:
    """A published figure and the planner's, both in the unit that the section states."""

    name: str
    published: float
    predicted: float
    target: float | None = None
    """Largest |error| that counts as met; None: reported without a target."""
    stated: str = ""
    """The published figure in its own unit, where that is another."""
    kind: str = ""
    """fitted or held out, where constants were fitted on some of the section's figures."""
    source: str = ""
    note: str = ""

    @property
    def error(self) -> float:
        """Relative; above 0 the planner says more (slower, larger) than was published."""
        return self.predicted / self.published - 1

    @property
    def missed(self) -> bool:
        return self.target is not None and abs(self.error) > self.target


@dataclass(frozen=True)
class Section:
    """What `planner.md` shows under one heading."""

    title: str
    text: str
    unit: str
    figures: Sequence[Compared]
    remarks: Sequence[str] = field(default_factory=tuple)
    """Bullets below the table."""

    @property
    def summary(self) -> dict[str, float]:
        """Median and worst |error| of all figures, and of each kind where there are kinds."""
        groups = {"all": self.figures, **{kind: [f for f in self.figures if f.kind == kind] for kind in self.kinds}}
        return {
            f"{what} {which}": value
            for which, figures in groups.items()
            for what, value in (
                ("median", median(abs(figure.error) for figure in figures)),
                ("worst", max(abs(figure.error) for figure in figures)),
            )
        }

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(figure.kind for figure in self.figures if figure.kind))

    def markdown(self) -> str:
        columns = ["", f"published, {self.unit}", f"planner, {self.unit}", "error"]
        optional = [
            name for name in ("stated", "kind", "source", "note") if any(getattr(figure, name) for figure in self.figures)
        ]
        lines = [f"| {' | '.join(columns + optional)} |", f"|---|---:|---:|---:|{'---|' * len(optional)}"]
        for figure in self.figures:
            error = f"{figure.error:+.1%}" + (" **missed**" if figure.missed else "")
            cells = [figure.name, _number(figure.published), _number(figure.predicted), error]
            lines.append(f"| {' | '.join(cells + [getattr(figure, name) for name in optional])} |")
        remarks = [f"- {remark}" for remark in self.remarks]
        return "\n".join([f"## {self.title}", "", self.text, "", *lines, *([""] if remarks else []), *remarks])

    def entries(self) -> dict[str, Any]:
        """For planner.json."""
        figures = [
            {
                "name": figure.name,
                f"published ({self.unit})": figure.published,
                f"planner ({self.unit})": figure.predicted,
                "error": figure.error,
                "target": figure.target,
                "stated": figure.stated,
                "kind": figure.kind,
                "source": figure.source,
                "note": figure.note,
            }
            for figure in self.figures
        ]
        return {"summary": self.summary, "figures": figures, "remarks": list(self.remarks)}


def _number(value: float) -> str:
    """Four significant digits, without an exponent."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
