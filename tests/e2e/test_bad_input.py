"""Every mistake gives one clear error, with the value and the fix, soon, on every rank; and nothing saved is lost."""

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from strop.engine.model.sources import resolve_model

SECONDS = 30
"""From the start of the process to its end, on a machine that does nothing else; a busy one gets as much more as it is busy."""


def questions(path: Path, *, count: int = 40, line: int | None = None, text: str = "", **fields: str) -> Path:
    """A JSONL file of sums; line number `line` is `text`, or has other `fields`."""
    rows = [json.dumps({"question": f"{n} + 1 =", "answer": str(n + 1)}) for n in range(count)]
    if line is not None:
        rows[line - 1] = text or json.dumps({"question": "2 + 2 =", "answer": "4"} | fields)
    path.write_text("\n".join(rows) + "\n")
    return path


@dataclass(frozen=True)
class Case:
    """Flags for grpo.py tiny, and what the one error line must say."""

    flags: tuple[object, ...]
    says: tuple[str, ...]


def refused(launcher, *cases: Case, ranks: int = 1) -> list[str]:
    """Each case ends with exit code 2 within SECONDS, one error line and no traceback. Two at a time: they mostly import."""
    lines = []
    for pair in (cases[i : i + 2] for i in range(0, len(cases), 2)):
        began = time.monotonic()
        launched = [launcher.start("grpo.py", "tiny", *case.flags, ranks=ranks) for case in pair]
        for case, one in zip(pair, launched, strict=True):
            code = one.wait(4 * SECONDS)
            busy = max(1.0, os.getloadavg()[0] / os.cpu_count())
            assert time.monotonic() - began < SECONDS * busy, f"it took too long:\n{one.output}"
            errors = [line for line in one.output.splitlines() if line.startswith("error")]
            assert code == (2 if ranks == 1 else 1) and len(errors) == 1, one.output
            assert all(word in errors[0] for word in case.says), f"expected {case.says} in: {errors[0]}"
            assert "Traceback" not in one.output.split("torch/distributed/elastic")[0], one.output
            lines.append(errors[0])
    return lines


def test_malformed_json(launcher) -> None:
    path = questions(launcher.folder / "broken.jsonl", line=37, text='{"question": "1 + 1 =", "answer": ')
    refused(launcher, Case(("--data.path", path), says=("broken.jsonl:37",)), ranks=2)


def test_data_that_can_not_be_used(launcher) -> None:
    empty = questions(launcher.folder / "empty.jsonl", line=5, question="  ")
    words = questions(launcher.folder / "words.jsonl", line=9, answer="a dozen")
    latex = questions(launcher.folder / "latex.jsonl", line=9, answer="\\frac{1}{")
    long = questions(launcher.folder / "long.jsonl", line=3, question="1 + " * 300 + "1 =")
    refused(
        launcher,
        Case(("--data.path", "absent.jsonl"), says=("absent.jsonl",)),
        Case(("--data.path", empty), says=("empty.jsonl:5", "empty")),
        Case(("--data.path", words), says=("words.jsonl:9", "'a dozen'", "not a number")),
        Case(("--data.path", latex, "--reward.rule.extract", "box"), says=("latex.jsonl:9", "frac")),
        Case(("--data.path", long), says=("1024", "1206")),
    )


@pytest.fixture(scope="module")
def tiny_tensors() -> dict[str, torch.Tensor]:
    return load_file(resolve_model("tiny") / "model.safetensors")


def test_model_folders_that_are_not_whole(launcher, tiny_tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    damages = {
        "missing": {key: value for key, value in tiny_tensors.items() if key != name},
        "extra": tiny_tensors | {"model.layers.3.mlp.gate.bias": torch.zeros(3)},
        "misshaped": tiny_tensors | {name: torch.zeros(7, 144)},
    }
    for damage, tensors in damages.items():
        shutil.copytree(resolve_model("tiny"), launcher.folder / damage)
        save_file(tensors, launcher.folder / damage / "model.safetensors", metadata={"format": "pt"})
    refused(
        launcher,
        Case(("--model", launcher.folder / "missing"), says=(name, "missing")),
        Case(("--model", launcher.folder / "extra"), says=("model.layers.3.mlp.gate.bias", "extra")),
        Case(("--model", launcher.folder / "misshaped"), says=(name, "7", "432")),
    )


def test_flags_that_contradict_the_run(launcher) -> None:
    refused(
        launcher,
        Case(("--layout.sp",), says=("--layout.sp", "--layout.tp")),
        Case(("--layout.tp", 2), says=("--layout.tp 2 is not implemented",)),
        Case(("--train.microbatch-tokens", 20), says=("--train.microbatch-tokens 20", "raise it to")),
        Case(("--model", "absent"), says=("'absent'",)),
    )
    few_prompts = Case(("--rollout.prompts-per-step", 1), says=("--rollout.prompts-per-step 1", "2 data-parallel ranks"))
    refused(launcher, few_prompts, ranks=2)


def test_flags_that_are_no_flags(launcher) -> None:
    unknown = launcher.run("grpo.py", "tiny", "--train.learning-rate", 1, ranks=2, code=2)
    assert unknown.count("Unrecognized options: --train.learning-rate") == 1
    contradiction = launcher.run("grpo.py", "tiny", "--train.loss.policy", "reinforce", "--train.loss.clip-low", 0.1, code=2)
    assert "clip_low 0.1 has no effect with" in contradiction
    too_many = launcher.run("grpo.py", "tiny", "--train.minibatches", 100, code=2)
    assert "--train.minibatches 100: a step has only 16" in too_many


def test_no_space_left_during_a_save(launcher) -> None:
    """The limit lets the logs grow but not a checkpoint's 5 MB; the older checkpoint stays, and takes the run to its end."""
    folder = launcher.folder / "run"
    launcher.run("grpo.py", "tiny", "--run.dir", folder, "--run.stop-at", 2, ranks=2)
    flags = ("grpo.py", "tiny", "--run.dir", folder, "--run.resume")
    output = launcher.run(*flags, ranks=2, code=2, wrap=("prlimit", "--fsize=2000000"))
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert errors and "step-4" in errors[0] and "space" in errors[0], output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    launcher.run(*flags, ranks=2)


def test_workers_that_hang_or_die_cost_their_answers_and_nothing_else(launcher) -> None:
    folder = launcher.folder / "run"
    run = launcher.start(
        "grpo.py", "tiny", "--data.path", "reasoning-gym:letter_counting", "--data.size", 40, "--reward.rule.extract", "text",
        "--reward.rule.no-finished", "--reward.limit-s", 2, "--reward.workers", 1, "--train.steps", 12, "--run.dir", folder,
        ranks=2,
    )  # fmt: skip
    measured = folder / "metrics.jsonl"
    run.wait_until(lambda: measured.exists() and measured.read_text().count("\n") >= 2, timeout=90)  # workers have worked
    hung, dead = (workers(rank)[0] for rank in run.ranks())
    os.kill(hung, signal.SIGSTOP)
    os.kill(dead, signal.SIGKILL)
    assert run.wait(timeout=120) == 0, run.output
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(13))
    assert any(row.get("reward/timeout", 0) > 0 for row in rows), "the hung worker's answer was not counted"
    assert not Path(f"/proc/{hung}").exists()


def workers(rank: int) -> list[int]:
    """Process ids of a rank's reward workers."""
    found = []
    for thread in Path(f"/proc/{rank}/task").glob("*/children"):
        for child in thread.read_text().split():
            try:
                if "strop.engine.reward.workers" in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(int(child))
            except FileNotFoundError:
                continue
    return found
