"""How fast the rollout engine generates, and how far that is from the matrix products alone.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py          two minutes; --model takes what launch/grpo.py takes

Each line: a batch of groups of 8, every response at full length (end tokens are switched off). "step" is a whole decode step,
sampling and bookkeeping included; "products" the same step's matrix products with nothing around them, timed in turn with
it; "sampling" the part after the logits. Writes the table (JSON and Markdown) to benchmarks/results/.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import write_results
from transformers import AutoTokenizer

from strop.engine.batch import Prompt
from strop.engine.model.checkpoint import load_hf_folder
from strop.engine.model.context import ForwardContext
from strop.engine.model.sources import resolve_model
from strop.engine.model.transformer import Transformer
from strop.engine.model.weights import ModelWeights
from strop.engine.protocols import Sampling
from strop.engine.rollout.engine import EngineConfig, InProcessEngine
from strop.engine.rollout.sampling import SamplingRows, sample

GROUP = 8
WORKLOADS = ((32, 16), (32, 64), (64, 16), (64, 64))
"""(responses, tokens of each)."""


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def products(model: Transformer, rows: int) -> Callable[[], None]:
    """Every matrix product of a decode step of `rows` rows, in the model's order."""
    weights = [weight for weight in model.parameters() if weight.dim() == 2]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1], dtype=weight.dtype) for weight in weights}

    @torch.inference_mode()
    def run() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return run


def measure(engine: InProcessEngine, model: Transformer, rows: int, length: int) -> dict[str, float]:
    prompts = [Prompt(id=f"q{i}", source="benchmark", text=f"What is {i} + {i * 7 % 10}?") for i in range(rows // GROUP)]
    sampling = Sampling(n=GROUP, max_new_tokens=length)
    whole = min(seconds(lambda: engine.generate(prompts, sampling)) for _ in range(2))
    for prompt in prompts:
        engine.submit(prompt, sampling)
    engine.step()  # the prompts
    bare, steps, gemms = products(model, rows), [], []
    for _ in range(length - 2):
        steps.append(seconds(engine.step))
        gemms.append(seconds(bare))
    engine.abort()
    logits, scratch = torch.randn(rows, model.config.vocab_size), torch.empty(rows, model.config.vocab_size)
    how = SamplingRows.of([sampling] * rows, range(rows), torch.device("cpu"))
    draws = [seconds(lambda: sample(logits, how, torch.zeros(rows, dtype=torch.int64), scratch)) for _ in range(9)]
    step, gemm, draw = (statistics.median(times) * 1e3 for times in (steps, gemms, draws))
    speed = {"tokens/s": rows * length / whole}
    return speed | {"step ms": step, "products ms": gemm, "step/products": step / gemm, "sampling ms": draw}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    folder = resolve_model(parser.parse_args().model)
    model, tokenizer = load_hf_folder(folder, torch.float32, "cpu"), AutoTokenizer.from_pretrained(folder)

    def encode(prompt: Prompt) -> list[int]:
        turns = [{"role": "user", "content": prompt.text}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

    @torch.no_grad()
    def probe(tokens: torch.Tensor) -> torch.Tensor:
        hidden = model(tokens, ForwardContext.one_sequence(len(tokens)))
        return F.linear(hidden[:-1], model.lm_head_weight).log_softmax(1).gather(1, tokens[1:, None]).squeeze(1)

    engine = InProcessEngine(model.config, tokenizer, encode, EngineConfig(), "cpu", torch.float32, probe)
    engine._end_ids = frozenset()
    engine.bind_weights(ModelWeights(model))
    sync = engine.sync_weights(0)
    results = {f"{rows} x {length}": measure(engine, model, rows, length) for rows, length in WORKLOADS}
    columns = list(next(iter(results.values())))
    lines = [f"| responses x tokens | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[c]:.4g}' for c in columns)} |" for name, row in results.items()]
    lines.append(f"\nThreads: {torch.get_num_threads()}. Weight swap with its proof: {sync.seconds:.2f} s, 0 bytes moved.")
    table = "\n".join(lines)
    print(table)
    print(write_results("rollout", f"Rollout engine, {folder.name}", table, {"workloads": results, "sync": vars(sync)}))


if __name__ == "__main__":
    main()
