"""What a run on a cluster will need and take, before any GPU is taken: memory, step time, mistakes of the layout.

    python launch/plan.py qwen3-30b-a3b --gpus 16 --layout.ep 16             one layout: memory, seconds, bytes, problems
    python launch/plan.py deepseek-v3 --gpus 2048 --device h800 --search \\
        --training.global-batch-sequences 15360                              the layouts that fit, ranked
    python launch/plan.py path/to/config.json --gpus 8 --grpo --json plan.json --png plan.png

Nothing here needs a GPU, torch or another process; under torchrun the first rank alone plans. Exit code 0: the run works; 3: it
doesn't, and the plan says why; 2: a mistake on the command line.
"""

try:
    from strop.launch.command_line import parse
except ImportError as missing:
    raise SystemExit(f"{missing}: install strop first, pip install -e '.[train]' in the repository (see README.md)") from None

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from strop.engine.config import InputError
from strop.engine.plan.drawing import draw_prediction
from strop.engine.plan.facts import total_parameters
from strop.engine.plan.models import SHAPES
from strop.engine.plan.problem import Problem
from strop.engine.plan.report import Prediction
from strop.engine.plan.run import PlannedRun
from strop.engine.plan.search import search
from strop.engine.run.failure import FailureReport
from strop.engine.run.torchrun import Torchrun
from strop.launch.plan_config import PlanConfig, command_of
from strop.launch.plan_table import make_console, short, show, show_notes, show_problems, show_progress, show_search
from strop.launch.planned import PROBLEMS_EXIT_CODE, predict, shape_of_model

PATHS = "A config.json or the Hugging Face folder with it"


def main() -> None:
    with FailureReport():
        models = {name: (f"{short(total_parameters(shape))} parameters", PlanConfig()) for name, shape in SHAPES.items()}
        models |= {"tiny": ("the GRPO preset's model", PlanConfig())}
        models |= {path: ("the model of this path", PlanConfig()) for path in sys.argv[1:2] if Path(path).exists()}
        name, config = parse(models, "Plan a run on a cluster. No GPU is needed.", noun="model", or_path=PATHS)
        if Torchrun.from_environment().rank:
            sys.exit(0)
        run = config.run(shape_of_model(name))
        with output_files(config):
            code = search_layouts(name, run, config) if config.search else check_layout(run, config)
        sys.exit(code)


def check_layout(run: PlannedRun, config: PlanConfig) -> int:
    """Print and write the plan of one layout; returns the exit code."""
    prediction, problems = predict(run)
    console = make_console()
    if prediction is None:
        show_problems(problems, console)
    else:
        show(prediction, problems, console)
    content = {} if prediction is None else prediction.as_dict()
    drawn = prediction if isinstance(prediction, Prediction) else None
    write(content | {"problems": problems_as_dicts(problems)}, drawn, config)
    return PROBLEMS_EXIT_CODE if problems else 0


def search_layouts(name: str, run: PlannedRun, config: PlanConfig) -> int:
    """Print and write the best layouts and the plan of the first; returns the exit code."""
    budget_bytes = config.memory_budget_bytes()
    result = search(
        run.shape, run.gpus, run.device, run.training, run.rollout, space=config.search_space(), memory_bytes=budget_bytes,
        ranked=config.best, host_memory_gib=run.host_memory_gib, limit_seconds=config.search_seconds,
        progress=show_progress if sys.stderr.isatty() else None,
    )  # fmt: skip
    found = [replace(one, steps=run.steps) for one, _ in result.ranked]
    best = [Prediction.of(one, budget_bytes) for one in found]
    commands = [command_of(name, one) for one in found]
    console = make_console()
    if best:
        show(best[0], [], console)
    show_search(result, best, commands, console)
    rows = [{"plan_command": command, **prediction.as_dict()} for command, prediction in zip(commands, best, strict=True)]
    rejected = [
        {
            "setting": group.cause,
            "count": group.count,
            "nearest_layout": group.nearest.layout,
            "reason": group.nearest.reason,
            "need_bytes": group.nearest.need_bytes,
            "host_shortage_bytes": group.nearest.host_shortage_bytes,
        }
        for group in result.groups()
    ]
    content = {
        "best": rows,
        "rejected": rejected,
        "ways_out": [str(way) for way in result.ways_out()],
        "search_seconds": result.seconds,
        "search_budget_bytes": result.budget_bytes,
        "held_fixed": [{"flag": flag, "value": text} for flag, text in result.held.items()],
        "predicted_count": result.evaluated_count,
        "outpaced_count": result.outpaced_count,
        "open_count": result.open_count,
        "open_at_least_seconds": result.open_at_least_seconds,
    }
    write(content, best[0] if best else None, config)
    return 0 if best else PROBLEMS_EXIT_CODE


def problems_as_dicts(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    return [
        {"setting": one.setting, "value": one.value, "nearest": one.nearest, "instead": dict(one.instead), "message": str(one)}
        for one in problems
    ]


@contextmanager
def output_files(config: PlanConfig) -> Iterator[None]:
    """--json and --png exist meanwhile, so that one that can't be written is an error before anything is computed; what stays
    empty is removed."""
    files = {"json": config.json, "png": config.png}
    files = {flag: file for flag, file in files.items() if file is not None}
    try:
        for flag, file in files.items():
            with told_as(flag, file):
                file.open("a").close()
        yield
    finally:
        for file in files.values():
            if file.is_file() and not file.stat().st_size:
                file.unlink()


@contextmanager
def told_as(flag: str, file: Path) -> Iterator[None]:
    """What goes wrong with a file, as a mistake of the flag that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--{flag} {file} can't be written ({error.strerror}): choose another file") from None


def write(content: dict[str, Any], drawn: Prediction | None, config: PlanConfig) -> None:
    """Into the files that were asked for. Where no step was predicted, there is no picture, an earlier one neither."""
    if config.json is not None:
        made_by = {"strop_version": version("strop"), "command": shlex.join(["python", *sys.argv])}
        with told_as("json", config.json):
            config.json.write_text(json.dumps(made_by | content, indent=2) + "\n")
    if config.png is None:
        return
    if drawn is not None:
        draw_prediction(drawn, config.png)
        return
    config.png.unlink()
    show_notes([f"no step was predicted, so there is no picture {config.png}"], make_console())


if __name__ == "__main__":
    main()
