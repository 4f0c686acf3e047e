"""Published training runs of mixtures of experts. `planner_rows` has the order and says which are fitted."""

from dataclasses import replace

from planner_training_row import AUTOMODEL_PLAN, BRIDGE, BRIDGE_FP8, BRIDGE_PLAN, BRIDGE_RECIPES, TrainingRow, planned

from strop.engine.plan.devices import DEVICES
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun
from strop.engine.plan.shape import ModelShape

AUTOMODEL = "Automodel docs/performance-summary.mdx (2025-10)"
ZOO = "Megatron-MoE-ModelZoo best_practice/qwen3/readme.md"
FOLDING = "arXiv 2504.14960, Tables 3-5"
NORM_ACT = ("norms", "activation")
QWEN_235B_STAGES = (11, 12, 12, 12, 12, 12, 12, 11)
"""Embedding and loss take a layer's place each."""


def without_mtp(shape: ModelShape) -> ModelShape:
    return replace(shape, num_mtp_layers=0)


def fake_balanced(shape: ModelShape) -> ModelShape:
    """Routing of AutoModel's benchmarks: a token's experts are top_k consecutive ones, so that it visits one or two GPUs
    (nemo_automodel/components/moe/layers.py, FakeBalancedGate)."""
    moe = shape.moe
    return replace(shape, moe=replace(moe, num_groups=moe.num_experts // moe.top_k, top_groups=1))


KIMI_K2 = replace(
    without_mtp(SHAPES["deepseek-v3"]),
    name="kimi-k2",
    vocab_size=163840,
    num_heads=64,
    num_kv_heads=64,
    moe=replace(SHAPES["deepseek-v3"].moe, num_experts=384, num_groups=1, top_groups=1, num_dense_layers=1),
)
"""moonshotai/Kimi-K2-Base: DeepSeek-V3's architecture with half the heads and half as many experts again."""


def _qwen_30b() -> list[TrainingRow]:
    hybrid = {"ep": 16, "dispatcher": "hybridep", **BRIDGE_PLAN}
    skills = "Megatron-Bridge skills/nemo-mbridge-perf-moe-{}/SKILL.md"
    recipe = f"{BRIDGE_RECIPES}/qwen/h100/qwen3_moe.py"
    graph = "CUDA graphs hold router and preprocessing alone"
    automodel = "examples/llm_benchmark/qwen/qwen3_moe_30b_te_deepep.yaml"

    def bridge(**training) -> PlannedRun:
        return planned("qwen3-30b-a3b", 16, 4096, 1024, **{**hybrid, **training})

    return [
        TrainingRow(
            "bridge qwen3-30b",
            "Qwen3-30B-A3B bf16, 16 GPUs, HybridEP overlapped",
            bridge(overlap_expert=True),
            20.14729,
            "step_seconds",
            f"{skills.format('hardware-configs')}; {recipe}",
            graph,
        ),
        TrainingRow(
            "bridge qwen3-30b",
            "Qwen3-30B-A3B bf16, 16 GPUs, HybridEP",
            bridge(),
            244.039,
            "tflops_per_gpu",
            f"{skills.format('hardware-configs')}; {recipe}",
            graph,
        ),
        TrainingRow(
            "bridge qwen3-30b",
            "Qwen3-30B-A3B bf16, 16 GPUs, all-to-all",
            bridge(dispatcher="alltoall"),
            45.65,
            "step_seconds",
            f"{skills.format('dispatcher-selection')}; {recipe}",
            "five steps; fused permutation was off for a fault of the container",
        ),
        TrainingRow(
            "bridge qwen3-30b",
            "Qwen3-30B-A3B fp8, 16 GPUs, HybridEP",
            bridge(**BRIDGE_FP8),
            8960,
            "tokens_per_second_per_gpu",
            f"{BRIDGE} 26.04.01; {recipe}",
        ),
        TrainingRow(
            "automodel qwen3-30b",
            "Qwen3-30B-A3B bf16, 8 GPUs, FSDP, EP 8",
            planned(fake_balanced(SHAPES["qwen3-30b-a3b"]), 8, 4096, 512, 4, ep=8, **AUTOMODEL_PLAN),
            21.773,
            "step_seconds",
            f"{AUTOMODEL}; {automodel}",
        ),
    ]


def _qwen_235b() -> list[TrainingRow]:
    stages = {"pp": 8, "vpp": 4, "stage_layers": QWEN_235B_STAGES}
    cross_node = {"tp": 2, "ep": 32, **stages, "recompute": NORM_ACT}
    long_context = {"tp": 4, "ep": 8, **stages, "recompute": (*NORM_ACT, "experts")}
    fp8 = {
        "tp": 2,
        "ep": 32,
        **stages,
        "dispatcher": "alltoall",
        "overlap_expert": True,
        "overlap_tensor": False,
        **BRIDGE_FP8,
    }
    recipe = f"{BRIDGE_RECIPES}/qwen/h100/qwen3_moe.py"

    def zoo(name: str, seconds: float, note: str = "", micro_batch: int = 1, **settings) -> TrainingRow:
        run = planned("qwen3-235b-a22b", 256, 4096, 2048, micro_batch, logits="in-place", **settings)
        return TrainingRow("zoo qwen3-235b", f"Qwen3-235B-A22B bf16, 256 GPUs, {name}", run, seconds, "step_seconds", ZOO, note)

    thirty_two = (2, *(3,) * 30, 2)
    rows = [
        zoo("DeepEP 32", 19.7, **cross_node),
        zoo("DeepEP 32 overlapped", 17.6, **cross_node, overlap_expert=True),
        zoo(
            "FSDP, EP 8",
            17.6,
            micro_batch=4,
            tp=2,
            ep=8,
            fsdp=True,
            recompute=("layer",),
            gradient_dtype_bytes=2,
            note="gradients assumed bf16: fp32 ones would take longer than the step on the network alone",
        ),
        zoo(
            "PP 32, all-to-all 8",
            24.2,
            tp=2,
            pp=32,
            vpp=3,
            ep=8,
            stage_layers=thirty_two,
            recompute=NORM_ACT,
            dispatcher="alltoall",
        ),
        zoo("TP 4, DeepEP 8", 29.0, tp=4, ep=8, **stages),
    ]
    for sequence, cp, tflops in ((16384, 1, 295), (32768, 2, 335), (65536, 4, 368), (131072, 8, 389)):
        run = planned("qwen3-235b-a22b", 256, sequence, 256, cp=cp, logits="in-place", **long_context)
        rows.append(
            TrainingRow(
                "zoo qwen3-235b long",
                f"Qwen3-235B-A22B bf16, 256 GPUs, seq {sequence // 1024}k",
                run,
                tflops,
                "tflops_per_gpu",
                ZOO,
                "forced balance",
            )
        )
    for batch, tokens, version in ((2048, 1575, "25.11"), (8192, 1712, "26.04.01")):
        rows.append(
            TrainingRow(
                "bridge qwen3-235b",
                f"Qwen3-235B-A22B fp8, 256 GPUs, batch {batch}",
                planned("qwen3-235b-a22b", 256, 4096, batch, **fp8),
                tokens,
                "tokens_per_second_per_gpu",
                f"{BRIDGE} {version}; {recipe}",
            )
        )
    return rows


def _deepseek() -> list[TrainingRow]:
    shape = SHAPES["deepseek-v3"]
    bridge = {
        "tp": 2,
        "pp": 8,
        "vpp": 4,
        "ep": 64,
        "stage_layers": (7, 8, 8, 8, 8, 8, 8, 6),
        "overlap_expert": True,
        "overlap_tensor": False,
        "overlap_data": False,
        "recompute": ("mla_up_projection", "dense_mlp"),
        "moment_dtype_bytes": 2,
        **BRIDGE_PLAN,
    }
    automodel = {"pp": 4, "vpp": 8, "ep": 64, **AUTOMODEL_PLAN}
    script = "scripts/performance/run_script.py at fa0315a"
    config = "examples/benchmark/configs/deepseek_v3_te_deepep.yaml at 89e3a9f"
    kimi = "examples/benchmark/configs/kimi_k2_te_deepep.yaml at 89e3a9f"
    h800 = planned(
        shape,
        2048,
        4096,
        15360,
        device="h800",
        pp=16,
        schedule="dualpipe",
        ep=64,
        precision="fp8-blockwise",
        stage_layers=(*(4,) * 15, 1),
        moment_dtype_bytes=2,
        overlap_expert=True,
        overlap_data=False,
        dispatch_dtype_bytes=1,
        logits="materialized",
        recompute=("norms", "activation", "mla_up_projection"),
    )
    return [
        TrainingRow(
            "bridge deepseek-v3",
            "DeepSeek-V3 fp8, 1024 GPUs, DeepEP overlapped",
            planned(shape, 1024, 4096, 8192, **{**bridge, **BRIDGE_FP8}),
            338,
            "tflops_per_gpu",
            f"{BRIDGE} 25.09; {script}",
            "1,297 tokens/s a GPU",
            mtp=True,
        ),
        TrainingRow(
            "bridge deepseek-v3",
            "DeepSeek-V3 fp8 blockwise, 1024 GPUs, DeepEP overlapped",
            planned(shape, 1024, 4096, 8192, precision="fp8-blockwise", **bridge),
            330,
            "tflops_per_gpu",
            f"{BRIDGE} 25.09; {script}",
            mtp=True,
        ),
        TrainingRow(
            "automodel deepseek-v3",
            "DeepSeek-V3 bf16, 256 GPUs, FSDP, PP 4",
            planned(fake_balanced(without_mtp(shape)), 256, 4096, 512, **automodel),
            8.18,
            "step_seconds",
            f"{AUTOMODEL}; {config}",
        ),
        TrainingRow(
            "automodel deepseek-v3",
            "DeepSeek-V3 bf16, 1024 GPUs, FSDP, PP 4",
            planned(fake_balanced(without_mtp(shape)), 1024, 4096, 2048, **automodel),
            37.87 / 4,
            "step_seconds",
            f"{AUTOMODEL}; {config}",
            "one of 4 rounds: the pipeline is emptied every 8 micro-batches (LBS 8, GA 4)",
        ),
        TrainingRow(
            "deepseek deepseek-v3",
            "DeepSeek-V3 fp8, 2048 H800, DualPipe",
            h800,
            19.926,
            "step_seconds",
            "arXiv 2505.09343, Table 4; arXiv 2412.19437, section 3",
            "assumed: the last stage has one layer beside MTP and heads, every other four; balanced routing; nothing hides the "
            "exchange of gradients and weights",
        ),
        TrainingRow(
            "automodel kimi-k2",
            "Kimi-K2 bf16, 256 GPUs, FSDP, PP 8",
            planned(fake_balanced(KIMI_K2), 256, 4096, 256, pp=8, vpp=4, ep=32, **AUTOMODEL_PLAN),
            8.86 / 2,
            "step_seconds",
            f"{AUTOMODEL}; {kimi}",
            "one of 2 rounds (LBS 8, GA 2)",
        ),
    ]


def _other_moe() -> list[TrainingRow]:
    def folded(shape: str, gpus: int, batch: int, mfu: float, family: str, note: str, **layout) -> TrainingRow:
        run = planned(shape, gpus, 4096, batch, tp=2, dispatcher="alltoall", logits="materialized", **layout)
        return TrainingRow(
            family,
            f"{shape} bf16, {gpus} GPUs, folded",
            run,
            mfu * DEVICES["h100"].bf16_flops_per_second / 1e12,
            "tflops_per_gpu",
            FOLDING,
            note,
            causal=False,
        )

    assumed = "assumed: vpp 7, NCCL all-to-all, FLOPs of the whole attention matrix (Megatron's until 2025-03)"
    return [
        TrainingRow(
            "bridge gpt-oss-120b",
            "GPT-OSS-120B bf16, 64 GPUs, PP 4",
            planned("gpt-oss-120b", 64, 4096, 1280, pp=4, ep=8, recompute=NORM_ACT, dispatcher="alltoall", **BRIDGE_PLAN),
            5824,
            "tokens_per_second_per_gpu",
            f"{BRIDGE} 26.04.01; {BRIDGE_RECIPES}/gpt_oss/h100/gpt_oss.py",
        ),
        TrainingRow(
            "automodel gpt-oss-20b",
            "GPT-OSS-20B bf16, 8 GPUs, FSDP, EP 8",
            planned(fake_balanced(SHAPES["gpt-oss-20b"]), 8, 4096, 256, 2, ep=8, **AUTOMODEL_PLAN),
            10.04,
            "step_seconds",
            f"{AUTOMODEL}; examples/benchmark/configs/gptoss_20b_te_deepep.yaml at 89e3a9f",
            "FlexAttention",
        ),
        *(
            folded("mixtral-8x22b", gpus, 1024, mfu, "folding mixtral-8x22b", assumed, pp=8, vpp=7, ep=8)
            for gpus, mfu in ((128, 0.522), (256, 0.507), (512, 0.489), (1024, 0.449))
        ),
        folded("qwen2-57b-a14b", 64, 256, 0.390, "folding qwen2-57b", f"{assumed}; batch 256", pp=4, vpp=7, ep=4),
    ]


MOE_ROWS = (*_qwen_30b(), *_qwen_235b(), *_deepseek(), *_other_moe())
