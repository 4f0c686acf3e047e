"""A benchmark of one op: the same inputs for every implementation, checked against ours, timed in turn, one table out."""

import argparse
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from harness import RESULTS, write_results
from memory import ChildProcesses, extra_on_cuda
from rates import Rates
from timing import Candidate, Outputs, Times, interleaved
from torch import Tensor

from strop.kernels import native

OURS = "strop"
SECONDS = {False: 6.0, True: 1.5}
"""For the timed rounds of a comparison, by --quick."""
HEADER = ("op", "shape", "implementation", "ms (20 to 80 %)", "rate", "of the box", "extra memory", "target")


class Result(NamedTuple):
    times: Times
    extra_bytes: int
    box_fraction: float
    """Rate over the machine's own: of matrix products where the work is operations, of copies where it is bytes."""


class Target(NamedTuple):
    """A bound on a number made of the results of all implementations."""

    what: str
    limit: float
    kind: Literal["at most", "at least"]
    value: Callable[[Mapping[str, Result]], float]

    def verdict(self, results: Mapping[str, Result]) -> str:
        try:
            value = self.value(results)
        except KeyError as missing:
            return f"{self.kind} {self.limit:g} {self.what}: {missing} was not measured"
        met = value <= self.limit if self.kind == "at most" else value >= self.limit
        return f"{self.kind} {self.limit:g} {self.what}: {value:.3g}, {'met' if met else '**missed**'}"


def milliseconds_at_most(limit: float, name: str = OURS) -> Target:
    return Target("ms" if name == OURS else f"ms ({name})", limit, "at most", lambda results: results[name].times.median)


def box_at_least(limit: float) -> Target:
    return Target("of the box's rate", limit, "at least", lambda results: results[OURS].box_fraction)


def times_faster_than(other: str, limit: float) -> Target:
    return Target(
        f"x faster than {other}", limit, "at least", lambda r: r[other].times.median / r[OURS].times.median
    )


@dataclass(frozen=True)
class Comparison:
    """One line of work, done by several implementations."""

    op: str
    """And what of it: "linear_logprob, forward"."""
    shape: str
    make: Callable[[], dict[str, Candidate | str]]
    """Implementation -> candidate, or the reason why it isn't measured. The first is OURS; outputs of equal name are equal."""
    operations: float = 0.0
    """Floating-point operations that the definition asks for (not those an implementation does)."""
    bytes: float = 0.0
    """Bytes that must move: inputs read once, results written once. Counted where operations is 0."""
    tolerance: float = 1e-4
    """Largest ||theirs - ours|| / ||ours|| of each output."""
    targets: tuple[Target, ...] = ()

    def rate(self, milliseconds: float) -> str:
        if self.operations:
            return f"{self.operations / milliseconds * 1e-9:.3g} TFLOP/s"
        return f"{self.bytes / milliseconds * 1e-6:.3g} GB/s" if self.bytes else ""

    def box_fraction(self, milliseconds: float, rates: Rates) -> float:
        return max(self.operations / rates.flops, self.bytes / rates.bytes) / milliseconds * 1e3


def compiled(run: Callable[..., Any], quick: bool) -> Callable[..., Any] | str:
    """torch.compile of a function, or why it is left out."""
    return "left out by --quick: compiling takes longer than measuring" if quick else torch.compile(run, dynamic=False)


def bind(call: Callable[..., Outputs], implementation: Callable[..., Any] | str) -> Candidate | str:
    """call(implementation), or the reason that stands in the implementation's place."""
    return implementation if isinstance(implementation, str) else Candidate(lambda: call(implementation))


def check(name: str, ours: Outputs, theirs: Outputs, tolerance: float) -> None:
    """AssertionError naming the first output that differs. Outputs of other names are not comparable (another loss)."""
    for key in ours.keys() & theirs.keys():
        expected, got = ours[key].double(), theirs[key].double()
        off = torch.where(got == expected, 0.0, got - expected)  # equal infinities are equal
        difference = float(off.norm() / expected[expected.isfinite()].norm().clamp(min=1e-30))
        assert difference <= tolerance, f"{name}: {key} is {difference:.2e} from ours, allowed {tolerance:g}"


def measure(comparison: Comparison, index: int, device: torch.device, quick: bool, rates: Rates, memory: ChildProcesses | None):
    """({implementation: Result}, {implementation: why there is none})."""
    offered = comparison.make()
    absent = {name: reason for name, reason in offered.items() if isinstance(reason, str)}
    candidates = {name: candidate for name, candidate in offered.items() if name not in absent}
    expected = {key: value.clone() for key, value in candidates[OURS]().items()}
    for name, candidate in list(candidates.items()):
        try:
            check(name, expected, candidate(), comparison.tolerance)
        except Exception as error:
            if name == OURS:
                raise
            absent[name] = f"fails: {' '.join(str(error).split())[:160]}"
            del candidates[name]
    del expected
    times = interleaved(candidates, device, SECONDS[quick])
    extras = {
        name: extra_on_cuda(candidate, device) if memory is None else memory.extra(index, name)
        for name, candidate in candidates.items()
    }
    return {
        name: Result(times[name], extras[name], comparison.box_fraction(times[name].median, rates)) for name in candidates
    }, absent


def rows(comparison: Comparison, results: Mapping[str, Result], absent: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The lines of the table, our own first."""
    lines = []
    for name, (times, extra, fraction) in results.items():
        verdicts = "; ".join(target.verdict(results) for target in comparison.targets) if name == OURS else ""
        spread = f"{times.median:.4g} ({times.low:.4g} to {times.high:.4g})"
        share = f"{fraction:.0%}" if fraction else ""
        lines.append((comparison.op, comparison.shape, name, spread, comparison.rate(times.median), share,
                      f"{extra / 1e6:.4g} MB", verdicts))  # fmt: skip
    return lines + [(comparison.op, comparison.shape, name, reason, "", "", "", "") for name, reason in absent.items()]


def markdown(lines: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (HEADER, ("---",) * len(HEADER), *lines))


def run(module: str, comparisons: Sequence[Comparison], device: torch.device, quick: bool, rates: Rates):
    """(lines of the table, data for the JSON file, number of comparisons that failed); a failure costs its own lines only."""
    memory = ChildProcesses(module, quick) if device.type == "cpu" else None
    lines, data, failures = [], [], 0
    for index, comparison in enumerate(comparisons):
        entry: dict[str, Any] = {"op": comparison.op, "shape": comparison.shape}
        try:
            results, absent = measure(comparison, index, device, quick, rates, memory)
        except Exception as error:
            traceback.print_exc()
            failures += 1
            results, absent = {}, {OURS: f"**failed**: {' '.join(str(error).split())[:160]}"}
        own = rows(comparison, results, absent)
        print("\n".join(f"| {' | '.join(line)} |" for line in own), flush=True)
        lines += own
        entry["results"] = {
            name: {**result.times._asdict(), "extra_bytes": result.extra_bytes, "box_fraction": result.box_fraction}
            for name, result in results.items()
        }
        entry |= {"absent": absent, "targets": [target.verdict(results) for target in comparison.targets if results]}
        data.append(entry)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return lines, data, failures


def command_line(description: str) -> tuple[torch.device, bool, Path]:
    """(device, quick, folder for the results)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table (Markdown) and the numbers (JSON)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if native.choice() == "auto" and native.library(device.type) is None:  # dispatch would quietly measure something else
        raise SystemExit(f"{native.why_missing(device.type)}; STROP_KERNELS=reference (or triton) measures without it")
    return device, arguments.quick, arguments.out


def main(file: str, description: str, comparisons: Callable[[torch.device, bool], list[Comparison]]) -> None:
    """What each benchmark file does when it is started: measure, print the table, write it."""
    device, quick, folder = command_line(description)
    module = Path(file).stem
    rates = Rates.measure(device)
    print(f"{rates}\n{markdown(())}", flush=True)
    lines, data, failures = run(module, comparisons(device, quick), device, quick, rates)
    report(module, f"strop.kernels: {module}", lines, {module: data}, rates, folder)
    raise SystemExit(1 if failures else 0)


def report(
    name: str, title: str, lines: Sequence[tuple[str, ...]], data: Mapping[str, Any], rates: Rates, folder: Path
) -> None:
    """Write the table and the numbers of one run."""
    table = f"{markdown(lines)}\n\nThe box: {rates}. Threads: {torch.get_num_threads()}."
    numbers = {"rates": rates._asdict(), "threads": torch.get_num_threads(), "comparisons": json.loads(json.dumps(data))}
    print(f"written to {write_results(name, title, table, numbers, folder)}")


def gradients(outputs: Sequence[Tensor], inputs: Mapping[str, Tensor], upstream: Sequence[Tensor]) -> Outputs:
    """{"d_<name>": gradient} of the inputs, for given upstream gradients."""
    values = torch.autograd.grad(outputs, list(inputs.values()), upstream)
    return {f"d_{name}": value for name, value in zip(inputs, values, strict=True)}
