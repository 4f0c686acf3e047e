"""Searches find layouts that are predicted no slower than what peers publish for the same workload."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = ("qwen3-30b-16",)
LARGE = (
    "qwen3-30b-grpo-8", "qwen3-30b-8", "qwen3-235b-256", "qwen3-235b-grpo-256", "deepseek-v3-grpo-256", "deepseek-v3-grpo-512",
    "deepseek-v3-grpo-512-split", "deepseek-v3-grpo-2048",
)  # fmt: skip


@pytest.fixture
def searches(monkeypatch):
    """benchmarks/planner_search.py: scripts there import each other as plain modules."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import planner_search

    return planner_search


def proposal_is_no_slower(searches, name: str) -> None:
    """And the committed table says what is predicted today."""
    (row,) = searches.search_rows([name])
    committed = (BENCHMARKS / "results/planner.md").read_text()
    for line in searches.mapping_lines(row):
        assert line.removesuffix(" |").rpartition(" | ")[0] in committed, "run: python benchmarks/planner.py"
    working = [peer for peer in row.peers if not peer.problem]
    assert row.result.ranked and working, "nothing to compare"
    assert row.no_worse, [(one.who, one.layout, one.step_seconds) for one in (row.best, *working)]


def test_every_target_is_tried(searches):
    assert set(searches.TARGETS) == {*QUICK, *LARGE}


@pytest.mark.parametrize("name", QUICK)
def test_proposal_is_no_slower_than_peers(searches, name):
    proposal_is_no_slower(searches, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_proposal_is_no_slower_than_peers_on_many_gpus(searches, name):
    proposal_is_no_slower(searches, name)


def test_default_adam_states_on_8_gpus_are_impossible(searches):
    target = searches.TARGETS["qwen3-30b-grpo-8"]()
    (default,) = [mapping for mapping in target.mappings if mapping.peer == "Megatron's defaults"]
    row = searches.mapping_row(default.peer, default.run, default.source)
    assert row.step_seconds is None
    assert "optimizer" in row.problem and "of 79.2 GiB" in row.problem
