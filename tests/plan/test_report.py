"""A prediction as data: everything is there, parts add up, every number says its unit, and it can be drawn."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from strop.engine.config import InputError, Layout
from strop.engine.plan.drawing import draw_prediction, pipeline_intervals, text_color, title_text
from strop.engine.plan.models import SHAPES
from strop.engine.plan.report import Prediction
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.text import flag_text, layout_text, seconds_text, settings_text

UNITS = (
    "bytes", "seconds", "parameters", "flops_per_token", "bytes_per_token", "flops_per_second", "bytes_per_second", "tokens",
    "tokens_per_second_per_gpu", "flops_per_gpu_per_second", "bytes_per_rank", "bytes_per_gpu", "sequences_per_engine",
    "sequences", "layers", "watts", "gpu_hours", "kwh", "count", "steps", "gpus", "index", "ranks", "groups", "multiprocessors",
    "fraction", "utilization", "per_node", "size", "epochs",
)  # fmt: skip
"""How the name of a number ends. What is counted is a unit too."""
DEGREES = {"tp", "cp", "pp", "vpp", "ep", "etp", "dp"}
RATIOS = {"expert_imbalance", "response_spread", "waves"}
"""Pure numbers whose docstring says of what."""
STEP_COUNTS = {"prompts_per_step", "steps_ahead"}

RUNS = {
    "dense": PlannedRun.of(SHAPES["llama3-70b"], 64, layout=Layout(tp=4, sp=True, pp=4)),
    "moe": PlannedRun.of(
        SHAPES["deepseek-v3"], 1024, device="h800", layout=Layout(pp=16, ep=64, schedule="dualpipe"),
        training=TrainingPlan(global_batch_sequences=4096, precision="fp8-blockwise", moment_dtype_bytes=2),
    ),
    "grpo": PlannedRun.of(
        SHAPES["qwen3-8b"], 16, layout=Layout(tp=2), steps=100, rollout=RolloutPlan(tp=2),
        training=TrainingPlan(sequence_length_tokens=8192),
    ),
    "split": PlannedRun.of(
        SHAPES["qwen3-30b-a3b"], 32, layout=Layout(ep=8), placement="split", steps=100,
        rollout=RolloutPlan(tp=2, gpus=16, steps_ahead=1), training=TrainingPlan(sequence_length_tokens=8192),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def predictions() -> dict[str, Prediction]:
    return {name: Prediction.of(run) for name, run in RUNS.items()}


def numbers(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """(keys from the top, value) of every number in a JSON value."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from numbers(value, (*path, key))
    elif isinstance(content, list):
        for value in content:
            yield from numbers(value, path)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield path, content


@pytest.mark.parametrize("name", RUNS)
def test_every_number_says_its_unit(predictions, name: str) -> None:
    """In its own key, or in that of the table it is an entry of (parts_bytes, parameters_by_kind, curve...)."""
    content = json.loads(json.dumps(predictions[name].as_dict(), allow_nan=False))
    unnamed = set()
    for path, value in numbers(content):
        assert math.isfinite(value)
        own, above = path[-1], path[-2] if len(path) > 1 else ""
        named = own.endswith(UNITS) or own in DEGREES | RATIOS | STEP_COUNTS
        if not named and not above.endswith(UNITS) and "_by_" not in above:
            unnamed.add("/".join(path))
    assert not unnamed


@pytest.mark.parametrize("name", RUNS)
def test_totals_are_the_sums_of_their_parts(predictions, name: str) -> None:
    content = predictions[name].as_dict()
    model, memory = content["model"], content["memory_per_rank"]
    assert sum(model["parameters_by_kind"].values()) - model["parameters_by_kind"]["mtp"] == model["total_parameters"]
    for stage in memory["stages"]:
        assert stage["total_bytes"] == pytest.approx(sum(stage["parts_bytes"].values()), rel=1e-12)
    worst = max(stage["total_bytes"] for stage in memory["stages"])
    assert memory["headroom_bytes"] == content["device"]["hbm_bytes"] - worst
    for step in filter(None, (content["training_step"], content["grpo_step"])):
        assert step["step_seconds"] == pytest.approx(sum(step["parts_seconds"].values()), rel=1e-12)
    step_seconds = (content["grpo_step"] or content["training_step"])["step_seconds"]
    whole = content["whole_run"]
    assert whole["gpu_hours"] == pytest.approx(whole["steps"] * step_seconds * content["gpus"] / 3600, rel=1e-12)


def test_memory_is_that_of_all_phases(predictions, tmp_path) -> None:
    assert {one.phase for one in predictions["grpo"].memory} == {"training", "rollout"}
    assert {one.phase for one in predictions["split"].memory} == {"training"}, "other GPUs generate"
    run = replace(RUNS["grpo"], rollout=replace(RUNS["grpo"].rollout, offload_training=True))
    offloading = Prediction.of(run)
    assert [worst.phase for worst in offloading.worst_of_phases()] == ["training", "weight_sync", "rollout"]
    draw_prediction(offloading, tmp_path / "plan.png")


def test_the_drawn_passes_take_the_predicted_time(predictions) -> None:
    for name in ("dense", "moe"):
        prediction = predictions[name]
        step, intervals = prediction.training, pipeline_intervals(prediction.run)
        after = step.parts_seconds["exposed_data"] + step.parts_seconds["optimizer"]
        assert max(one.end_seconds for one in intervals) == pytest.approx(step.step_seconds - after, rel=1e-3)
        ends = dict.fromkeys(range(prediction.run.layout.pp), 0.0)
        for one in sorted(intervals, key=lambda one: one.start_seconds):
            assert one.start_seconds >= ends[one.rank] - 1e-9, "a rank does one thing at a time"
            ends[one.rank] = one.end_seconds


def test_alike_stages_are_shown_together(predictions) -> None:
    labels = [row.label for row in predictions["moe"].memory_rows()]
    assert labels[0] == "0" and any("-" in label for label in labels)
    covered = [n for label in labels for n in range(int(label.split("-")[0]), int(label.split("-")[-1]) + 1)]
    assert covered == list(range(16))
    assert sum(row.is_worst for row in predictions["moe"].memory_rows()) == 1


def test_stages_that_differ_in_nothing_that_is_shown_are_one_row(predictions) -> None:
    """A byte, or what lies on the host, makes no second row of the same numbers."""
    one, other = predictions["dense"].memory[1:3]
    parts = one.parts_bytes | {"activations": one.parts_bytes["activations"] + 1}
    memory = (one, replace(other, parts_bytes=parts, host_parts_bytes={"optimizer": 1.0}))
    [row] = replace(predictions["dense"], memory=memory).memory_rows()
    assert row.label == "1-2" and row.is_worst


def test_gpus_that_only_generate_have_a_row(predictions) -> None:
    prediction = predictions["split"]
    *_, row = prediction.memory_rows()
    margin_bytes = row.parts_bytes["margin"]
    assert row.label == "engines" and row.total_bytes - margin_bytes == pytest.approx(0.8 * prediction.device.hbm_bytes)
    assert margin_bytes == prediction.as_dict()["generating_gpu"]["margin_bytes"] > 3e9


def test_what_fits_is_asked_of_the_budget(predictions) -> None:
    """Not of the device's memory, which a budget can't exceed."""
    run, worst_bytes = RUNS["dense"], predictions["dense"].worst.total_bytes
    small, large = Prediction.of(run, worst_bytes - 1), Prediction.of(run, 1e15)
    assert small.headroom_bytes == -1 and "too much" in title_text(small)
    assert large.memory_budget_bytes == large.device.hbm_bytes
    assert small.as_dict()["memory_per_rank"]["memory_budget_bytes"] == worst_bytes - 1


def test_every_phase_has_its_fullest_rank(predictions) -> None:
    worst = {one.phase: one.total_bytes for one in predictions["grpo"].worst_of_phases()}
    for phase, total_bytes in worst.items():
        assert total_bytes == max(one.total_bytes for one in predictions["grpo"].memory if one.phase == phase)
    assert set(worst) == {"training", "rollout"}


def test_decoding_steps_say_which_is_which(predictions) -> None:
    found = predictions["grpo"].as_dict()["grpo_step"]["rollout"]["decoding_step_seconds"]
    assert found["with_most_sequences"] > found["with_one_sequence"] > 0


def test_groups_of_each_axis(predictions) -> None:
    spans = {span.axis: span for span in predictions["dense"].spans()}
    assert {axis: (span.ranks, span.groups) for axis, span in spans.items()} == {"tp": (4, 16), "pp": (4, 16), "dp": (4, 16)}
    assert not spans["tp"].spans_nodes, "four consecutive ranks of a node of eight"
    assert spans["pp"].spans_nodes and spans["dp"].spans_nodes
    moe = {span.axis: span for span in predictions["moe"].spans()}
    assert (moe["ep"].ranks, moe["ep"].groups, moe["ep"].ranks_per_node) == (64, 16, 8)
    assert layout_text(RUNS["moe"]) == "pp 16 dualpipe · dp 64 · ep 64"
    assert layout_text(PlannedRun.of(SHAPES["qwen3-0.6b"], 1)) == "one rank"


@pytest.mark.parametrize(
    "setting, value, flag",
    [("layout.sp", True, "--layout.sp"), ("layout.sp", False, "--layout.no-sp"), ("gpus", 8, "--gpus 8"),
     ("training.recompute", ("norms", "activation"), "--training.recompute norms activation"),
     ("training.recompute", (), "--training.recompute"), ("stage_layers", (2, 3), "--stage-layers 2 3"),
     ("grpo", False, "--no-grpo")],
)  # fmt: skip
def test_flags_as_they_are_typed(setting: str, value: Any, flag: str) -> None:
    assert flag_text(setting, value) == flag


def test_settings_that_layouts_differ_in() -> None:
    """What a ranked row must say so that no two of them read alike."""
    training = TrainingPlan(
        gradient_dtype_bytes=2, moment_dtype_bytes=2, offload_optimizer=True, fsdp=True, recompute=("layer",),
        recompute_layers=2,
    )  # fmt: skip
    run = PlannedRun(
        SHAPES["qwen3-8b"], 16, stage_layers=(18, 18), training=training, rollout=RolloutPlan(tp=2, offload_training=True)
    )
    for words in (
        "micro-batch 1", "recompute layer in 2 layers a rank", "stages of 18 18 layers", "FSDP", "gradients of 2 bytes",
        "moments of 2 bytes", "optimizer on the host", "trainer on the host while generating",
        "engines of tp 2 with 0.8 of the memory, colocated",
    ):  # fmt: skip
        assert words in settings_text(run)
    assert "on 16 of 32 GPUs, 16 train" in settings_text(RUNS["split"])


def test_numbers_on_bars_can_be_read() -> None:
    assert text_color("#9db8dd") != text_color("#1f5fa8")


@pytest.mark.parametrize("name", ["dense", "grpo", "split"])
def test_drawing(predictions, name: str, tmp_path) -> None:
    file = tmp_path / "plan.png"
    draw_prediction(predictions[name], file)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000


def test_a_picture_that_cannot_be_written(predictions, tmp_path) -> None:
    with pytest.raises(InputError, match="can't be written"):
        draw_prediction(predictions["split"], tmp_path / "absent" / "plan.png")


@pytest.mark.parametrize(
    "seconds, text",
    [(12345.6, "12,346 s"), (999.6, "1e+03 s"), (21.34, "21.3 s"), (0.9996, "1 s"), (0.0213, "21.3 ms"), (3.2e-5, "32 us")],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_the_planner_needs_neither_torch_nor_a_terminal_library() -> None:
    """What a plan imports is what its start costs: 0.1 s instead of seconds."""
    source = "import sys, strop.engine.plan.report, strop.engine.plan.drawing, strop.engine.plan.search; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "transformers", "matplotlib", "scipy", "pandas"} & set(loaded)
