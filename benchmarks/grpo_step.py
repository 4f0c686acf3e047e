"""Where the time of a GRPO step goes: SmolLM2-135M's shape with random weights, through launch/grpo.py.

    python benchmarks/grpo_step.py [--quick] [--scratch FOLDER] [--out FOLDER]

Nothing is downloaded: the model is drawn, its tokenizer is the tiny model's, the questions are sums. Every response runs to
its full length (random weights hardly ever draw the end token) and a KL term gives every token a gradient and makes the pass
over the reference. One process; bf16 on a GPU, fp32 on a CPU. Writes the table (JSON and Markdown) to --out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import RESULTS, write_results

from strop.engine.model.checkpoint import write_model
from strop.engine.model.config import ModelConfig
from strop.engine.model.sources import make_tiny
from strop.engine.model.transformer import Transformer

LAUNCH = Path(__file__).parents[1] / "launch/grpo.py"
SMOLLM2 = dict(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, max_positions=8192, norm_eps=1e-5, rope_theta=1e5, tie_embeddings=True,
)  # fmt: skip
STEPS, WARM_UP, GROUP = 4, 1, 8
PARTS = {
    "rollout": "time/rollout",
    "reward": "time/reward",
    "log-probs (reference)": "time/train_logprobs",
    "forward + backward": "time/train_gradients",
    "optimizer": "time/train_optimizer",
    "weight sync and its proof": "time/sync",
}
"""Row of the table -> key in metrics.jsonl, seconds of a step."""


def write_random_model(folder: Path) -> None:
    """A Hugging Face folder of the 135M shape; ids beyond the tokenizer's decode to nothing."""
    folder.mkdir(parents=True)
    make_tiny(folder)
    tiny = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()), str(folder))
    config = ModelConfig(**SMOLLM2, eos_ids=tiny.eos_ids, bos_id=tiny.bos_id, pad_id=tiny.pad_id)
    model = Transformer(config, dtype=torch.float32, device="cpu")
    model.init_weights(seed=0)
    write_model(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="where a temporary folder for model and run may take 3 GB")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter responses")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    prompts, length = (16, 128) if torch.cuda.is_available() else (4, 32)
    if arguments.quick:
        prompts, length = prompts // 2, length // 2
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as runs:
        steps = run_steps(Path(runs), prompts, length)
    seconds = {part: statistics.median(step[key] for step in steps) for part, key in PARTS.items()}
    seconds["the rest of training"] = statistics.median(
        step["time/train"] - sum(step[key] for key in PARTS.values() if key.startswith("time/train_")) for step in steps
    )
    whole, samples = sum(seconds.values()), prompts * GROUP
    rows = ["| part | seconds | share |", "|---|---|---|"]
    rows += [f"| {part} | {value:.4g} | {value / whole:.1%} |" for part, value in seconds.items()]
    rows.append(f"| **step** | {whole:.4g} | {samples * length / whole:.0f} response tokens a second |")
    title = f"A GRPO step, 135M shape, {samples} responses of {length} tokens"
    table = "\n".join(rows) + f"\n\nMedian of steps {WARM_UP + 1} to {STEPS}; {precision()}."
    print(table)
    print(write_results("grpo-step", title, table, {"seconds": seconds, "responses": samples, "length": length}, arguments.out))


def precision() -> str:
    return "bf16" if torch.cuda.is_available() else "fp32"


def run_steps(runs: Path, prompts: int, length: int) -> list[dict[str, float]]:
    """The lines of metrics.jsonl after the warm-up."""
    on_gpu = torch.cuda.is_available()
    write_random_model(runs / "model")
    sums = [{"question": f"What is {a} + {b}?", "answer": a + b} for a in range(10) for b in range(10)]
    (runs / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sums))
    flags = {
        "model": runs / "model", "precision": precision(), "data.path": runs / "sums.jsonl",
        "data.held-out-fraction": 0, "rollout.prompts-per-step": prompts, "rollout.group-size": GROUP,
        "rollout.max-new-tokens": length, "rollout.max-batch": 128, "rollout.kv-cache-gib": 4 if on_gpu else 0.5,
        "train.steps": STEPS, "train.microbatch-tokens": 8192 if on_gpu else 1024, "train.lr": 1e-6,
        "train.loss.kl-coef": 1e-3, "run.dir": runs / "run", "run.save-every": STEPS,
    }  # fmt: skip
    command = [sys.executable, str(LAUNCH), "tiny", *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run(command, check=True)
    steps = map(json.loads, (runs / "run/metrics.jsonl").read_text().splitlines())
    return [step for step in steps if step["step"] > WARM_UP]


if __name__ == "__main__":
    main()
