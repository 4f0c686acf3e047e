"""Does GRPO teach SmolLM2 to add, or only to be brief? The true reward against two controls of equal length.

    python benchmarks/grpo_learning.py --runs DIR           nine runs, about five minutes each on two cores

true: 1 for the right number, then the end. format: 1 for any number, then the end. shuffled: the true rewards of each
rank's batch, paid to the wrong samples. Runs that DIR already holds are kept, so that an interrupted benchmark can go on.
Writes the table (JSON and Markdown) and the plot to benchmarks/results/.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from harness import RESULTS, write_results
from matplotlib.figure import Figure

LAUNCH = Path(__file__).parents[1] / "launch"
CONDITIONS = {"true": (), "format": ("--reward.kind", "format"), "shuffled": ("--reward.shuffle",)}
COLORS = {"true": "#1f5fa8", "format": "#d1661c", "shuffled": "#5b6470"}
MARGIN = 0.15
"""By so much the true reward must beat each control, on the mean over the seeds."""


def torchrun(file: str, *flags: str, ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    subprocess.run([*command, str(LAUNCH / file), "smollm2", *flags], check=True)


def train(folder: Path, seed: int, condition: str, ranks: int) -> list[dict]:
    """The rows of the run's metrics.jsonl; runs it where the folder has no finished run."""
    if not (folder / "model").exists():
        go_on = ["--run.resume"] if any(folder.glob("checkpoints/step-*[0-9]")) else []
        flags = ["--seed", str(seed), "--eval-every", "5", "--run.dir", str(folder), *CONDITIONS[condition], *go_on]
        torchrun("grpo.py", *flags, ranks=ranks)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def base_model(folder: Path, ranks: int) -> dict[str, float]:
    """The model as it comes, greedy: under the training rule at 16 tokens, and at 64 with the last number anywhere."""
    readings = {"base, rule": (), "base, 64 tokens, lenient": ("--eval.max-new-tokens", "64", "--lenient")}
    accuracies = {}
    for name, flags in readings.items():
        report = folder / name.replace(" ", "-").replace(",", "")
        torchrun("evaluate.py", *flags, "--report", str(report), ranks=ranks)
        accuracies[name] = json.loads((report / "report.json").read_text())["pass@1"]
    return accuracies


def draw(curves: dict[str, list[list[dict]]], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for condition, runs in curves.items():
        held_out = np.array([[row["eval/pass@1"] for row in rows if "eval/pass@1" in row] for rows in runs])
        steps = [row["step"] for row in runs[0] if "eval/pass@1" in row]
        lengths = np.array([[row["response/length"] for row in rows if "response/length" in row] for rows in runs])
        for axes, x, values in ((left, steps, held_out), (right, range(1, lengths.shape[1] + 1), lengths)):
            axes.plot(x, values.T, color=COLORS[condition], alpha=0.25, linewidth=1)
            axes.plot(x, values.mean(0), color=COLORS[condition], linewidth=2, label=f"{condition} reward")
    for axes, title, unit in (
        (left, "Held-out accuracy", "fraction right, greedy"), (right, "Response length", "mean length in training (tokens)"),
    ):  # fmt: skip
        axes.set_title(f"{title} (mean and each seed)", loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    curves = {
        condition: [
            train(arguments.runs / f"{condition}-{seed}", seed, condition, arguments.ranks) for seed in arguments.seeds
        ]
        for condition in CONDITIONS
    }
    rows, data = [], {}
    for name, accuracy in base_model(arguments.runs, arguments.ranks).items():
        rows.append(f"| {name} | {accuracy:.3f} | | |")
        data[name] = accuracy
    for condition, runs in curves.items():
        after = [run[-1]["eval/pass@1"] for run in runs]
        length = statistics.mean(run[-1]["eval/mean_length"] for run in runs)
        seconds = statistics.median(sum(row[key] for row in run for key in row if key in PHASES) for run in runs)
        data[condition] = {"accuracy": after, "length": length, "seconds": seconds, "steps": runs[0][-1]["step"]}
        each = ", ".join(f"{value:.2f}" for value in after)
        rows.append(f"| {condition} reward | {statistics.mean(after):.3f} ({each}) | {length:.1f} | {seconds / 60:.1f} |")
    means = {condition: statistics.mean(data[condition]["accuracy"]) for condition in CONDITIONS}
    holds = all(means["true"] - means[control] >= MARGIN for control in ("format", "shuffled"))
    table = "\n".join([
        "| | held-out accuracy, greedy (each seed) | tokens a response | minutes |", "|---|---|---|---|", *rows, "",
        f"True reward beats each control by at least {MARGIN}: **{'yes' if holds else 'no'}**.",
    ])  # fmt: skip
    path = write_results("grpo-learning", "GRPO on one-digit sums: the true reward against its controls", table, data)
    draw(curves, path.with_suffix(".png"))
    print(table, f"\nwritten to {path}")


PHASES = tuple(f"time/{phase}" for phase in ("evaluate", "rollout", "reward", "train", "sync"))

if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    main()
