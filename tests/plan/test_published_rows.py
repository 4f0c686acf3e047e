"""The committed comparison with published runs (benchmarks/results/planner.md) is what the planner says today, and no worse."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROUNDING = 1e-3


@pytest.fixture(scope="module")
def planner():
    """benchmarks/planner.py: scripts there import each other as plain modules."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import planner
    finally:
        sys.path.remove(str(BENCHMARKS))
    return planner


@pytest.fixture(scope="module")
def sections(planner):
    return planner.all_sections()


@pytest.fixture(scope="module")
def committed():
    return json.loads((BENCHMARKS / "results/planner.json").read_text())


def test_no_section_is_worse_than_committed(sections, committed):
    for name, section in sections.items():
        for key, error in section.summary.items():
            assert error <= committed[name]["summary"][key] + ROUNDING, f"{name}: {key} error {error:.2%}"


def test_the_committed_document_is_what_the_command_yields(planner, sections, committed):
    def without_versions(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith(("- python:", "- numpy:"))]

    text, _ = planner.document(sections, committed["search"])
    written = (BENCHMARKS / "results/planner.md").read_text()
    assert without_versions(text) == without_versions(written), "run: python benchmarks/planner.py --no-search"


def test_targets_are_met_where_they_were(planner, sections):
    summary = sections["training"].summary
    assert max(summary["median all"], summary["median held out"]) <= planner.MEDIAN_TARGET
    assert summary["worst all"] <= planner.WORST_TARGET
    for name in ("deepseek_v3_step", "flops"):
        assert not [figure.name for figure in sections[name].figures if figure.missed]
    assert sum(not figure.missed for figure in sections["rl"].figures) >= 6


def test_at_most_half_of_the_rows_are_fitted_and_kinds_are_spread(planner):
    fitted = [row for row in planner.ROWS if row.family in planner.FITTED_FAMILIES]
    assert len(planner.ROWS) >= 12 and len(fitted) <= len(planner.ROWS) / 2
    for rows in (fitted, [row for row in planner.ROWS if row not in fitted]):
        assert {row.run.shape.moe is None for row in rows} == {True, False}
        assert {row.run.training.precision == "bf16" for row in rows} == {True, False}
    assert {"h100", "h800"} <= {row.run.device for row in planner.ROWS}
    assert len(planner.FITTED) <= len(fitted) / 4


def test_names_are_unique_so_that_a_row_can_be_found(planner):
    names = [row.name for row in planner.ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("unit", ["tokens_per_second_per_gpu", "step_seconds", "tflops_per_gpu"])
def test_a_published_figure_becomes_step_seconds(planner, unit):
    """NVIDIA publishes tokens/s and TFLOPS of the same run: both must give the same seconds."""
    from planner_training_row import TrainingRow, planned

    run = planned("llama3-8b", 8, 8192, 128)
    published = {"tokens_per_second_per_gpu": 14451, "step_seconds": 128 * 8192 / 8 / 14451, "tflops_per_gpu": 744}[unit]
    row = TrainingRow("", "", run, published, unit, "")
    assert row.published_step_seconds == pytest.approx(9.07, rel=1e-3)
