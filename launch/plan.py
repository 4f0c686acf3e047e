"""What a run on a cluster will need and take, before any GPU is taken: memory, step time, mistakes of the layout.

    python launch/plan.py qwen3-30b-a3b --gpus 16 --layout.ep 16             one layout: memory, seconds, bytes, problems
    python launch/plan.py deepseek-v3 --gpus 2048 --device h800 --search     all layouts, ranked
    python launch/plan.py path/to/config.json --gpus 8 --grpo --json plan.json --png plan.png

Nothing here needs a GPU, torch or another process. Exit code 0: the run works; 1: it doesn't, and the plan says why.
"""

try:
    from strop.launch.command_line import parse
except ImportError as missing:
    raise SystemExit(f"{missing}: install strop first, pip install -e '.[train]' in the repository (see README.md)") from None

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from strop.engine.config import GIB, InputError
from strop.engine.plan.drawing import draw_prediction
from strop.engine.plan.facts import total_parameters
from strop.engine.plan.models import SHAPES
from strop.engine.plan.report import Prediction
from strop.engine.plan.run import PlannedRun
from strop.engine.plan.search import search
from strop.engine.run.failure import FailureReport
from strop.launch.plan_table import make_console, short, show, show_search
from strop.launch.planned import PROBLEMS_EXIT_CODE, PlanConfig, shape_of_model, show_plan

PATHS = "A config.json or the Hugging Face folder with it"


def main() -> None:
    with FailureReport():
        models = {name: (f"{short(total_parameters(shape))} parameters", PlanConfig()) for name, shape in SHAPES.items()}
        models |= {"tiny": ("the GRPO preset's model", PlanConfig())}
        models |= {path: ("the model of this path", PlanConfig()) for path in sys.argv[1:2] if Path(path).exists()}
        name, config = parse(models, "Plan a run on a cluster. No GPU is needed.", or_path=PATHS)
        run = config.run(shape_of_model(name))
        sys.exit(search_layouts(run, config) if config.search else check_layout(run, config))


def check_layout(run: PlannedRun, config: PlanConfig) -> int:
    """Print and write the plan of one layout; returns the exit code."""
    prediction, problems = show_plan(run)
    content = {} if prediction is None else prediction.as_dict()
    write(content | {"problems": [str(problem) for problem in problems]}, prediction, config)
    return PROBLEMS_EXIT_CODE if problems else 0


def search_layouts(run: PlannedRun, config: PlanConfig) -> int:
    """Print and write the best layouts and the plan of the first; returns the exit code."""
    budget_bytes = None if config.memory_budget_gib is None else config.memory_budget_gib * GIB
    result = search(
        run.shape, run.gpus, run.device, run.training, run.rollout, space=config.space, memory_bytes=budget_bytes,
        ranked=config.best,
    )  # fmt: skip
    best = [Prediction.of(replace(found, steps=run.steps)) for found, _ in result.ranked[: config.best]]
    console = make_console()
    if best:
        show(best[0], [], console)
    show_search(result, best, console)
    reasons = [{"reason": reason, "count": count} for reason, count in result.reasons()]
    content = {"best": [prediction.as_dict() for prediction in best], "rejected": reasons, "search_seconds": result.seconds}
    write(content, best[0] if best else None, config)
    return 0 if best else PROBLEMS_EXIT_CODE


def write(content: dict[str, Any], drawn: Prediction | None, config: PlanConfig) -> None:
    if config.json is not None:
        try:
            config.json.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"--json {config.json} can't be written ({error.strerror}): choose another file") from None
    if config.png is not None and drawn is not None:
        draw_prediction(drawn, config.png)


if __name__ == "__main__":
    main()
