"""The measuring instruments of benchmarks/: known memory is found, wrong results are caught, a failure costs its own line."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

MIB = 2**20
KNOWN = """
import time
import torch
from comparison import OURS, Comparison, Target, times_faster_than
from timing import Candidate

def make():
    x = torch.ones(2**20)
    ready = torch.zeros(2**20)

    def with_scratch(mib, seconds):
        def run():
            y = x * 2
            torch.full((mib * 2**18,), 1.0)
            time.sleep(seconds)
            return {"y": y}
        return Candidate(run)

    return {
        OURS: with_scratch(32, 0.001), "slow": with_scratch(96, 0.3), "wrong": Candidate(lambda: {"y": x * 2.1}),
        "in place": Candidate(lambda: {"y": torch.mul(x, 2, out=ready)}), "absent": "not installed: no such thing",
    }

def broken():
    raise RuntimeError("no such luck")

def comparisons(device, quick):
    targets = (times_faster_than("slow", 2), times_faster_than("slow", 1e6), times_faster_than("absent", 2))
    return [Comparison("known", "1 M", make, bytes=8 * 2**20, targets=targets), Comparison("broken", "1 M", broken)]
"""


@pytest.fixture
def instruments(monkeypatch, tmp_path):
    """The module `comparison`, and one named `known` with the benchmark above."""
    (tmp_path / "known.py").write_text(KNOWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module("comparison"), importlib.import_module("known")
    for name in set(sys.modules) - before:
        if "/benchmarks/" in str(getattr(sys.modules[name], "__file__", "")) or name == "known":
            del sys.modules[name]


def test_a_table_of_known_numbers(instruments, monkeypatch, capsys):
    comparison, known = instruments
    monkeypatch.setattr(comparison, "SECONDS", {True: 0.1})
    rates = comparison.Rates(flops=1e12, bytes=2**33)
    device = torch.device("cpu")
    lines, (measured, broken), failures = comparison.run("known", known.comparisons(device, True), device, True, rates)
    results = measured["results"]
    assert results.keys() == {"strop", "slow", "in place"}
    assert 1 <= results["strop"]["median"] < results["slow"]["median"] and results["slow"]["median"] >= 300
    for name, mib in (("strop", 32), ("slow", 96), ("in place", 0)):
        assert mib * 0.95 * MIB <= results[name]["extra_bytes"] <= (mib + 3) * MIB, name
    assert results["slow"]["box_fraction"] == pytest.approx(1e3 / 1024 / results["slow"]["median"])
    assert measured["absent"]["absent"] == "not installed: no such thing"
    assert measured["absent"]["wrong"].startswith("fails: wrong: y is 5.00e-02 from ours, allowed 0.0001")
    met, missed, unknown = measured["targets"]
    assert met.startswith("at least 2 x faster than slow: ") and met.endswith(", met") and missed.endswith(", **missed**")
    assert "was not measured" in unknown
    assert failures == 1 and "no such luck" in broken["absent"]["strop"] and "Traceback" in capsys.readouterr().err
    table = comparison.markdown(lines)
    assert table.count("\n") == 1 + 6 and all(line.count("|") == 9 for line in table.splitlines())


def test_every_benchmark_knows_its_shapes_for_both_devices(instruments):
    """Nothing is allocated before a comparison's turn comes."""
    operations = importlib.import_module("kernel_library").OPS
    for op in operations:
        for device in ("cpu", "cuda"):
            found = importlib.import_module(op).comparisons(torch.device(device), True)
            assert found and all(one.operations or one.bytes for one in found)
            assert device == "cpu" or any(one.targets for one in found), f"{op}: no target of its own on a GPU"
