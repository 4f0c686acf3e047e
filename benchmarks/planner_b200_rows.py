"""Published training runs on B200, of which no constant saw any: they were added when all constants had their values."""

from planner_training_row import BRIDGE, BRIDGE_FP8, BRIDGE_PLAN, TrainingRow, planned

MXFP8 = {**BRIDGE_PLAN, "precision": "fp8-blockwise", "weights_dtype_bytes": 1}
"""Blocks of 32 elements, predicted as blocks of 128."""
CONFIGS = "scripts/performance/configs at 97ad8cc"

B200_ROWS: tuple[TrainingRow, ...] = (
    TrainingRow(
        "bridge b200",
        "Llama3-8B fp8, 8 B200",
        planned("llama3-8b", 8, 8192, 128, 2, "b200", cuda_graphs=True, **BRIDGE_FP8),
        30624,
        "tokens_per_second_per_gpu",
        f"{BRIDGE} 25.11; {CONFIGS}",
    ),
    TrainingRow(
        "bridge b200",
        "Llama3.1-405B fp8, 128 B200",
        planned(
            "llama3.1-405b", 128, 8192, 64, 1, "b200", (15, *(16,) * 6, 15), tp=4, cp=2, pp=8, vpp=8, **BRIDGE_FP8
        ),
        661,
        "tokens_per_second_per_gpu",
        f"{BRIDGE} 25.11; {CONFIGS}",
    ),
    TrainingRow(
        "bridge b200",
        "DeepSeek-V3 MXFP8, 256 B200, PP 16, all-to-all 8",
        planned(
            "deepseek-v3", 256, 4096, 2048, 1, "b200", (*(4,) * 15, 1), pp=16, ep=8, dispatcher="alltoall",
            recompute=("mla_up_projection",), **{**MXFP8, "moment_dtype_bytes": 2},
        ),
        2139,
        "tokens_per_second_per_gpu",
        f"{BRIDGE} 25.11; {CONFIGS}",
        mtp=True,
    ),
    TrainingRow(
        "bridge b200",
        "Qwen3-235B-A22B MXFP8, 64 B200, all-to-all 8 overlapped",
        planned(
            "qwen3-235b-a22b", 64, 4096, 1024, 1, "b200", (11, *(12,) * 6, 11), pp=8, vpp=2, ep=8, dispatcher="alltoall",
            overlap_expert=True, **MXFP8,
        ),
        3269,
        "tokens_per_second_per_gpu",
        f"{BRIDGE} 25.11; {CONFIGS}",
        "vpp 2 is the table's; its recipe has 4",
    ),
)  # fmt: skip
