"""A plan in 80 columns, as in every pipe: nothing of a number or a heading is missing."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from strop.engine.config import Layout
from strop.engine.plan.memory import PARTS
from strop.engine.plan.models import SHAPES
from strop.engine.plan.report import MemoryPrediction
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.text import gib_text
from strop.launch.plan_table import COLUMN_NAMES, active_text, rate_text, show


def printed(prediction: MemoryPrediction) -> list[str]:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    show(prediction, [], console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("model", "layout", "plan", "training"),
    [
        ("qwen3-32b", Layout(pp=2), RolloutPlan(), TrainingPlan()),
        ("qwen3-32b", Layout(pp=2, schedule="dualpipe"), RolloutPlan(prompts_per_step=256), TrainingPlan()),
        ("llama3.1-405b", Layout(pp=2), RolloutPlan(tp=8), TrainingPlan(micro_batch_sequences=8)),  # 1,234.5 GiB: wider still
    ],
)  # fmt: skip
def test_memory_keeps_all_digits(model: str, layout: Layout, plan: RolloutPlan, training: TrainingPlan) -> None:
    run = PlannedRun.of(SHAPES[model], 16, layout=layout, rollout=plan, training=training)
    prediction = MemoryPrediction.of(run)
    lines = printed(prediction)
    for phase, title in (("training", "training"), ("rollout", "generating")):
        rows = [row for row in prediction.memory_rows() if row.phase == phase]
        parts = [part for part in PARTS if any(row.parts_bytes.get(part) for row in rows)]
        heading = " ".join([title, *(COLUMN_NAMES.get(part, part) for part in parts), "total"])
        [start] = [at for at, line in enumerate(lines) if line.split() == heading.split()]
        for row, line in zip(rows, lines[start + 2 :], strict=False):
            sizes = [*(row.parts_bytes[part] for part in parts), row.total_bytes]
            assert line.split() == f"stage {row.label} {' '.join(map(gib_text, sizes))}".split()


def test_notes_of_a_model_and_what_is_active() -> None:
    """gpt-oss-20b (arXiv 2508.10925, table 1: 3.61B active, which leaves the embedding out): its 201,088 x 2,880 are 0.58B."""
    shape = replace(SHAPES["gpt-oss-20b"], notes=("The checkpoint is quantized.",))
    lines = printed(MemoryPrediction.of(PlannedRun.of(shape, 8, layout=Layout(ep=8))))
    assert "note: The checkpoint is quantized." in lines
    assert active_text(shape) == "; active in a token 4.19B, without input embedding 3.61B"
    assert active_text(replace(shape, tie_embeddings=True)) == "; active in a token 3.61B"
    assert not active_text(SHAPES["llama3-8b"])


def test_rates_have_two_digits() -> None:
    assert [rate_text(rate) for rate in (53350.6, 10.4, 9.96, 2.04, 0.5)] == ["53,351", "10", "10", "2.0", "0.50"]
