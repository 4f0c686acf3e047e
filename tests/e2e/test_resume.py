"""A killed run goes on bit for bit, whenever it was killed; a stopped one too; nobody's folder is overwritten."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

STEPS = 6
# Everything a resume must restore: mini-batches and their order, a reference that was replaced, a learning-rate schedule,
# a new epoch of the 12 questions.
FLAGS = (
    "--train.steps", STEPS, "--run.save-every", 1, "--train.minibatches", 2, "--train.loss.kl-coef", 0.01,
    "--train.kl-refresh-steps", 3, "--train.lr-schedule", "linear", "--data.size", 16, "--rollout.prompts-per-step", 8,
)  # fmt: skip
KILLS = 8
AT_LEAST_INSIDE_A_SAVE = 3


def lines(folder: Path, name: str) -> list[dict]:
    """What equal runs have equal: each record without its time/ and mem/ keys."""
    records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith(("time/", "mem/"))} for record in records]


def assert_equal_runs(folder: Path, reference: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = lines(folder, name), lines(reference, name)
        assert len(ours) == len(theirs), f"{name}: {len(ours)} lines, {len(theirs)} in the uninterrupted run"
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
            assert one == other, f"{name} line {number}"
    ours, theirs = folder / "model" / "model.safetensors", reference / "model" / "model.safetensors"
    assert ours.read_bytes() == theirs.read_bytes(), "the trained weights differ"


@pytest.fixture(scope="module")
def uninterrupted(module_launcher) -> Path:
    folder = module_launcher.folder / "uninterrupted"
    module_launcher.run("grpo.py", "tiny", *FLAGS, "--run.dir", folder, ranks=2)
    assert [record["step"] for record in lines(folder, "metrics.jsonl")] == list(range(STEPS + 1))
    return folder


def is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*.partial"))


def kill_a_rank(launcher, folder: Path, seed: int) -> bool:
    """Start a run and kill -9 one rank at a moment that the seed decides: an odd seed's inside a save, an even seed's some time
    after a step's line was written, perhaps before anything was saved. Whether it was saving."""
    chance = random.Random(seed)
    run = launcher.start("grpo.py", "tiny", *FLAGS, "--run.dir", folder, ranks=2)
    after = chance.randrange(0, STEPS - 2)
    metrics = folder / "metrics.jsonl"
    run.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > after, timeout=90)
    victim = run.ranks()[chance.randrange(2)]
    if seed % 2:
        run.wait_until(lambda: is_saving(folder), timeout=30)
    else:
        time.sleep(chance.uniform(0, 0.3))
    was_saving = is_saving(folder)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    assert run.wait(timeout=30) != 0
    assert time.monotonic() - killed < 15, f"the other rank outlived the killed one for long:\n{run.output}"
    return was_saving


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(launcher, uninterrupted: Path) -> None:
    inside = 0
    for seed in range(KILLS):
        folder = launcher.folder / f"killed-{seed}"
        inside += kill_a_rank(launcher, folder, seed)
        launcher.run("grpo.py", "tiny", *FLAGS, "--run.dir", folder, "--run.resume", ranks=2)
        assert_equal_runs(folder, uninterrupted)
    print(f"{KILLS} kills, {inside} of them inside a save")
    assert inside >= AT_LEAST_INSIDE_A_SAVE


def test_killed_inside_a_save_a_run_goes_on_bit_for_bit(launcher, uninterrupted: Path) -> None:
    folder = launcher.folder / "killed"
    kill_a_rank(launcher, folder, seed=1)
    launcher.run("grpo.py", "tiny", *FLAGS, "--run.dir", folder, "--run.resume", ranks=2)
    assert_equal_runs(folder, uninterrupted)


def test_stopped_and_resumed(launcher, uninterrupted: Path) -> None:
    """--run.stop-at ends like an interruption; what the closing summary says to do then finishes the run."""
    folder = launcher.folder / "stopped"
    output = launcher.run("grpo.py", "tiny", *FLAGS, "--run.dir", folder, "--run.stop-at", 2, ranks=2)
    assert f"--run.dir {folder} --run.resume" in output
    assert not (folder / "model").exists()
    launcher.run("grpo.py", "tiny", *FLAGS, "--run.dir", folder, "--run.resume", ranks=2)
    assert_equal_runs(folder, uninterrupted)


def test_ctrl_c_saves_and_says_how_to_resume(launcher, uninterrupted: Path) -> None:
    folder = launcher.folder / "interrupted"
    run = launcher.start("grpo.py", "tiny", *FLAGS, "--run.dir", folder, ranks=2)
    run.wait_until(lambda: (folder / "metrics.jsonl").exists() and len(lines(folder, "metrics.jsonl")) > 1, timeout=90)
    run.process.send_signal(signal.SIGINT)  # as a terminal does: to torchrun, which passes it on
    assert run.wait(timeout=40) != 0
    assert "resume:" in run.output and "--run.resume" in run.output
    assert len(lines(folder, "metrics.jsonl")) <= STEPS
    launcher.run("grpo.py", "tiny", *FLAGS, "--run.dir", folder, "--run.resume", ranks=2)
    assert_equal_runs(folder, uninterrupted)


def test_a_used_folder_and_changed_settings_are_refused(launcher, uninterrupted: Path) -> None:
    used = launcher.run("grpo.py", "tiny", *FLAGS, "--run.dir", uninterrupted, ranks=2, code=2)
    assert used.count("already holds a run: add --run.resume") >= 1
    other_rate = launcher.run(
        "grpo.py", "tiny", *FLAGS, "--train.lr", 0.5, "--run.dir", uninterrupted, "--run.resume", ranks=2, code=2
    )
    assert "--train.lr was 0.001, now 0.5" in other_rate
    fewer_ranks = launcher.run("grpo.py", "tiny", *FLAGS, "--run.dir", uninterrupted, "--run.resume", code=2)
    assert "--layout.dp was 2, now 1" in fewer_ranks
