"""The whole loop learns: a random model, from reward alone, in under two minutes on two processes."""

import json
from pathlib import Path

import pytest

DIGITS = "0123456789"


@pytest.fixture
def copy_the_digit(tmp_path: Path) -> Path:
    """Answer with the digit that you see. A random model hits it, and then ends, about once in ten thousand tries; the first
    digit of a response and its end are learnt from what little comes by chance."""
    path = tmp_path / "copy.jsonl"
    rows = [{"prompt": f"{digit}{'.' * dots}", "answer": digit} for digit in DIGITS for dots in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_random_model_learns_to_copy(launcher, copy_the_digit: Path) -> None:
    folder = launcher.folder / "run"
    launcher.run(
        "grpo.py", "tiny", "--data.path", copy_the_digit, "--data.template", "plain", "--train.steps", 60,
        "--rollout.prompts-per-step", 16, "--rollout.group-size", 32, "--rollout.max-new-tokens", 1, "--eval.max-new-tokens", 1,
        "--reward.rule.no-finished", "--train.lr", 2e-3, "--run.save-every", 100, "--run.dir", folder, ranks=2, timeout=120,
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = rows[0]["eval/pass@1"], rows[-1]["eval/pass@1"]
    rewards = [row["reward/mean"] for row in rows[1:]]
    print(f"held-out accuracy {before:.2f} -> {after:.2f}; reward {rewards[0]:.3f} -> {rewards[-1]:.3f}")
    assert before <= 0.3
    assert after >= 0.9
