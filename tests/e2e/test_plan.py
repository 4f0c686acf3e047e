"""Planning as a user asks for it: launch/plan.py, and --plan on the other launch files. Numbers are tested in tests/plan."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from strop.engine.config import Layout
from strop.engine.model.sources import resolve_model
from strop.engine.plan.grpo import grpo_step
from strop.engine.plan.memory import PARTS as MEMORY_PARTS
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, RolloutPlan
from strop.engine.plan.text import words
from strop.engine.plan.training import PARTS as STEP_PARTS
from strop.launch.plan import main
from strop.launch.plan_table import COLUMN_NAMES
from strop.launch.planned import PROBLEMS_EXIT_CODE as PROBLEMS
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
    output = launcher.run("plan.py", "qwen3-30b-a3b", "--gpus", 8, "--layout.ep", 8, "--json", written, code=PROBLEMS)
    assert "does not work" in output and "optimizer" in output
    [problem] = [line for line in output.splitlines() if line.startswith("problem: ")]
    plan = json.loads(written.read_text())
    [told] = plan["problems"]
    assert told["message"] == problem.removeprefix("problem: ") and told["setting"] == "device" and told["nearest"]
    assert plan["command"].endswith(f"qwen3-30b-a3b --gpus 8 --layout.ep 8 --json {written}") and plan["strop_version"]


def test_runs_of_which_not_everything_can_be_predicted(launcher) -> None:
    """Nothing of impossible settings, memory alone where engines have no room for a sequence. An earlier picture would be taken
    for this plan's."""
    drawn, written = launcher.folder / "plan.png", launcher.folder / "plan.json"
    drawn.write_bytes(b"an earlier picture")
    undivided = launcher.start("plan.py", "qwen3-30b-a3b", "--gpus", 16, "--layout.tp", 3, "--png", drawn)
    flags = ("--gpus", 256, "--layout.pp", 16, "--layout.ep", 16, "--grpo", "--json", written)
    uncached = launcher.start("plan.py", "deepseek-v3", *flags)
    assert undivided.wait(60) == uncached.wait(60) == PROBLEMS
    assert "tp 3" in undivided.output and "nearest allowed" in undivided.output and "Memory of a rank" not in undivided.output
    assert "there is no picture" in undivided.output and not drawn.exists()
    assert "KV cache" in uncached.output and "Memory of a rank" in uncached.output and "GRPO step" not in uncached.output
    plan = json.loads(written.read_text())
    assert plan["memory_per_rank"]["headroom_bytes"] < 0 and plan["problems"] and "grpo_step" not in plan


def test_files_that_cannot_be_written_are_told_before_a_search(launcher) -> None:
    drawn = launcher.folder / "plan.png"
    flags = ("deepseek-v3", "--gpus", 2048, "--search", "--png", drawn)
    files = (launcher.folder / "absent" / "plan.json", launcher.folder)
    runs = [launcher.start("plan.py", *flags, "--json", file) for file in files]
    runs.append(launcher.start("plan.py", "qwen3-0.6b", "--json", "/dev/full"))
    assert [run.wait(20) for run in runs] == [2] * len(runs)
    for run in runs:
        assert "can't be written" in run.output and "Traceback" not in run.output
    assert not drawn.exists()


def test_the_first_rank_alone_plans(launcher) -> None:
    assert launcher.run("plan.py", "tiny", WORLD_SIZE="8", RANK="3", LOCAL_RANK="3") == ""


def test_the_planner_starts_without_torch(launcher) -> None:
    """The tiny model too, which the engine makes with torch."""
    source = (
        "import runpy, sys\nsys.argv = ['plan.py', 'tiny']\n"
        "try:\n    runpy.run_path(sys.path.pop(), run_name='__main__')\n"
        "except SystemExit as end:\n    print('torch' in sys.modules, end.code)"
    )
    file = Path(__file__).parents[2] / "launch" / "plan.py"
    started = f"import sys\nsys.path.append({str(file)!r})\n{source}"
    printed = subprocess.run([sys.executable, "-c", started], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "False 0"


def test_what_was_planned_is_said(launcher) -> None:
    output = launcher.run(
        "plan.py", "qwen3-8b", "--gpus", 8, "--layout.tp", 2, "--layout.sp", "--grpo", "--placement", "split",
        "--rollout.gpus", 4, "--rollout.steps-ahead", 1, "--training.offload-optimizer", "--training.gradient-dtype-bytes", 2,
    )  # fmt: skip
    for text in (
        "on 4 of 8 GPUs, 4 train", "optimizer on the host", "gradients of 2 bytes", "Weight sync: reshard",
        "at most 1 step ahead", "engines",
    ):  # fmt: skip
        assert text in " ".join(output.split())


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
    headers = [line.split() for line in lines if line.startswith(("training ", "generating ")) and "total" in line]
    for header, names in zip(headers, (("weights", "activ", "total"), ("engine", "margin", "total")), strict=True):
        assert set(names) <= set(header), "no word is broken"
    at_forty = launcher.run("plan.py", "qwen3-8b", "--gpus", 8, "--layout.tp", 2, "--layout.sp", COLUMNS="40")
    assert "training   weights" in at_forty, "a narrower terminal gets the same lines"


def test_what_lies_on_the_host_must_fit_into_it(launcher) -> None:
    """Adam's 455 GiB, a quarter more, and 256 of the system."""
    flags = ("--gpus", 8, "--layout.ep", 8, "--training.offload-optimizer", "--training.recompute", "layer")
    output = launcher.run("plan.py", "qwen3-30b-a3b", *flags, COLUMNS="200")
    assert "Host: 56.9 GiB a GPU, 824.7 of 1,904.6 usable GiB a node (optimizer 455.0, rounding 113.7, system 256.0)." in output
    less = launcher.run("plan.py", "qwen3-30b-a3b", *flags, "--host-memory-gib", 512, code=PROBLEMS)
    assert "problem: --host-memory-gib 512: the host of a node needs 824.7 GiB of 476.2 usable GiB" in less
    assert "--host-memory-gib -1.0: must be at least 0" in launcher.run(
        "plan.py", "qwen3-30b-a3b", *flags, "--host-memory-gib", -1, code=PROBLEMS
    )


def test_search(launcher) -> None:
    written = launcher.folder / "search.json"
    output = launcher.run(
        "plan.py", "qwen3-4b", "--gpus", 8, "--search", "--best", 3, "--space.pp", 1, "--space.cp", 1, "--json", written,
        "--memory-budget-gib", 60,
    )  # fmt: skip
    assert "Fastest layouts" in output
    best = json.loads(written.read_text())["best"]
    seconds = [plan["training_step"]["step_seconds"] for plan in best]
    assert len(best) == 3 and seconds == sorted(seconds)
    for plan in best:
        memory = plan["memory_per_rank"]
        assert memory["memory_budget_bytes"] == 60 * 2**30 and plan["layout"]["pp"] == 1
        worst = max(stage["total_bytes"] for stage in memory["stages"])
        assert 0 <= memory["headroom_bytes"] == memory["memory_budget_bytes"] - worst
    assert f"fits, {best[0]['memory_per_rank']['headroom_bytes'] / 2**30:.1f} GiB free" in output
    assert "of 60.0 (the budget; the device has 79.2)" in output
    command = best[0]["plan_command"]
    assert f"The first one alone: {command}\n" in output
    again = launcher.run(*command.removeprefix("python launch/").split(), "--json", written)
    assert again and json.loads(written.read_text())["training_step"] == best[0]["training_step"]


@pytest.mark.parametrize(
    "flags",
    [("--grpo", "--host-memory-gib", 1500.5), ("--grpo", "--space.placements", "split", "--training.recompute", "layer")],
)
def test_a_searched_row_is_planned_again_by_its_command(launcher, flags) -> None:
    written = launcher.folder / "plan.json"
    model = ("qwen3-0.6b", "--gpus", 8, "--steps", 5, "--device", "H200")
    launcher.run("plan.py", *model, "--search", "--best", 2, "--json", written, *flags)
    best = json.loads(written.read_text())["best"]
    for row in best:
        launcher.run(*row["plan_command"].removeprefix("python launch/").split(), "--json", written)
        again = json.loads(written.read_text())
        assert {key: again[key] for key in row if key not in ("plan_command", "command")} == {
            key: row[key] for key in row if key not in ("plan_command", "command")
        }
        assert "layer" in row["training"]["recompute"] or "layer" not in flags
        installed_gib = row["host_memory_per_node"]["installed_bytes"] / 2**30
        assert installed_gib == (1500.5 if "--host-memory-gib" in flags else 2048)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("gpt-5",), "'gpt-5' is no model"),
        (("qwen3-8b", "--device", "abacus"), "abacus"),
        (("qwen3-8b", "--rollout.tp", 2), "no effect without --grpo"),
        (("qwen3-8b", "--search", "--layout.tp", 2), "--search tries every layout"),
        (("qwen3-8b", "--search", "--rollout.tp", 8, "--grpo"), "--space.rollout-tp says among which values"),
        (("qwen3-8b", "--search", "--training.micro-batch-sequences", 3), "--space.micro-batch-sequences says"),
        (("qwen3-8b", "--search", "--training.recompute-layers", 3), "leave it out"),
        (("qwen3-8b", "--search", "--training.fsdp", "--space.fsdp", "False"), "contradict each other"),
        (("qwen3-8b", "--search", "--memory-budget-gib", 500), "h100 has 79.2 GiB"),
        (("qwen3-8b", "--search", "--space.placements", "split"), "no effect without"),
        (("qwen3-8b", "--png", "plan.jpg"), "ends in .png"),
        (("qwen3-8b", "--json", "plan.png", "--png", "./plan.png"), "are one file"),
        (("qwen3-8b", "--best", 0), "--best 0"),
        (("qwen3-8b", "--best", 3, "--space.tp", 2), "--space.*, --search-seconds and --memory-budget-gib have no effect"),
        (("qwen3-8b", "--grpo", "--training.global-batch-sequences", 12), "no effect with --grpo"),
    ],
)
def test_usage_errors(monkeypatch, capsys, arguments, says) -> None:
    """In this process, as there are many."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = "".join(capsys.readouterr())
    assert ended.value.code == 2 and says in re.sub(r"[\s│]+", " ", printed) and "Traceback" not in printed


def test_every_flag_is_explained_without_names_of_the_code(launcher) -> None:
    """Nobody who reads --help knows what a class or a constant is called."""
    lines = [line.strip("│ ").strip() for line in launcher.run("plan.py", "tiny", "--help", COLUMNS="80").splitlines()]
    flags = [(line, below) for line, below in pairwise(lines) if line.startswith("--")]
    assert len(flags) > 60 and not [line for line, below in flags if below.startswith("(default")]
    assert not re.search(r"`|\(\)|[A-Z]{3,}_[A-Z]{2,}|TrainingPlan|RolloutPlan|PlannedRun|SearchSpace", "\n".join(lines))


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


def test_plans_of_the_other_launch_files(launcher) -> None:
    """Ranks don't meet for it, so one process can say that it is one of two."""
    flags = ("grpo.py", "tiny", "--plan", "h100", "--layout.tp", 2, "--run.dir", launcher.folder / "never")
    first, second = (launcher.start(*flags, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank) for rank in "01")
    eight = launcher.start("grpo.py", "tiny", "--layout.tp", 2, "--plan", "H100x8")
    evaluation = launcher.start("evaluate.py", "smollm2", "--plan", "h200", "--model", "tiny")
    assert [run.wait(60) for run in (first, second, eight, evaluation)] == [0, 0, 0, 0]
    assert first.output.startswith("tiny on 2 x h100") and second.output == ""
    assert "GRPO step" in first.output and "Whole run, 4 steps" in first.output
    assert "--layout.tp 2 is not implemented yet" in first.output
    assert not (launcher.folder / "never").exists()
    assert eight.output.startswith("tiny on 8 x h100: fits") and "dp (data)" in eight.output
    assert evaluation.output.startswith("tiny on 1 x h200") and "Generation" in evaluation.output


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_what_is_planned_before_the_folder_exists_is_what_lies_in_it(name: str) -> None:
    assert name in GRPO_PRESETS
    read = shape_at(Path(resolve_model(name)))
    assert vars(shape_of_model(name)) == vars(read) | {"name": name}


def test_readme_explains_every_name() -> None:
    """Of phases as they are printed, and of memory as its columns are headed."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    explained = set(re.findall(r"`([a-z ]+)`", readme[readme.index("What the names in tables") :]))
    run = PlannedRun.of(SHAPES["qwen3-8b"], 16, rollout=RolloutPlan())
    split = replace(run, placement="split", layout=Layout(), rollout=RolloutPlan(gpus=8, steps_ahead=1))
    steps = [grpo_step(replace(one, layout=one.layout.resolve(one.training_gpus))).parts_seconds for one in (run, split)]
    named = {words(phase) for phase in (*STEP_PARTS, *steps[0], *steps[1])}
    named |= {COLUMN_NAMES.get(part, part) for part in MEMORY_PARTS}
    axes = {"exposed context", "exposed expert", "exposed pipeline", "exposed data"}
    assert named - axes <= explained and {name.removeprefix("exposed ") for name in axes} <= explained


def test_readme_example_is_what_the_command_prints(launcher) -> None:
    """Facts and layout to the letter; predicted seconds and bytes to within 5%, as their constants may be fitted again."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    command, printed = re.search(r"^```\n\$ python launch/plan\.py (.*?)\n(.*?)^```$", readme, re.M | re.S).groups()
    output = launcher.run("plan.py", *command.split(), code=PROBLEMS, COLUMNS="100")
    lines, expected = output.rstrip().splitlines(), printed.rstrip().splitlines()
    facts = expected.index(next(line for line in expected if line.startswith("Memory of a rank")))
    assert [line.rstrip() for line in lines[:facts]] == expected[:facts]
    for name, pattern in {"seconds": r"Optimizer step: ([\d.]+) s", "GiB": r"stage 0 needs ([\d.]+) GiB"}.items():
        now, then = (float(re.search(pattern, text)[1]) for text in (output, printed))
        assert now == pytest.approx(then, rel=0.05), f"{name} moved: paste the command's output into README.md again"
