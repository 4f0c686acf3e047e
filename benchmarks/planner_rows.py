"""Published training runs as `PlannedRun`s: what `benchmarks/planner.py` compares the planner with.

Every row names where its figure stands and where its recipe does; what neither says is an assumption in `note`. Rows of one
publisher and model are a family. **Fitted families were chosen by a rule, before any error was seen**: in the order below every
second family is fitted, beginning with the second, and the others are held out whole, so no held-out row has a sibling that was
fitted. Constants of engine.plan that say "fitted" saw the fitted families alone.
"""

from dataclasses import dataclass, replace
from typing import Literal

from strop.engine.config import Layout
from strop.engine.plan.devices import DEVICES
from strop.engine.plan.facts import train_flops_per_token
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.shape import ModelShape

Unit = Literal["tokens_per_second_per_gpu", "step_seconds", "tflops_per_gpu"]
BRIDGE = "Megatron-Bridge docs/performance-summary-archive.md"
BRIDGE_RECIPES = "src/megatron/bridge/perf_recipes"
AUTOMODEL = "Automodel docs/performance-summary.mdx (2025-10)"
ZOO = "Megatron-MoE-ModelZoo best_practice/qwen3/readme.md"
TITAN = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
ASYNC_TP = "torchtitan benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md"
LLAMA3 = "arXiv 2407.21783, Table 4"
FOLDING = "arXiv 2504.14960, Tables 3-5"


@dataclass(frozen=True)
class TrainingRow:
    """One published run of training."""

    family: str
    name: str
    run: PlannedRun
    published: float
    unit: Unit
    """tflops_per_gpu: model FLOPs by the convention of `causal` and `mtp`, without recomputation; an MFU is times 989.4."""
    source: str
    note: str = ""
    """What the source does not say and was assumed, or what is odd."""
    causal: bool = True
    """The publisher counts half of the attention matrix."""
    mtp: bool = False
    """The publisher counts the multi-token-prediction modules."""

    @property
    def published_step_seconds(self) -> float:
        """Seconds of an optimizer step, from whichever figure is published."""
        run = self.run
        if self.unit == "step_seconds":
            return self.published
        if self.unit == "tokens_per_second_per_gpu":
            return run.step_tokens / (run.gpus * self.published)
        flops = train_flops_per_token(run.shape, run.training.sequence_length_tokens, self.causal, self.mtp)
        return run.step_tokens * flops / (run.gpus * self.published * 1e12)


def planned(
    shape: ModelShape | str,
    gpus: int,
    sequence_length_tokens: int,
    global_batch_sequences: int,
    micro_batch_sequences: int = 1,
    device: str = "h100",
    stage_layers: tuple[int, ...] = (),
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    schedule: str = "",
    ep: int = 1,
    **training,
) -> PlannedRun:
    """A row's run: sequence parallel wherever tp > 1 (every peer's default), interleaved wherever vpp > 1."""
    layout = Layout(
        tp=tp, sp=tp > 1, cp=cp, pp=pp, vpp=vpp, schedule=schedule or ("interleaved" if vpp > 1 else "1f1b"), ep=ep
    )  # fmt: skip
    plan = TrainingPlan(
        sequence_length_tokens=sequence_length_tokens,
        global_batch_sequences=global_batch_sequences,
        micro_batch_sequences=micro_batch_sequences,
        **training,
    )
    return PlannedRun.of(
        SHAPES[shape] if isinstance(shape, str) else shape,
        gpus, device=device, layout=layout, stage_layers=stage_layers, training=plan,
    )  # fmt: skip


def without_mtp(shape: ModelShape) -> ModelShape:
    return replace(shape, num_mtp_layers=0)


def fake_balanced(shape: ModelShape) -> ModelShape:
    """Routing of AutoModel's benchmarks (fake_balanced_gate): a token's experts are top_k consecutive ones, so that it visits one
    or two GPUs (nemo_automodel/components/moe/layers.py, FakeBalancedGate)."""
    moe = shape.moe
    return replace(shape, moe=replace(moe, num_groups=moe.num_experts // moe.top_k, top_groups=1))


KIMI_K2 = replace(
    without_mtp(SHAPES["deepseek-v3"]), name="kimi-k2", vocab_size=163840, num_heads=64, num_kv_heads=64,
    moe=replace(SHAPES["deepseek-v3"].moe, num_experts=384, num_groups=1, top_groups=1, num_dense_layers=1),
)  # fmt: skip
"""moonshotai/Kimi-K2-Base: DeepSeek-V3's architecture with half the heads and half as many experts again."""

# What a publisher's recipes share. Bridge: bf16 gradients (grad_reduce_in_fp32 = False in _benchmark_common).
BRIDGE_PLAN = {"gradient_dtype_bytes": 2, "logits": "in-place"}
TITAN_PLAN = {"fsdp": True, "logits": "eager", "attention_kernel": "flash2"}  # torch's scaled_dot_product_attention
AUTOMODEL_PLAN = {"fsdp": True, "logits": "materialized", "recompute": ("layer",)}
NORM_ACT = ("norms", "activation")
LLAMA_405B_STAGES = (15, 16, 16, 16, 16, 16, 16, 15)  # embedding and loss take a layer's place each
QWEN_235B_STAGES = (11, 12, 12, 12, 12, 12, 12, 11)  # the same
TITAN_8B = {**TITAN_PLAN, "recompute": ("every_second_product",)}
TITAN_FULL = {**TITAN_PLAN, "recompute": ("layer",)}
META_H100 = "h100-96gb-500w"
OP_AC = "train_configs/llama3_8b.toml: selective checkpointing of every second product"


def _bridge_dense() -> list[TrainingRow]:
    recipe_8b = planned("llama3-8b", 8, 8192, 128, fsdp=True, precision="fp8-tensorwise", recompute=("layer",),
                        recompute_layers=5, **BRIDGE_PLAN)  # fmt: skip
    fp8_70b = {"precision": "fp8-tensorwise", "tp": 4, "vpp": 5, **BRIDGE_PLAN}
    fp8_405b = {"precision": "fp8-tensorwise", "tp": 8, "cp": 2, "pp": 8, "vpp": 8, "stage_layers": LLAMA_405B_STAGES,
                **BRIDGE_PLAN}  # fmt: skip
    llama = f"{BRIDGE_RECIPES}/llama/h100"
    return [
        TrainingRow("bridge llama3-8b", "Llama3-8B fp8, 8 GPUs, FSDP", recipe_8b, 14451, "tokens_per_second_per_gpu",
                    f"{BRIDGE} 25.11; {llama}/llama3.py", "5 of 32 layers recomputed"),
        TrainingRow("bridge llama3-70b", "Llama3-70B fp8, 64 GPUs, batch 128", planned("llama3-70b", 64, 8192, 128, pp=8, **fp8_70b),
                    1602, "tokens_per_second_per_gpu", f"{BRIDGE} 25.11; {llama}/llama3.py"),
        TrainingRow("bridge llama3-70b", "Llama3-70B fp8, 64 GPUs, batch 256",
                    planned("llama3-70b", 64, 8192, 256, pp=8, stage_layers=(10, 10, 10, 11, 10, 10, 10, 9), **fp8_70b),
                    1664, "tokens_per_second_per_gpu", f"{BRIDGE} 26.04.01; {llama}/llama3.py"),
        TrainingRow("bridge llama3-70b", "Llama3-70B fp8 SFT, 32 GPUs, seq 4k", planned("llama3-70b", 32, 4096, 32, pp=4, **fp8_70b),
                    1638, "tokens_per_second_per_gpu", f"{BRIDGE} 26.06; {llama}/llama3.py"),
        TrainingRow("bridge llama3.1-405b", "Llama3.1-405B fp8, 1024 GPUs, batch 512",
                    planned("llama3.1-405b", 1024, 8192, 512, **fp8_405b), 292, "tokens_per_second_per_gpu",
                    f"{BRIDGE} 25.11; {llama}/llama31.py"),
        TrainingRow("bridge llama3.1-405b", "Llama3.1-405B fp8, 1024 GPUs, batch 1536",
                    planned("llama3.1-405b", 1024, 8192, 1536, **fp8_405b), 328, "tokens_per_second_per_gpu",
                    f"{BRIDGE} 26.04.01; {llama}/llama31.py"),
    ]  # fmt: skip


def _llama3_paper() -> list[TrainingRow]:
    layers = (7, *(8,) * 14, 7)
    note = "assumed: one layer a chunk (vpp 8), no recomputation, FlashAttention 2, tensor-parallel traffic not overlapped, causal FLOPs"
    shared = {"tp": 8, "pp": 16, "vpp": 8, "stage_layers": layers, "overlap_tensor": False, "attention_kernel": "flash2",
              "logits": "materialized"}  # fmt: skip
    cases = ((8192, 8192, 2048, 1, 430), (16384, 8192, 2048, 1, 400), (16384, 131072, 128, 16, 380))
    return [
        TrainingRow("meta llama3.1-405b", f"Llama3.1-405B bf16, {gpus} GPUs, seq {sequence // 1024}k",
                    planned("llama3.1-405b", gpus, sequence, batch, cp=cp, **shared), tflops, "tflops_per_gpu", LLAMA3, note)
        for gpus, sequence, batch, cp, tflops in cases
    ]  # fmt: skip


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
        return planned("llama3.1-405b", 512, 8192, 256, 4, META_H100, tp=8, pp=8, vpp=vpp, precision="fp8-tensorwise", **TITAN_FULL)

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
        row("8b h200", "Llama3.1-8B fp8, 32 H200, FSDP", fsdp_8b(32, "h200", **fp8), 10938,
            "torchtitan benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md", OP_AC),
    ]  # fmt: skip


def _other_dense() -> list[TrainingRow]:
    prime = "prime-rl benchmarks/baselines/benchmark-{}.json (2026-01)"
    cfg_70b = "examples/llm_benchmark/llama3_3/custom_llama3_1_70b_pretrain_benchmark_8nodes.yaml"
    sft = {"fsdp": True, "logits": "eager", "recompute": ("layer",)}
    return [
        TrainingRow("automodel llama3-70b", "Llama3-70B bf16, 64 GPUs, FSDP, CP 2",
                    planned("llama3-70b", 64, 8192, 128, cp=2, attention_kernel="flash2", **AUTOMODEL_PLAN), 18.90, "step_seconds",
                    f"Automodel docs/performance-summary.mdx (2026-04); {cfg_70b}"),
        TrainingRow("prime-rl sft", "Qwen3-0.6B bf16 SFT, 1 GPU, seq 16k", planned("qwen3-0.6b", 1, 16384, 2, **sft), 1.282,
                    "step_seconds", prime.format("1xh100-Qwen--Qwen3-0.6B-sft-full")),
        TrainingRow("prime-rl sft", "Qwen3-4B bf16 SFT, 8 GPUs, seq 16k", planned("qwen3-4b", 8, 16384, 16, attention_kernel="flash2", **sft), 5.015,
                    "step_seconds", prime.format("8xh100-Qwen--Qwen3-4B-Instruct-2507-sft-full"), "FlashAttention 2"),
    ]  # fmt: skip


def _qwen_30b() -> list[TrainingRow]:
    hybrid = {"ep": 16, "dispatcher": "hybridep", **BRIDGE_PLAN}
    skills = "Megatron-Bridge skills/nemo-mbridge-perf-moe-{}/SKILL.md"
    recipe = f"{BRIDGE_RECIPES}/qwen/h100/qwen3_moe.py"
    graph = "CUDA graphs hold router and preprocessing alone"
    automodel = "examples/llm_benchmark/qwen/qwen3_moe_30b_te_deepep.yaml"

    def bridge(**training) -> PlannedRun:
        return planned("qwen3-30b-a3b", 16, 4096, 1024, **{**hybrid, **training})

    return [
        TrainingRow("bridge qwen3-30b", "Qwen3-30B-A3B bf16, 16 GPUs, HybridEP overlapped", bridge(overlap_expert=True), 20.14729,
                    "step_seconds", f"{skills.format('hardware-configs')}; {recipe}", graph),
        TrainingRow("bridge qwen3-30b", "Qwen3-30B-A3B bf16, 16 GPUs, HybridEP", bridge(), 244.039, "tflops_per_gpu",
                    f"{skills.format('hardware-configs')}; {recipe}", graph),
        TrainingRow("bridge qwen3-30b", "Qwen3-30B-A3B bf16, 16 GPUs, all-to-all", bridge(dispatcher="alltoall"), 45.65,
                    "step_seconds", f"{skills.format('dispatcher-selection')}; {recipe}",
                    "five steps; fused permutation was off for a fault of the container"),
        TrainingRow("bridge qwen3-30b", "Qwen3-30B-A3B fp8, 16 GPUs, HybridEP", bridge(precision="fp8-tensorwise"), 8960,
                    "tokens_per_second_per_gpu", f"{BRIDGE} 26.04.01; {recipe}"),
        TrainingRow("automodel qwen3-30b", "Qwen3-30B-A3B bf16, 8 GPUs, FSDP, EP 8",
                    planned(fake_balanced(SHAPES["qwen3-30b-a3b"]), 8, 4096, 512, 4, ep=8, **AUTOMODEL_PLAN), 21.773, "step_seconds",
                    f"{AUTOMODEL}; {automodel}"),
    ]  # fmt: skip


def _qwen_235b() -> list[TrainingRow]:
    stages = {"pp": 8, "vpp": 4, "stage_layers": QWEN_235B_STAGES}
    cross_node = {"tp": 2, "ep": 32, **stages, "recompute": NORM_ACT}
    long_context = {"tp": 4, "ep": 8, **stages, "recompute": (*NORM_ACT, "experts")}
    fp8 = {"tp": 2, "ep": 32, **stages, "precision": "fp8-tensorwise", "dispatcher": "alltoall", "overlap_expert": True,
           "overlap_tensor": False, **BRIDGE_PLAN}  # fmt: skip
    recipe = f"{BRIDGE_RECIPES}/qwen/h100/qwen3_moe.py"

    def zoo(name: str, seconds: float, note: str = "", micro_batch: int = 1, **settings) -> TrainingRow:
        run = planned("qwen3-235b-a22b", 256, 4096, 2048, micro_batch, logits="in-place", **settings)
        return TrainingRow("zoo qwen3-235b", f"Qwen3-235B-A22B bf16, 256 GPUs, {name}", run, seconds, "step_seconds", ZOO, note)

    thirty_two = (2, *(3,) * 30, 2)
    rows = [
        zoo("DeepEP 32", 19.7, **cross_node),
        zoo("DeepEP 32 overlapped", 17.6, **cross_node, overlap_expert=True),
        zoo("FSDP, EP 8", 17.6, micro_batch=4, tp=2, ep=8, fsdp=True, recompute=("layer",), gradient_dtype_bytes=2,
            note="gradients assumed bf16: fp32 ones would take longer than the step on the network alone"),
        zoo("PP 32, all-to-all 8", 24.2, tp=2, pp=32, vpp=3, ep=8, stage_layers=thirty_two, recompute=NORM_ACT, dispatcher="alltoall"),
        zoo("TP 4, DeepEP 8", 29.0, tp=4, ep=8, **stages),
    ]
    for sequence, cp, tflops in ((16384, 1, 295), (32768, 2, 335), (65536, 4, 368), (131072, 8, 389)):
        run = planned("qwen3-235b-a22b", 256, sequence, 256, cp=cp, logits="in-place", **long_context)
        rows.append(TrainingRow("zoo qwen3-235b long", f"Qwen3-235B-A22B bf16, 256 GPUs, seq {sequence // 1024}k", run, tflops,
                                "tflops_per_gpu", ZOO, "forced balance"))  # fmt: skip
    for batch, tokens, version in ((2048, 1575, "25.11"), (8192, 1712, "26.04.01")):
        rows.append(TrainingRow("bridge qwen3-235b", f"Qwen3-235B-A22B fp8, 256 GPUs, batch {batch}",
                                planned("qwen3-235b-a22b", 256, 4096, batch, **fp8), tokens, "tokens_per_second_per_gpu",
                                f"{BRIDGE} {version}; {recipe}"))  # fmt: skip
    return rows


def _deepseek() -> list[TrainingRow]:
    shape = SHAPES["deepseek-v3"]
    bridge = {"tp": 2, "pp": 8, "vpp": 4, "ep": 64, "stage_layers": (7, 8, 8, 8, 8, 8, 8, 6), "overlap_expert": True,
              "overlap_tensor": False, "overlap_data": False, "recompute": ("mla_up_projection", "dense_mlp"),
              "moment_dtype_bytes": 2, **BRIDGE_PLAN}  # fmt: skip
    automodel = {"pp": 4, "vpp": 8, "ep": 64, **AUTOMODEL_PLAN}
    script = "scripts/performance/run_script.py at fa0315a"
    config = "examples/benchmark/configs/deepseek_v3_te_deepep.yaml at 89e3a9f"
    kimi = "examples/benchmark/configs/kimi_k2_te_deepep.yaml at 89e3a9f"
    h800 = planned(shape, 2048, 4096, 15360, device="h800", pp=16, schedule="dualpipe", ep=64, precision="fp8-blockwise",
                   stage_layers=(*(4,) * 15, 1),
                   moment_dtype_bytes=2, overlap_expert=True, overlap_data=False, dispatch_dtype_bytes=1, logits="materialized",
                   recompute=("norms", "activation", "mla_up_projection"))  # fmt: skip
    return [
        TrainingRow("bridge deepseek-v3", "DeepSeek-V3 fp8, 1024 GPUs, DeepEP overlapped",
                    planned(shape, 1024, 4096, 8192, precision="fp8-tensorwise", **bridge), 338, "tflops_per_gpu",
                    f"{BRIDGE} 25.09; {script}", "1,297 tokens/s a GPU", mtp=True),
        TrainingRow("bridge deepseek-v3", "DeepSeek-V3 fp8 blockwise, 1024 GPUs, DeepEP overlapped",
                    planned(shape, 1024, 4096, 8192, precision="fp8-blockwise", **bridge), 330, "tflops_per_gpu",
                    f"{BRIDGE} 25.09; {script}", mtp=True),
        TrainingRow("automodel deepseek-v3", "DeepSeek-V3 bf16, 256 GPUs, FSDP, PP 4",
                    planned(fake_balanced(without_mtp(shape)), 256, 4096, 512, **automodel), 8.18, "step_seconds", f"{AUTOMODEL}; {config}"),
        TrainingRow("automodel deepseek-v3", "DeepSeek-V3 bf16, 1024 GPUs, FSDP, PP 4",
                    planned(fake_balanced(without_mtp(shape)), 1024, 4096, 2048, **automodel), 37.87 / 4, "step_seconds", f"{AUTOMODEL}; {config}",
                    "one of 4 rounds: the pipeline is emptied every 8 micro-batches (LBS 8, GA 4)"),
        TrainingRow("deepseek deepseek-v3", "DeepSeek-V3 fp8, 2048 H800, DualPipe", h800, 19.926, "step_seconds",
                    "arXiv 2505.09343, Table 4; arXiv 2412.19437, section 3", "assumed: the last stage has one layer beside MTP and heads, every other four; balanced routing"),
        TrainingRow("automodel kimi-k2", "Kimi-K2 bf16, 256 GPUs, FSDP, PP 8",
                    planned(fake_balanced(KIMI_K2), 256, 4096, 256, pp=8, vpp=4, ep=32, **AUTOMODEL_PLAN), 8.86 / 2, "step_seconds",
                    f"{AUTOMODEL}; {kimi}", "one of 2 rounds (LBS 8, GA 2)"),
    ]  # fmt: skip


def _other_moe() -> list[TrainingRow]:
    def folded(shape: str, gpus: int, batch: int, mfu: float, family: str, note: str, **layout) -> TrainingRow:
        run = planned(shape, gpus, 4096, batch, tp=2, dispatcher="alltoall", logits="materialized", **layout)
        return TrainingRow(family, f"{shape} bf16, {gpus} GPUs, folded", run, mfu * DEVICES["h100"].bf16_flops_per_second / 1e12,
                           "tflops_per_gpu", FOLDING, note, causal=False)  # fmt: skip

    assumed = "assumed: vpp 7, NCCL all-to-all, FLOPs of the whole attention matrix (Megatron's until 2025-03)"
    return [
        TrainingRow("bridge gpt-oss-120b", "GPT-OSS-120B bf16, 64 GPUs, PP 4",
                    planned("gpt-oss-120b", 64, 4096, 1280, pp=4, ep=8, recompute=NORM_ACT, dispatcher="alltoall", **BRIDGE_PLAN),
                    5824, "tokens_per_second_per_gpu", f"{BRIDGE} 26.04.01; {BRIDGE_RECIPES}/gpt_oss/h100/gpt_oss.py"),
        TrainingRow("automodel gpt-oss-20b", "GPT-OSS-20B bf16, 8 GPUs, FSDP, EP 8",
                    planned(fake_balanced(SHAPES["gpt-oss-20b"]), 8, 4096, 256, 2, ep=8, **AUTOMODEL_PLAN), 10.04, "step_seconds",
                    f"{AUTOMODEL}; examples/benchmark/configs/gptoss_20b_te_deepep.yaml at 89e3a9f", "FlexAttention"),
        *(folded("mixtral-8x22b", gpus, 1024, mfu, "folding mixtral-8x22b", assumed, pp=8, vpp=7, ep=8)
          for gpus, mfu in ((128, 0.522), (256, 0.507), (512, 0.489), (1024, 0.449))),
        folded("qwen2-57b-a14b", 64, 256, 0.390, "folding qwen2-57b", f"{assumed}; batch 256", pp=4, vpp=7, ep=4),
    ]  # fmt: skip


ROWS: tuple[TrainingRow, ...] = (
    *_bridge_dense(), *_llama3_paper(), *_titan(), *_other_dense(), *_qwen_30b(), *_qwen_235b(), *_deepseek(), *_other_moe(),
)  # fmt: skip
FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(row.family for row in ROWS))
FITTED_FAMILIES: frozenset[str] = frozenset(FAMILIES[1::2])

LEFT_OUT: tuple[tuple[str, str], ...] = (
    ("Qwen3-235B long context, natural routing (ModelZoo: 237 / 277 / 320 / 357 TFLOPS)", "how uneven the routing was isn't published"),
    ("Qwen3-235B with CUDA graphs, 320 TFLOPS (ModelZoo script)", "a comment in a script, not a table"),
    ("Mixtral 8x22B 445 / 465 / 560 TFLOPS (ModelZoo script)", "comments in a script, not a table"),
    ("Mixtral 8x22B and Qwen2-57B unfolded, and FSDP + EP (arXiv 2504.14960)", "layouts of those runs not found"),
    ("GPT-OSS-120B, batch 512, micro-batch 4 (Megatron-Bridge 25.11)", "its accumulation count contradicts batch and layout"),
    ("GPT-OSS-120B (AutoModel)", "its expert-parallel degree isn't published"),
    ("Qwen3-30B-A3B PP 2 (Megatron-Bridge 25.09-26.02.01: 5,113 to 10,494 tokens/s)", "one layout, a factor of two between containers"),
    ("Qwen3-30B-A3B and 235B with token dropping (Megatron-Bridge 25.09)", "tokens dropped: not the same work"),
    ("Megatron-LM README, GPT 2B-462B and 175B", "layouts not published; GELU MLPs"),
    ("prime-rl RL trainer rows", "step time and throughput contradict each other: fake batches are only partly filled"),
    ("Nemotron, Qwen3-Next", "state-space and gated-delta layers: no ModelShape"),
    ("all LoRA rows", "the planner has no LoRA"),
)
