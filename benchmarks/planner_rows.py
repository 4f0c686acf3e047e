"""Published training runs: what `benchmarks/planner.py` compares the planner with, and which of them constants may see.

Every row names where its figure stands and where its recipe does; what neither says is an assumption in its note. Rows of one
publisher and model are a family. **Fitted families were chosen by a rule, before any error was seen**: in the order below every
second family is fitted, beginning with the second, and the others are held out whole, so no held-out row has a sibling that was
fitted. Constants of engine.plan that say "fitted" saw the fitted families alone. Runs on B200 came last and are all held out.
"""

from planner_b200_rows import B200_ROWS
from planner_dense_rows import DENSE_ROWS
from planner_moe_rows import MOE_ROWS
from planner_training_row import TrainingRow

ROWS: tuple[TrainingRow, ...] = (*DENSE_ROWS, *MOE_ROWS, *B200_ROWS)
FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(row.family for row in (*DENSE_ROWS, *MOE_ROWS)))
FITTED_FAMILIES: frozenset[str] = frozenset(FAMILIES[1::2])

LEFT_OUT: tuple[tuple[str, str], ...] = (
    (
        "Qwen3-235B long context, natural routing (ModelZoo: 237 / 277 / 320 / 357 TFLOPS)",
        "how uneven the routing was isn't published",
    ),
    ("Qwen3-235B with CUDA graphs, 320 TFLOPS (ModelZoo script)", "a comment in a script, not a table"),
    ("Mixtral 8x22B 445 / 465 / 560 TFLOPS (ModelZoo script)", "comments in a script, not a table"),
    ("Mixtral 8x22B and Qwen2-57B unfolded, and FSDP + EP (arXiv 2504.14960)", "layouts of those runs not found"),
    ("GPT-OSS-120B, batch 512, micro-batch 4 (Megatron-Bridge 25.11)", "its accumulation count contradicts batch and layout"),
    ("GPT-OSS-120B (AutoModel)", "its expert-parallel degree isn't published"),
    (
        "Qwen3-30B-A3B PP 2 (Megatron-Bridge 25.09-26.02.01: 5,113 to 10,494 tokens/s)",
        "one layout, a factor of two between containers",
    ),
    ("Qwen3-30B-A3B and 235B with token dropping (Megatron-Bridge 25.09)", "tokens dropped: not the same work"),
    ("Megatron-LM README, GPT 2B-462B and 175B", "layouts not published; GELU MLPs"),
    ("prime-rl RL trainer rows", "step time and throughput contradict each other: fake batches are only partly filled"),
    ("Nemotron, Qwen3-Next", "state-space and gated-delta layers: no ModelShape"),
    ("GB200, GB300 and B300 (Megatron-Bridge)", "no device of that name"),
    ("all LoRA rows", "the planner has no LoRA"),
)
