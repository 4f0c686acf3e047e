"""Ask a model held-out questions and report pass@1 over k samples, pass@k and cons@k, as the R1 paper evaluates.

    python launch/evaluate.py smollm2                                   greedy, the model as it comes
    torchrun --nproc-per-node 2 launch/evaluate.py smollm2 --model runs/NAME/model --eval.samples 16 \\
        --eval.temperature 0.6 --eval.top-p 0.95 --eval.pass-at 4 16    the model that a run left behind
"""

try:
    from strop.launch.command_line import parse
except ImportError as missing:
    raise SystemExit(f"{missing}: install strop first, pip install -e '.[train]' in the repository (see README.md)") from None

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from strop.engine.config import InputError
from strop.engine.data.prompts import load_prompts
from strop.engine.evaluate.benchmark import Record, summarize
from strop.engine.parallel.mesh import Mesh
from strop.engine.reward.rules import Rewards, lenient
from strop.engine.run.failure import FailureReport
from strop.engine.train.objective import sequence_logprobs
from strop.launch.assembly import Policy, ask_everyone
from strop.launch.planned import plan_evaluation
from strop.launch.presets import EVALUATE_PRESETS, EvaluateConfig


def main() -> None:
    with FailureReport():
        preset, config = parse(
            EVALUATE_PRESETS, "Evaluate a language model on questions with verified answers.", plan=plan_evaluation
        )
        mesh = Mesh.start(config.layout, config.device)
        if config.report is not None and mesh.rank == 0:
            make_report_folder(config.report)
        records = evaluate(config, mesh)
        if mesh.rank == 0:
            summary = summarize(records, config.eval)
            show(preset, config, summary)
            if config.report is not None:
                write_report(config.report, summary, records)
        mesh.close()


def evaluate(config: EvaluateConfig, mesh: Mesh) -> list[Record]:
    policy = Policy.load(config.model, config.precision, mesh.device)
    sets = load_prompts(config.data, config.seed)
    prompts = sets.held_out if config.split == "held-out" else sets.train + sets.held_out
    if not prompts:
        raise InputError("--data.held-out-fraction 0 leaves no held-out question: raise it, or ask for --split all")
    engine = policy.engine(config.rollout, config.data.template, lambda tokens: sequence_logprobs(policy.model, tokens))
    engine.sync_weights(0)
    with Rewards(lenient(config.reward) if config.lenient else config.reward, seed=config.seed) as rewards:
        rewards.check(prompts)
        return ask_everyone(engine, rewards, prompts, config.eval, mesh, config.seed)


def show(preset: str, config: EvaluateConfig, summary: Mapping[str, float]) -> None:
    table = Table(title=f"{config.model} on {config.split} questions of {preset}", show_header=False, title_justify="left")
    for name, value in summary.items():
        table.add_row(name, f"{value:d}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)


def make_report_folder(folder: Path) -> None:
    """Before anything is asked, so that a folder that can't be written costs nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").touch()
    except OSError as error:
        raise InputError(f"--report {folder} can't be written ({error.strerror}): choose another folder") from None


def write_report(folder: Path, summary: Mapping[str, float], records: Sequence[Record]) -> None:
    """report.json: the summary; answers.jsonl: a line a question, with null for an accuracy that no scorer could judge."""
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (folder / "answers.jsonl").open("w") as file:
        for record in records:
            judged = [value if math.isfinite(value) else None for value in record.accuracy]
            file.write(json.dumps(dataclasses.asdict(record) | {"accuracy": judged}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
