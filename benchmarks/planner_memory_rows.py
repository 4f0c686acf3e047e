"""Published memory peaks as runs that the planner can predict: MEMORY_ROWS.

All are peaks of training, as their publishers state them: what PyTorch had allocated or reserved, or what the device used.
Nothing is fitted on them but engine.plan.memory's FRAGMENTATION (on the reserved bytes of the first table). Which tensors
a layer keeps was derived from the sources of Megatron and Transformer Engine and, where these left a choice (placeholders of
gradients, in-place gradients of logits, v as a view), settled on the first table: it is no held-out test; all others
are, but for the two of pith-train, whose estimator gave engine.plan.memory the bytes outside PyTorch.

Not here, because the planner has no words for them: LoRA (prime-rl), activations offloaded to the host, hybrid Mamba models
(Nemotron).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from strop.engine.config import GIB, Layout
from strop.engine.plan.memory import training_memory
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.shape import MlaShape, ModelShape, MoeShape

GIB_PER_GB = 1e9 / GIB
TITAN_MICROBATCHES = "as many micro-batches as pipeline ranks, the default of that commit"
LLAMA_70B, LLAMA_405B, DEEPSEEK_V3 = SHAPES["llama3-70b"], SHAPES["llama3.1-405b"], SHAPES["deepseek-v3"]
DEEPSEEK_V2 = ModelShape(
    "deepseek-v2", 102400, 5120, 60, 128, 128, 192, dense_intermediate_size=12288,
    mla=MlaShape(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
    moe=MoeShape(160, 6, 1536, shared_intermediate_size=3072, num_dense_layers=1),
)  # fmt: skip
MOONLIGHT = ModelShape(
    "moonlight-16b-a3b", 163840, 2048, 27, 16, 16, 192, dense_intermediate_size=11264,
    mla=MlaShape(q_rank=0, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
    moe=MoeShape(64, 6, 1408, shared_intermediate_size=2816, num_dense_layers=1, router_bias=True),
)  # fmt: skip
MIXTRAL_8X2B = ModelShape("mixtral-8x2b", 32000, 2048, 4, 16, 8, 128, 0, moe=MoeShape(8, 2, 5440))
"""Four layers of it."""


@dataclass(frozen=True)
class MemoryRow:
    """One published peak."""

    name: str
    run: PlannedRun
    published_gib: float
    source: str
    note: str = ""
    """What is assumed where the publisher doesn't say."""
    counted: Literal["allocated", "reserved", "total"] = "allocated"
    """torch.cuda.max_memory_allocated(), max_memory_reserved(), or all that is used on the device."""
    miss: str = ""
    """Why the prediction is more than 10% off; empty where it isn't."""
    rank: int | None = None
    """Of the pipeline; None: whichever holds most."""
    fitted: bool = False
    """The planner's list of tensors, or a constant, was settled on it."""

    @property
    def predicted_gib(self) -> float:
        memories = training_memory(self.run)
        ranks = memories if self.rank is None else memories[self.rank : self.rank + 1]
        return max(getattr(memory, f"{self.counted}_bytes") for memory in ranks) / GIB

    @property
    def error(self) -> float:
        """Prediction over measurement, minus 1."""
        return self.predicted_gib / self.published_gib - 1


def _run(shape: ModelShape, gpus: int, layout: Layout, device: str = "h100", **training: Any) -> PlannedRun:
    return PlannedRun.of(shape, gpus, device=device, layout=layout, training=TrainingPlan(**training))


def _simumax() -> Iterator[MemoryRow]:
    """Megatron-LM on 8 B200, a few layers of each model; 4 to 32 micro-batches took the same."""
    source = "MooreThreads/SimuMax docs/b200/b200_release_v1.2_summary.json (real_alloc_gib)"
    long = "Ulysses (cp-comm-type a2a)"
    table = (
        (LLAMA_70B, 12, 4096, Layout(pp=2), 66.55, ""),
        (LLAMA_70B, 12, 4096, Layout(tp=2, sp=True), 60.68, ""),
        (LLAMA_70B, 12, 4096, Layout(tp=4, sp=True), 39.07, ""),
        (LLAMA_70B, 12, 4096, Layout(tp=8, sp=True), 28.29, ""),
        (LLAMA_405B, 4, 4096, Layout(pp=2), 87.08, ""),
        (LLAMA_405B, 4, 4096, Layout(tp=2, sp=True), 81.59, ""),
        (LLAMA_405B, 4, 4096, Layout(tp=4, sp=True), 52.89, ""),
        (LLAMA_405B, 4, 4096, Layout(tp=8, sp=True), 38.57, ""),
        (DEEPSEEK_V2, 4, 4096, Layout(ep=8), 45.63, ""),
        (DEEPSEEK_V2, 4, 4096, Layout(pp=2, ep=4), 44.70, ""),
        (DEEPSEEK_V3, 4, 4096, Layout(ep=8), 104.30, "one dense layer"),
        (DEEPSEEK_V3, 4, 4096, Layout(pp=2, ep=4), 114.00, "one dense layer"),
        (LLAMA_70B, 12, 32768, Layout(tp=2, sp=True, cp=4, cp_kind="ulysses"), 68.43, long),
        (LLAMA_70B, 12, 32768, Layout(cp=8, cp_kind="ulysses"), 104.51, long),
        (LLAMA_405B, 4, 32768, Layout(tp=2, sp=True, cp=4, cp_kind="ulysses"), 87.03, long),
        (LLAMA_405B, 4, 32768, Layout(cp=8, cp_kind="ulysses"), 139.22, long),
        (LLAMA_70B, 12, 131072, Layout(tp=2, sp=True, cp=4, cp_kind="ulysses"), 112.67, long),
        (LLAMA_70B, 12, 131072, Layout(cp=8, cp_kind="ulysses"), 147.99, long),
        (LLAMA_405B, 4, 131072, Layout(tp=2, sp=True, cp=4, cp_kind="ulysses"), 118.13, long),
    )
    for model, layers, tokens, layout, published, note in table:
        moe = None if model.moe is None else replace(model.moe, num_dense_layers=1)
        shape = replace(model, num_layers=layers, num_mtp_layers=0, moe=moe)
        sequences = 4 * 8 // (layout.tp * layout.cp * layout.pp)
        run = _run(
            shape, 8, layout, "b200", sequence_length_tokens=tokens, global_batch_sequences=sequences, logits="in-place"
        )  # fmt: skip
        degrees = " ".join(f"{axis}{getattr(layout, axis)}" for axis in ("tp", "cp", "pp", "ep") if getattr(layout, axis) > 1)
        yield MemoryRow(f"{model.name} {layers} layers {tokens} {degrees}", run, published, source, note, fitted=True)


def _megatron_bridge() -> Iterator[MemoryRow]:
    """NVIDIA's recipes: bf16 gradients, Transformer Engine's cross entropy; a GB is 1e9 bytes (train_utils.py)."""
    recipe = {"gradient_dtype_bytes": 2, "logits": "in-place"}
    q30 = {**recipe, "global_batch_sequences": 1024}
    yield MemoryRow(
        "Qwen3-30B-A3B 16 ep16 HybridEP, overlapped",
        _run(SHAPES["qwen3-30b-a3b"], 16, Layout(ep=16), dispatcher="hybridep", overlap_expert=True, **q30),
        62.166,
        "Megatron-Bridge skills/nemo-mbridge-perf-moe-hardware-configs/SKILL.md",
        "rank 0; its partial CUDA graphs' own memory is not predicted",
    )
    for parts, gigabytes in (((), 61.35), (("core_attention",), 63.14)):
        yield MemoryRow(
            f"Qwen3-30B-A3B 16 ep16 all-to-all {' '.join(parts)}".rstrip(),
            _run(SHAPES["qwen3-30b-a3b"], 16, Layout(ep=16), dispatcher="alltoall", recompute=parts, **q30),
            gigabytes * GIB_PER_GB,
            "Megatron-Bridge pull request 3880",
        )
    moonlight = {**recipe, "moment_dtype_bytes": 2, "global_batch_sequences": 4, "dispatcher": "alltoall"}
    for parts, gigabytes in (
        ((), 36.618), (("core_attention",), 36.614), (("mla_up_projection",), 35.902),
        (("mla_up_projection", "dense_mlp"), 35.917), (("activation",), 35.941), (("norms", "activation"), 35.949),
    ):  # fmt: skip
        yield MemoryRow(
            f"Moonlight-16B 8 tp2 ep8 {' '.join(parts)}".rstrip(),
            _run(MOONLIGHT, 8, Layout(tp=2, sp=True, ep=8), recompute=parts, **moonlight),
            gigabytes * GIB_PER_GB,
            "Megatron-Bridge skills/nemo-mbridge-perf-activation-recompute/SKILL.md",
            "natural routing of random weights, predicted as balanced",
        )
    sft = {**recipe, "precision": "fp8-tensorwise", "weights_dtype_bytes": 1, "global_batch_sequences": 32}
    graphs = (
        "a historical run with CUDA-graphed MLPs and tp-overlap buffers; that tp 8 saves so little (8.6 of 58.8 GB) shows it"
    )
    for layout, parts, gigabytes, miss in (
        (Layout(tp=4, sp=True, pp=4, vpp=5, schedule="interleaved"), (), 58.8, graphs),
        (Layout(tp=4, sp=True, pp=4, vpp=5, schedule="interleaved"), ("dense_mlp",), 55.6, ""),
        (Layout(tp=4, sp=True, pp=8, vpp=5, schedule="interleaved"), (), 53.2, graphs),
        (Layout(tp=8, sp=True, pp=4, vpp=5, schedule="interleaved"), (), 50.2, ""),
    ):
        yield MemoryRow(
            f"Llama3-70B SFT 32 fp8 tp{layout.tp} pp{layout.pp} vpp5 {' '.join(parts)}".rstrip(),
            _run(LLAMA_70B, 32, layout, recompute=parts, **sft),
            gigabytes * GIB_PER_GB,
            "Megatron-Bridge skills/nemo-mbridge-perf-memory-tuning/SKILL.md and ...activation-recompute/SKILL.md",
            "FP8 weights (fp8_param_gather)",
            miss=miss,
        )


def _megatron() -> Iterator[MemoryRow]:
    shape = replace(DEEPSEEK_V3, num_layers=14)
    layout = Layout(pp=4, vpp=2, schedule="interleaved", ep=16)
    plan = {"sequence_length_tokens": 2048, "global_batch_sequences": 256, "dispatcher": "alltoall", "logits": "in-place"}
    for recompute, overlap, megabytes in (((), False, 68704), (("layer",), False, 60154), ((), True, 70279)):
        run = _run(shape, 64, layout, recompute=recompute, overlap_expert=overlap, **plan)
        yield MemoryRow(
            f"DeepSeek-V3 14 layers 64 pp4 ep16{' full recompute' * bool(recompute)}{' overlapped' * overlap}",
            replace(run, stage_layers=(4, 4, 4, 2)),
            megabytes / 1024,
            "NVIDIA/Megatron-LM pull requests 6311 and 6429",
            "fp32 gradients and moments (Megatron's defaults)",
        )
    for tp, sequences, published in ((2, 1, 6.6), (2, 2, 8.0), (1, 1, 11.2), (1, 2, 13.8)):
        layout = Layout(tp=tp, sp=tp > 1, etp=tp)
        yield MemoryRow(
            f"Mixtral-8x2B 4 layers 8 tp{tp} mbs{sequences}",
            _run(MIXTRAL_8X2B, 8, layout, micro_batch_sequences=sequences, global_batch_sequences=16, logits="materialized"),
            published,
            "ISEEKYAN/mbridge memory_estimator/README.md",
            "states agree with the published split (8.8, 5.3)",
        )


def _torchtitan() -> Iterator[MemoryRow]:
    """FSDP of fp32 weights, activation checkpointing of single operations (8B) or of all, cross entropy uncompiled in 2024.

    With a pipeline there are as many micro-batches as stages (config_manager.py at commit 9dec370).
    """
    source = "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
    plan = {
        "fsdp": True, "weights_dtype_bytes": 4, "recompute": ("layer",), "logits": "eager", "precision": "fp8-tensorwise",
    }  # fmt: skip
    selective = {**plan, "recompute": ("every_second_product",), "sequence_length_tokens": 8192, "micro_batch_sequences": 2}
    for gpus, precision, compiled, published in (
        (8, "bf16", False, 82.4), (8, "bf16", True, 77.0), (8, "fp8-tensorwise", True, 76.8),
        (128, "bf16", False, 67.0), (128, "bf16", True, 62.0), (128, "fp8-tensorwise", True, 61.8),
    ):  # fmt: skip
        kind = {"precision": precision, "compiled": compiled, "global_batch_sequences": 2 * gpus}
        run = _run(SHAPES["llama3-8b"], gpus, Layout(), "h100-96gb-500w", **(selective | kind))
        name = f"Llama3.1-8B {gpus} FSDP {precision}{' compiled' * compiled}"
        yield MemoryRow(name, run, published, source + f" Table {1 if gpus == 8 else 3}", counted="reserved")
    for gpus, published in ((32, 47.96), (64, 46.97)):
        kind = {"logits": "in-place", "global_batch_sequences": 2 * gpus}
        run = _run(SHAPES["llama3-8b"], gpus, Layout(), "h200", **(selective | kind))
        note = "its compiled cross entropy keeps the logits in 16 bits"
        table = "pytorch/torchtitan benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md"
        yield MemoryRow(f"Llama3.1-8B {gpus} FSDP fp8 H200", run, published, table, note, "reserved")
    for cp, published in ((1, 83.9), (2, 84.2), (4, 84.0), (8, 84.5)):
        batch = {"sequence_length_tokens": 32768 * cp, "global_batch_sequences": 8 // cp}
        run = _run(SHAPES["llama3-8b"], 8, Layout(cp=cp), "h100-96gb-500w", **batch, **plan)
        yield MemoryRow(f"Llama3.1-8B 8 FSDP cp{cp} {32768 * cp}", run, published, source + " Table 2", counted="reserved")
    batch = {"sequence_length_tokens": 8192, "micro_batch_sequences": 16, "global_batch_sequences": 512}
    run = _run(LLAMA_70B, 256, Layout(tp=8, sp=True), "h100-96gb-500w", **batch, **plan)
    for overlap, published, miss in (
        ("", 71.9, "7.7 GiB short; with asynchronous tensor parallelism the same run took 4.3 GiB less"),
        ("async tp", 67.6, ""),
    ):
        yield MemoryRow(
            f"Llama3.1-70B 256 FSDP32 tp8 {overlap}".rstrip(), run, published, source + " Table 4", "", "reserved", miss
        )  # fmt: skip
    for schedule, vpp, sequences, published, miss in (
        ("1f1b", 1, 4, 82.5, "8.7 GiB short, unexplained"),
        ("interleaved", 2, 2, 72.7, ""),
    ):
        layout = Layout(tp=8, sp=True, pp=8, vpp=vpp, schedule=schedule)
        batch = {"sequence_length_tokens": 8192, "micro_batch_sequences": sequences, "global_batch_sequences": 256}
        run = _run(LLAMA_405B, 512, layout, "h100-96gb-500w", **batch, **plan)
        name = f"Llama3.1-405B 512 FSDP8 tp8 pp8 {schedule}"
        yield MemoryRow(name, run, published, source + " Table 5", TITAN_MICROBATCHES, "reserved", miss)
    far = "9.0 GiB more than the same tokens a rank need at cp 4; unexplained"
    for cp, published, miss in ((1, 75.3, ""), (2, 75.9, ""), (4, 77.1, ""), (8, 84.9, far)):
        batch = {"sequence_length_tokens": 32768 * cp, "global_batch_sequences": 64 // cp}
        run = _run(LLAMA_405B, 512, Layout(tp=8, sp=True, pp=8, cp=cp), "h100-96gb-500w", **batch, **plan)
        name = f"Llama3.1-405B 512 tp8 pp8 cp{cp} {32768 * cp}"
        yield MemoryRow(name, run, published, source + " Table 6", TITAN_MICROBATCHES, "reserved", miss)


def _prime_rl() -> Iterator[MemoryRow]:
    """FSDP of fp32 weights, full recomputation, two micro-batches; rl: head fused by chunks, sft: logits kept."""
    source = "PrimeIntellect-ai/prime-rl benchmarks/baselines/*.json (peak_memory)"
    eager_moe = "672 kB a token between 16k and 64k tokens, predicted 433: its torch MoE keeps more copies of dispatched tokens"
    for name, gpus, kind, tokens, device, published, miss in (
        ("qwen3-0.6b", 1, "rl", 16384, "h100", 12.528, ""),
        ("qwen3-0.6b", 1, "rl", 65536, "h100", 19.561, ""),
        ("qwen3-4b", 8, "rl", 16384, "h100", 17.096, ""),
        ("qwen3-4b", 8, "rl", 65536, "h100", 36.105, ""),
        ("qwen3-30b-a3b", 8, "rl", 16384, "h100", 74.588, ""),
        ("qwen3-30b-a3b", 8, "rl", 65536, "h200", 105.354, eager_moe),
        ("qwen3-0.6b", 1, "sft", 8192, "h100", 31.742, ""),
        ("qwen3-0.6b", 1, "sft", 16384, "h100", 52.840, ""),
        ("qwen3-4b", 8, "sft", 16384, "h100", 54.633, ""),
        ("qwen3-4b", 8, "sft", 65536, "b200", 171.530, ""),
        ("qwen3-30b-a3b", 8, "sft", 16384, "h200", 106.424, ""),
    ):
        run = _run(
            SHAPES[name], gpus, Layout(), device, sequence_length_tokens=tokens, global_batch_sequences=2 * gpus,
            fsdp=True, weights_dtype_bytes=4, recompute=("layer",), logits="fused" if kind == "rl" else "retained",
        )  # fmt: skip
        note = "no expert parallelism" if "a3b" in name else ""
        yield MemoryRow(f"{name} {kind} {gpus} FSDP {tokens}", run, published, source, note, "reserved", miss)


def _pith_train() -> Iterator[MemoryRow]:
    run = _run(
        SHAPES["qwen3-30b-a3b"], 32, Layout(pp=4, ep=8, schedule="dualpipev"), global_batch_sequences=1024,
        fsdp=True, weights_dtype_bytes=4, logits="eager", overlap_expert=True,
    )  # fmt: skip
    source = "mlc-ai/pith-train pull request 18"
    note = "sequences of 4096 tokens, as in its documentation's example"
    for rank, published in ((0, 62.3), (1, 58.0)):
        name = f"Qwen3-30B-A3B 32 pp4 ep8 DualPipeV rank {rank}"
        yield MemoryRow(name, run, published, source, note, "total", rank=rank)


MEMORY_ROWS: tuple[MemoryRow, ...] = (
    *_simumax(),
    *_megatron_bridge(),
    *_megatron(),
    *_torchtitan(),
    *_prime_rl(),
    *_pith_train(),
)
