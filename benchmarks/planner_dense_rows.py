"""Published training runs of dense models. `planner_rows` has the order and says which are fitted."""

from planner_training_row import AUTOMODEL_PLAN, BRIDGE, BRIDGE_FP8, BRIDGE_RECIPES, TrainingRow, planned

from strop.engine.plan.run import PlannedRun

TITAN = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
ASYNC_TP = "torchtitan benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md"
LLAMA3 = "arXiv 2407.21783, Table 4"
LLAMA_405B_STAGES = (15, 16, 16, 16, 16, 16, 16, 15)
"""Embedding and loss take a layer's place each."""
TITAN_PLAN = {"fsdp": True, "weights_dtype_bytes": 4, "logits": "eager", "attention_kernel": "flash2"}
"""fp32 shards, torch's scaled_dot_product_attention and cross entropy."""
TITAN_8B = {**TITAN_PLAN, "recompute": ("every_second_product",)}
TITAN_FULL = {**TITAN_PLAN, "recompute": ("layer",)}
META_H100 = "h100-96gb-500w"
OP_AC = "train_configs/llama3_8b.toml: selective checkpointing of every second product"


def _bridge_dense() -> list[TrainingRow]:
    recipe_8b = planned(
        "llama3-8b",
        8,
        8192,
        128,
        fsdp=True,
        recompute=("layer",),
        recompute_layers=5,
        **BRIDGE_FP8,
    )
    fp8_70b = {"tp": 4, "vpp": 5, **BRIDGE_FP8}
    fp8_405b = {
        "tp": 8,
        "cp": 2,
        "pp": 8,
        "vpp": 8,
        "stage_layers": LLAMA_405B_STAGES,
        **BRIDGE_FP8,
    }
    llama = f"{BRIDGE_RECIPES}/llama/h100"
    return [
        TrainingRow(
            "bridge llama3-8b",
            "Llama3-8B fp8, 8 GPUs, FSDP",
            recipe_8b,
            14451,
            "tokens_per_second_per_gpu",
            f"{BRIDGE} 25.11; {llama}/llama3.py",
            "5 of 32 layers recomputed",
        ),
        TrainingRow(
            "bridge llama3-70b",
            "Llama3-70B fp8, 64 GPUs, batch 128",
            planned("llama3-70b", 64, 8192, 128, pp=8, **fp8_70b),
            1602,
            "tokens_per_second_per_gpu",
            f"{BRIDGE} 25.11; {llama}/llama3.py",
        ),
        TrainingRow(
            "bridge llama3-70b",
            "Llama3-70B fp8, 64 GPUs, batch 256",
            planned("llama3-70b", 64, 8192, 256, pp=8, stage_layers=(10, 10, 10, 11, 10, 10, 10, 9), **fp8_70b),
            1664,
            "tokens_per_second_per_gpu",
            f"{BRIDGE} 26.04.01; {llama}/llama3.py",
        ),
        TrainingRow(
            "bridge llama3-70b",
            "Llama3-70B fp8 SFT, 32 GPUs, seq 4k",
            planned("llama3-70b", 32, 4096, 32, pp=4, **fp8_70b),
            1638,
            "tokens_per_second_per_gpu",
            f"{BRIDGE} 26.06; {llama}/llama3.py",
        ),
        TrainingRow(
            "bridge llama3.1-405b",
            "Llama3.1-405B fp8, 1024 GPUs, batch 512",
            planned("llama3.1-405b", 1024, 8192, 512, **fp8_405b),
            292,
            "tokens_per_second_per_gpu",
            f"{BRIDGE} 25.11; {llama}/llama31.py",
        ),
        TrainingRow(
            "bridge llama3.1-405b",
            "Llama3.1-405B fp8, 1024 GPUs, batch 1536",
            planned("llama3.1-405b", 1024, 8192, 1536, **fp8_405b),
            328,
            "tokens_per_second_per_gpu",
            f"{BRIDGE} 26.04.01; {llama}/llama31.py",
        ),
    ]


def _llama3_paper() -> list[TrainingRow]:
    layers = (7, *(8,) * 14, 7)
    note = "assumed: vpp 8, no recomputation, FlashAttention 2, tensor-parallel traffic not overlapped, causal FLOPs"
    shared = {
        "tp": 8,
        "pp": 16,
        "vpp": 8,
        "stage_layers": layers,
        "overlap_tensor": False,
        "attention_kernel": "flash2",
        "logits": "materialized",
    }
    cases = ((8192, 8192, 2048, 1, 430), (16384, 8192, 2048, 1, 400), (16384, 131072, 128, 16, 380))
    return [
        TrainingRow(
            "meta llama3.1-405b",
            f"Llama3.1-405B bf16, {gpus} GPUs, seq {sequence // 1024}k",
            planned("llama3.1-405b", gpus, sequence, batch, cp=cp, **shared),
            tflops,
            "tflops_per_gpu",
            LLAMA3,
            note,
        )
        for gpus, sequence, batch, cp, tflops in cases
    ]


def _titan() -> list[TrainingRow]:
    def row(family: str, name: str, run: PlannedRun, value: float, source: str = TITAN, note: str = "") -> TrainingRow:
        return TrainingRow(f"titan {family}", name, run, value, "tokens_per_second_per_gpu", source, note)

    def fsdp_8b(gpus: int, device: str = META_H100, **training) -> PlannedRun:
        return planned("llama3-8b", gpus, 8192, 2 * gpus, 2, device, **TITAN_8B, **training)

    def tp_8b(**training) -> PlannedRun:
        return planned("llama3-8b", 64, 8192, 96, 12, META_H100, tp=8, **TITAN_8B, **training)

    def tp_70b(**training) -> PlannedRun:
        return planned("llama3-70b", 256, 8192, 512, 16, META_H100, tp=8, **TITAN_FULL, **training)

    def pp_405b(vpp: int) -> PlannedRun:
        return planned(
            "llama3.1-405b", 512, 8192, 256, 4, META_H100, tp=8, pp=8, vpp=vpp, precision="fp8-tensorwise", **TITAN_FULL
        )

    def long_8b(sequence: int, cp: int) -> PlannedRun:
        return planned("llama3-8b", 8, sequence, 8 // cp, 1, META_H100, cp=cp, precision="fp8-tensorwise", **TITAN_FULL)

    fp8 = {"precision": "fp8-tensorwise"}
    chunks = "micro-batches = pipeline ranks (the default of that commit); interleaved: 2 chunks a rank assumed"
    return [
        row("8b fsdp", "Llama3.1-8B bf16 eager, 8 GPUs, FSDP", fsdp_8b(8, compiled=False), 5762, note=OP_AC),
        row("8b fsdp", "Llama3.1-8B bf16 compiled, 8 GPUs, FSDP", fsdp_8b(8), 6667, note=OP_AC),
        row("8b fsdp", "Llama3.1-8B fp8 compiled, 8 GPUs, FSDP", fsdp_8b(8, **fp8), 8532, note=OP_AC),
        row("8b fsdp", "Llama3.1-8B bf16 compiled, 128 GPUs, FSDP", fsdp_8b(128), 6514, note=OP_AC),
        row("8b tp", "Llama3.1-8B bf16, 64 GPUs, TP 8", tp_8b(overlap_tensor=False), 4378, ASYNC_TP, OP_AC),
        row("8b tp", "Llama3.1-8B bf16, 64 GPUs, async TP 8", tp_8b(), 4809.4, ASYNC_TP, OP_AC),
        row("8b tp", "Llama3.1-8B fp8, 64 GPUs, TP 8", tp_8b(overlap_tensor=False, **fp8), 5078.1, ASYNC_TP, OP_AC),
        row("70b tp", "Llama3.1-70B bf16, 256 GPUs, TP 8", tp_70b(overlap_tensor=False), 597.3, ASYNC_TP),
        row("70b tp", "Llama3.1-70B bf16, 256 GPUs, async TP 8", tp_70b(), 652.4, ASYNC_TP),
        row("70b tp", "Llama3.1-70B fp8, 256 GPUs, TP 8", tp_70b(overlap_tensor=False, **fp8), 829, note="809.8 in 2025-06"),
        row("70b tp", "Llama3.1-70B fp8, 256 GPUs, async TP 8", tp_70b(**fp8), 876, note="942.4 in 2025-06"),
        row("405b", "Llama3.1-405B fp8, 512 GPUs, 1F1B", pp_405b(1), 100, note=chunks),
        row("405b", "Llama3.1-405B fp8, 512 GPUs, interleaved", pp_405b(2), 128, note=chunks),
        row("8b long", "Llama3.1-8B fp8, 8 GPUs, seq 32k", long_8b(32768, 1), 3890),
        row("8b long", "Llama3.1-8B fp8, 8 GPUs, seq 64k, CP 2", long_8b(65536, 2), 2540),
        row("8b long", "Llama3.1-8B fp8, 8 GPUs, seq 128k, CP 4", long_8b(131072, 4), 1071),
        row("8b long", "Llama3.1-8B fp8, 8 GPUs, seq 256k, CP 8", long_8b(262144, 8), 548),
        row(
            "8b h200",
            "Llama3.1-8B fp8, 32 H200, FSDP",
            fsdp_8b(32, "h200", **fp8),
            10938,
            "torchtitan benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md",
            OP_AC,
        ),
    ]


def _other_dense() -> list[TrainingRow]:
    prime = "prime-rl benchmarks/baselines/benchmark-{}.json (2026-01)"
    cfg_70b = "examples/llm_benchmark/llama3_3/custom_llama3_1_70b_pretrain_benchmark_8nodes.yaml"
    sft = {"fsdp": True, "weights_dtype_bytes": 4, "logits": "eager", "recompute": ("layer",)}
    return [
        TrainingRow(
            "automodel llama3-70b",
            "Llama3-70B bf16, 64 GPUs, FSDP, CP 2",
            planned(
                "llama3-70b", 64, 8192, 128, cp=2, attention_kernel="flash2", **{**AUTOMODEL_PLAN, "moment_dtype_bytes": 4}
            ),
            18.90,
            "step_seconds",
            f"Automodel docs/performance-summary.mdx (2026-04); {cfg_70b}",
        ),
        TrainingRow(
            "prime-rl sft",
            "Qwen3-0.6B bf16 SFT, 1 GPU, seq 16k",
            planned("qwen3-0.6b", 1, 16384, 2, **sft),
            1.282,
            "step_seconds",
            prime.format("1xh100-Qwen--Qwen3-0.6B-sft-full"),
        ),
        TrainingRow(
            "prime-rl sft",
            "Qwen3-4B bf16 SFT, 8 GPUs, seq 16k",
            planned("qwen3-4b", 8, 16384, 16, attention_kernel="flash2", **sft),
            5.015,
            "step_seconds",
            prime.format("8xh100-Qwen--Qwen3-4B-Instruct-2507-sft-full"),
            "FlashAttention 2",
        ),
    ]


DENSE_ROWS = (*_bridge_dense(), *_llama3_paper(), *_titan(), *_other_dense())
