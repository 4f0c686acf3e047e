"""benchmarks/gpu.sh where there is no GPU: it says so for each part, and in its summary, without building anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.sh"


def start(*arguments: str) -> subprocess.CompletedProcess:
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHON": sys.executable}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would run for minutes")
def test_every_part_is_skipped_with_the_reason(tmp_path):
    done = start(str(tmp_path / "results"))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "results/summary.json").read_text())
    assert [part["part"] for part in summary["parts"]] == [
        "build", "tests of the kernels", "tests of the engine", "benchmarks", "GRPO steps"
    ]  # fmt: skip
    assert {(part["status"], part["exit_code"]) for part in summary["parts"]} == {("skipped", None)}
    assert all(f"torch {torch.__version__} sees no CUDA device" in part["why"] for part in summary["parts"])
    assert (tmp_path / "results/gpu.log").read_text() == done.stdout
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["gpu.log", "summary.json"]


def test_needs_a_folder(tmp_path):
    done = start()
    assert done.returncode == 2 and "usage" in done.stderr and done.stdout == ""
    assert start("--cpu").returncode == 2
