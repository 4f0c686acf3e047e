"""Metrics, samples, TensorBoard, plots, progress: exact, cut back on resume, readable."""

import json
import math
import mmap
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from strop.engine.batch import Group, Prompt, Sample, Score, Span
from strop.engine.config import InputError
from strop.engine.run import metrics as names
from strop.engine.run.metrics import JsonLines, MetricsLog, SampleLog, read_metrics
from strop.engine.run.plots import PANELS, draw_plots, smoothed
from strop.engine.run.progress import RunProgress, Summary
from strop.engine.run.telemetry import Telemetry
from strop.engine.run.watchdog import Watchdog


def values_of(step: int) -> dict[str, float]:
    return {"reward/mean": step / 3, "train/kl": 1e-300 * step, "train/tokens": step, "eval/accuracy": torch.tensor(0.1).item()}


def group_of(step: int, advantages: bool = True) -> Group:
    span = Span(torch.tensor([5, 6, step]), True, step, torch.zeros(3), torch.zeros(3), 1.0)
    samples = tuple(Sample(2 * step + i, (span,), "stop", f"é\u2028 {step} \"{i}\"\n") for i in range(2))
    scores = (Score(1.0, {"exact": 1.0, "format": 0.0}, "equal"), Score(0.0))
    prompt = Prompt("p1", "chain_sum", messages=({"role": "user", "content": "1 + 1 = ?"},), answer="2")
    return Group(prompt, torch.tensor([1, 2]), samples, scores, (0.5, -0.5) if advantages else ())


def write_run(folder, steps, resume_from=None, rank=0):
    """A run of the given steps; returns the positions after each."""
    at = resume_from or {"metrics": 0, "samples": 0, "step": 0}
    log = MetricsLog(folder / "m.jsonl", folder / "tb", rank=rank, keep_bytes=at["metrics"], after_step=at["step"])
    samples = SampleLog(folder / "s.jsonl", rank=rank, keep_bytes=at["samples"])
    positions = {}
    for step in steps:
        log.log(step, values_of(step))
        samples.log(step, [group_of(step)])
        positions[step] = {"metrics": log.position(), "samples": samples.position(), "step": step}
    log.close()
    samples.close()
    return positions


def test_resumed_files_equal_those_of_an_uninterrupted_run(tmp_path):
    (whole := tmp_path / "whole").mkdir()
    (cut := tmp_path / "cut").mkdir()
    write_run(whole, range(1, 9))
    saved = write_run(cut, range(1, 7))[4]
    for name in ("m.jsonl", "s.jsonl"):
        with (cut / name).open("a") as file:
            file.write('{"step": 7, "torn')  # the process died in the middle of a line
    write_run(cut, range(5, 9), saved)
    for name in ("m.jsonl", "s.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert [(row["step"], row["reward/mean"], row["train/kl"]) for row in read_metrics(cut / "m.jsonl")] == [
        (step, step / 3, 1e-300 * step) for step in range(1, 9)
    ]
    events = EventAccumulator(str(cut / "tb")).Reload().Scalars("reward/mean")
    assert [event.step for event in events] == list(range(1, 9)), "TensorBoard forgets what the resume redoes"
    np.testing.assert_allclose([event.value for event in events], [step / 3 for step in range(1, 9)], rtol=1e-6)


def test_a_sample_is_readable(tmp_path):
    write_run(tmp_path, [3])
    first, second = (json.loads(line) for line in (tmp_path / "s.jsonl").read_text().split("\n")[:2])
    assert first == {
        "step": 3, "prompt_id": "p1", "source": "chain_sum", "sample_id": 6, "question": "1 + 1 = ?", "answer": "2",
        "response": "é\u2028 3 \"0\"\n", "score": 1.0, "parts": {"exact": 1.0, "format": 0.0}, "why": "equal",
        "finish_reason": "stop", "length": 3, "advantage": 0.5,
    }  # fmt: skip
    assert second["sample_id"] == 7 and second["score"] == 0.0
    assert "é" in (tmp_path / "s.jsonl").read_text(), "not \\u00e9"


def test_other_ranks_write_nothing(tmp_path):
    assert write_run(tmp_path, [1, 2], rank=1)[2] == {"metrics": 0, "samples": 0, "step": 2}
    assert not list(tmp_path.iterdir())


def test_lines_reach_the_system_at_once(tmp_path):
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.append({"a": 1})
    assert (tmp_path / "x.jsonl").read_text() == '{"a": 1}\n', "kill -9 here must lose nothing"
    assert read_metrics(tmp_path / "x.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("keep", [5, 9, 99])
def test_a_file_changed_behind_our_back_is_refused(tmp_path, keep):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    if keep == 9:
        JsonLines(tmp_path / "x.jsonl", keep).close()
        assert (tmp_path / "x.jsonl").read_text() == '{"a": 1}\n'
        return
    with pytest.raises(InputError, match=f"x.jsonl has 18 bytes and no line ending at byte {keep}"):
        JsonLines(tmp_path / "x.jsonl", keep)
    assert (tmp_path / "x.jsonl").stat().st_size == 18, "refusing changes nothing"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(tmp_path, bad):
    log = MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb")
    with pytest.raises(FloatingPointError, match=f"metric train/kl is {bad} in step 4"):
        log.log(4, {"reward/mean": 1.0, "train/kl": bad})
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_moving_average_by_hand():
    # span 3: decay 1/2, weights 1, 1/2, 1/4 divided by their sum
    np.testing.assert_allclose(smoothed([4.0, 1.0, 7.0], 3), [4.0, (1 + 2) / 1.5, (7 + 0.5 + 1) / 1.75])
    np.testing.assert_allclose(smoothed([2.5] * 50, 20), 2.5)


def test_plots_of_what_there_is(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"step": step, names.REWARD: step / 60, names.LENGTH: 8.0, names.ENTROPY: 2.0 / step, names.KL: 0.0,
         names.TOKENS_PER_SECOND: 50 + rng.normal(), names.MISMATCH: 1e-6, names.MISMATCH_MAX: 1e-5}
        for step in range(1, 61)
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 61, "rew')
    draw_plots(tmp_path / "m.jsonl", tmp_path / "plots")
    start = time.perf_counter()
    drawn = draw_plots(tmp_path / "m.jsonl", tmp_path / "plots")
    assert time.perf_counter() - start < 3
    assert [path.stem for path in drawn] == [panel.name for panel in PANELS if panel.name != "accuracy"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(path.name for path in drawn)
    for path in drawn:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        blue = (pixels == (0x1F, 0x5F, 0xA8)).all(-1)
        assert pixels.shape == (630, 1050, 3) and blue.sum() > 1000, f"{path.stem} shows its curve"
    (tmp_path / "empty.jsonl").write_text(json.dumps({"step": 0, names.ACCURACY: 0.25}) + "\n")
    assert [path.stem for path in draw_plots(tmp_path / "empty.jsonl", tmp_path / "p2")] == ["accuracy"]
    assert draw_plots(tmp_path / "absent.jsonl", tmp_path / "p3") == [] and not (tmp_path / "p3").exists()


def test_progress_lines_times_and_summary(tmp_path, capsys):
    watchdog = Watchdog(0)
    with RunProgress(40, watchdog, done_steps=2) as progress:
        for _ in range(2):
            with progress.phase("rollout"):
                assert watchdog.phase == "step 3, rollout"
                time.sleep(0.02)
        with progress.phase("train"):
            pass
        times = progress.take_times()
        assert times["time/rollout"] >= 0.04 and 0 <= times["time/train"] < 0.04 and progress.take_times() == {}
        times = {"time/rollout": 1.25, "time/train": 0.5}
        progress._taken = times
        progress.step(3, {names.REWARD: 0.5, names.KL: 1e-3, names.LENGTH: 7.25, names.TOKENS_PER_SECOND: 312.4, **times})
        with pytest.raises(ZeroDivisionError) as error, progress.phase("train"):
            1 / 0  # noqa: B018
    assert error.value.__notes__ == ["in phase train of step 4"]
    assert watchdog.phase == "step 4, train", "still the phase in which it failed"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "reward", "accuracy", "length", "KL", "entropy", "tok/s", "seconds"]
    assert lines[1].split() == ["3", "0.500", "7.2", "1.00e-03", "312", "rollout", "1.2,", "train", "0.5"]
    assert lines[0].index("length") + len("length") == lines[1].index("7.2") + len("7.2"), "columns are aligned"

    (tmp_path / "metrics.jsonl").touch()
    long_command = "torchrun --nproc-per-node 2 launch/grpo.py smollm2 --run.resume --run.dir " + "x" * 80
    Summary("finished", 40, 40, 754.6, tmp_path, 0.125, 0.875, (0.9, 30), {"resume": long_command}).show(progress.console)
    text = capsys.readouterr().out
    assert "finished after step 40 of 40" in text and "0.125 before, 0.875 after" in text and "0.900 after step 30" in text
    assert "12 min 35 s" in text and "metrics.jsonl" in text and "plots" not in text and long_command in text
    quiet = RunProgress(40, watchdog, rank=1)
    quiet.step(1, {names.REWARD: 1.0})
    assert capsys.readouterr().out == ""


def test_telemetry_of_this_process():
    before = Telemetry(torch.device("cpu")).sample()
    # 0.25 GiB of new pages. (A tensor may get memory that malloc kept from earlier tests, which is resident already.)
    kept = mmap.mmap(-1, 2**28)
    torch.frombuffer(kept, dtype=torch.uint8).fill_(1)
    after = Telemetry(torch.device("cpu")).sample()
    assert 0.2 < after["mem/rss_gib"] - before["mem/rss_gib"] < 0.3 and len(kept)
    assert after["mem/peak_rss_gib"] >= after["mem/rss_gib"] * 0.99
    assert all(key.startswith(("mem/", "time/")) for key in after)
