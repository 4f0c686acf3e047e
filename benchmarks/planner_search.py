"""Searches for layouts of the target questions, beside the peers' published mappings of the same workloads.

python benchmarks/planner_search.py                      all targets (minutes)
python benchmarks/planner_search.py qwen3-30b-16         one of them
"""

import sys
from dataclasses import dataclass

from planner_peer_mappings import TARGETS, Target

from strop.engine.config import GIB
from strop.engine.plan.check import check
from strop.engine.plan.devices import device_named
from strop.engine.plan.memory import memory_per_rank, worst_stage
from strop.engine.plan.nearest import predict
from strop.engine.plan.run import PlannedRun
from strop.engine.plan.search import SearchResult, search
from strop.engine.plan.text import layout_text, settings_text


@dataclass(frozen=True)
class MappingRow:
    """A layout for a target: the search's best or a peer's."""

    who: str
    layout: str
    step_seconds: float | None
    """None: it doesn't work."""
    problem: str
    worst_bytes: float
    source: str


@dataclass(frozen=True)
class SearchRow:
    """A target, what the search proposes, and the peers' mappings."""

    target: Target
    result: SearchResult
    best: MappingRow
    peers: tuple[MappingRow, ...]

    @property
    def no_worse(self) -> bool:
        """The proposal is predicted at least as fast as every peer's mapping that works."""
        times = [peer.step_seconds for peer in self.peers if peer.step_seconds is not None]
        return self.best.step_seconds is not None and all(self.best.step_seconds <= seconds for seconds in times)


def search_target(target: Target) -> SearchRow:
    """Search the target's workload in its space."""
    work = target.workload
    result = search(
        work.shape, work.gpus, work.device, work.training, work.rollout, target.space,
        memory_bytes=device_named(work.device).hbm_bytes,  # no reserve: peers' mappings are held to nothing less
    )  # fmt: skip
    best = mapping_row("search", result.ranked[0][0], f"{result.seconds:.0f} s") if result.ranked else nothing(result)
    peers = tuple(mapping_row(mapping.peer, mapping.run, mapping.source) for mapping in target.mappings)
    return SearchRow(target, result, best, peers)


def mapping_row(who: str, run: PlannedRun, source: str) -> MappingRow:
    """A layout's prediction, or why it doesn't work."""
    problems = check(run)
    seconds = None if problems else predict(run).step_seconds
    worst_bytes = worst_stage(memory_per_rank(run)).total_bytes
    layout = f"{layout_text(run)}; {settings_text(run)}"
    return MappingRow(who, layout, seconds, "; ".join(map(str, problems)), worst_bytes, source)


def nothing(result: SearchResult) -> MappingRow:
    return MappingRow("search", "none fits", None, str(result.reasons()[:1]), result.smallest_need_bytes, "")


def search_rows(names: list[str] | None = None) -> list[SearchRow]:
    """A row for each target of these names; for all by default."""
    return [search_target(TARGETS[name]()) for name in names or TARGETS]


def mapping_lines(row: SearchRow) -> list[str]:
    """The proposal's and the peers' lines of the table; of the proposal's last column, the search's seconds vary."""
    lines = []
    for one in (row.best, *row.peers):
        first = row.target.name if one is row.best else ""
        time = f"{one.step_seconds:.4g} s" if one.step_seconds is not None else "impossible"
        lines.append(f"| {first} | {one.who} | {one.layout} | {time} | {one.worst_bytes / GIB:.1f} GiB | {one.source} |")
    return lines


def search_table(names: list[str] | None = None) -> str:
    """The section of benchmarks/results/planner.md, in Markdown."""
    lines = [
        "## Search against the peers' mappings",
        "",
        "Each target is one workload; a peer's mapping is its layout on that workload (benchmarks/planner_peer_mappings.py).",
        "",
        "| target | layout of | layout | predicted step | fullest rank | source |",
        "|---|---|---|---:|---:|---|",
    ]
    rows = search_rows(names)
    lines += [line for row in rows for line in mapping_lines(row)]
    lines += [
        "",
        "| target | search | predicted | layouts rejected | outpaced | no slower than every peer |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        counts = f"{row.result.evaluated_count:,} | {len(row.result.rejected):,} | {row.result.outpaced_count:,}"
        lines.append(f"| {row.target.name} | {row.result.seconds:.1f} s | {counts} | {'yes' if row.no_worse else 'NO'} |")
    impossible = [(row.target.name, peer) for row in rows for peer in row.peers if peer.problem]
    lines += ["", "Why mappings are impossible as they are:", ""] if impossible else []
    lines += [f"- {name}, {peer.who} ({peer.layout}): {peer.problem}" for name, peer in impossible]
    lines += ["", "Assumed:", "", *(f"- {row.target.name}: {row.target.assumed}" for row in rows if row.target.assumed)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(search_table(sys.argv[1:]))
