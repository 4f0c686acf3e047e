"""Planning as a user asks for it: launch/plan.py, and --plan on the other launch files. Numbers are tested in tests/plan."""

import json
import re
from pathlib import Path

import pytest

from strop.engine.model.sources import resolve_model
from strop.launch.planned import shape_at, shape_of_model
from strop.launch.presets import GRPO_PRESETS


def test_a_layout_that_fits(launcher) -> None:
    written, drawn = launcher.folder / "plan.json", launcher.folder / "plan.png"
    output = launcher.run(
        "plan.py", "qwen3-30b-a3b", "--gpus", 32, "--layout.ep", 8, "--layout.pp", 2, "--steps", 100,
        "--json", written, "--png", drawn,
    )  # fmt: skip
    for text in ("30.53B", "Memory of a rank", "Optimizer step", "Whole run, 100 steps", "inside a node", "results/planner.md"):
        assert text in output
    plan = json.loads(written.read_text())
    assert plan["model"]["total_parameters"] == 30_532_122_624
    assert len(plan["memory_per_rank"]["stages"]) == 2 and plan["problems"] == []
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_the_layout_that_peers_cannot_run_is_refused_with_the_number(launcher) -> None:
    """Default Adam states of Qwen3-30B-A3B on 8 GPUs of 80 GB."""
    written = launcher.folder / "plan.json"
    output = launcher.run("plan.py", "qwen3-30b-a3b", "--gpus", 8, "--layout.ep", 8, "--json", written, code=1)
    assert "does not work" in output and "optimizer" in output
    [problem] = [line for line in output.splitlines() if line.startswith("problem: ")]
    assert json.loads(written.read_text())["problems"] == [problem.removeprefix("problem: ")]


def test_settings_that_leave_nothing_to_predict(launcher) -> None:
    output = launcher.run("plan.py", "qwen3-30b-a3b", "--gpus", 16, "--layout.tp", 3, code=1)
    assert "tp 3" in output and "nearest that fits" in output and "Memory of a rank" not in output
    output = launcher.run("plan.py", "deepseek-v3", "--gpus", 256, "--layout.pp", 16, "--layout.ep", 16, "--grpo", code=1)
    assert "--rollout.tp 1" in output and "KV cache" in output and "Memory of a rank" not in output


def test_narrow_pipes_are_readable(launcher) -> None:
    output = launcher.run(
        "plan.py", "deepseek-v3", "--gpus", 256, "--layout.pp", 16, "--layout.ep", 16, "--training.recompute", "layer",
        "--training.sequence-length-tokens", 8192, "--training.offload-optimizer", "--grpo", "--rollout.tp", 32,
        "--rollout.offload-training", COLUMNS="80",
    )  # fmt: skip
    assert "GRPO step" in output
    lines = [line for line in output.splitlines() if not line.startswith("How far off")]
    assert max(map(len, lines)) <= 80
    assert "…" not in output, "nothing is cut"


def test_search(launcher) -> None:
    written = launcher.folder / "search.json"
    output = launcher.run(
        "plan.py", "qwen3-4b", "--gpus", 8, "--search", "--best", 3, "--space.pp", 1, "--space.cp", 1, "--json", written
    )
    assert "Fastest layouts" in output
    best = json.loads(written.read_text())["best"]
    seconds = [plan["training_step"]["step_seconds"] for plan in best]
    assert len(best) == 3 and seconds == sorted(seconds)
    assert all(plan["memory_per_rank"]["headroom_bytes"] >= 0 and plan["layout"]["pp"] == 1 for plan in best)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("gpt-5",), "'gpt-5' is no preset"),
        (("qwen3-8b", "--device", "abacus"), "abacus"),
        (("qwen3-8b", "--rollout.tp", 2), "no effect without --grpo"),
        (("qwen3-8b", "--search", "--layout.tp", 2), "--search tries every layout"),
        (("qwen3-8b", "--best", 0), "--best 0"),
        (("qwen3-8b", "--best", 3, "--space.tp", 2), "--space.* and --memory-budget-gib have no effect without --search"),
        (("qwen3-8b", "--grpo", "--training.global-batch-sequences", 12), "no effect with --grpo"),
    ],
)
def test_usage_errors(launcher, arguments, says) -> None:
    output = launcher.run("plan.py", *arguments, code=2)
    assert says in " ".join(output.split()) and "Traceback" not in output


def test_the_model_of_a_folder(launcher) -> None:
    folder = launcher.folder / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("[1]")
    assert "holds a list" in launcher.run("plan.py", folder, code=2)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048, "hidden_act": "silu",
    }))  # fmt: skip
    output = launcher.run("plan.py", folder, "--gpus", 4)
    # 2 x 1000 x 256 + 4 (4 x 256 x 256 + 3 x 256 x 512 + 2 x 256) + 256
    assert output.startswith("mine on 4 x h100") and "parameters  3.14M" in output


def test_plan_of_exactly_this_run(launcher) -> None:
    """Ranks don't meet for it, so one process can say that it is one of two."""
    flags = ("grpo.py", "tiny", "--plan", "h100", "--layout.tp", 2, "--run.dir", launcher.folder / "never")
    first, second = (launcher.start(*flags, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank) for rank in "01")
    assert first.wait(60) == second.wait(60) == 0
    assert first.output.startswith("tiny on 2 x h100") and second.output == ""
    assert "GRPO step" in first.output and "Whole run, 4 steps" in first.output
    assert "--layout.tp 2 is not implemented yet" in first.output
    assert not (launcher.folder / "never").exists()


def test_plan_of_an_evaluation(launcher) -> None:
    output = launcher.run("evaluate.py", "smollm2", "--plan", "h200", "--model", "tiny")
    assert output.startswith("tiny on 1 x h200") and "Generation" in output


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_what_is_planned_before_the_folder_exists_is_what_lies_in_it(name: str) -> None:
    assert name in GRPO_PRESETS
    read = shape_at(Path(resolve_model(name)))
    assert vars(shape_of_model(name)) == vars(read) | {"name": name}


def test_readme_example_is_what_the_command_prints(launcher) -> None:
    """Facts and layout to the letter; predicted seconds and bytes to within 5%, as their constants may be fitted again."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    command, printed = re.search(r"^```\n\$ python launch/plan\.py (.*?)\n(.*?)^```$", readme, re.M | re.S).groups()
    output = launcher.run("plan.py", *command.split(), code=1, COLUMNS="100")
    lines, expected = output.rstrip().splitlines(), printed.rstrip().splitlines()
    facts = expected.index(next(line for line in expected if line.startswith("Memory of a rank")))
    assert [line.rstrip() for line in lines[:facts]] == expected[:facts]
    for name, pattern in {"seconds": r"Optimizer step: ([\d.]+) s", "GiB": r"stage 0 needs ([\d.]+) GiB"}.items():
        now, then = (float(re.search(pattern, text)[1]) for text in (output, printed))
        assert now == pytest.approx(then, rel=0.05), f"{name} moved: paste the command's output into README.md again"
