"""One published run of training, and how its recipe becomes a `PlannedRun`."""

from dataclasses import dataclass
from typing import Literal

from strop.engine.config import Layout
from strop.engine.plan.facts import train_flops_per_token
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.shape import ModelShape

Unit = Literal["tokens_per_second_per_gpu", "step_seconds", "tflops_per_gpu"]
BRIDGE = "Megatron-Bridge docs/performance-summary-archive.md"
BRIDGE_RECIPES = "src/megatron/bridge/perf_recipes"
BRIDGE_PLAN = {"gradient_dtype_bytes": 2, "logits": "in-place"}
"""What all recipes of Megatron-Bridge share (grad_reduce_in_fp32 = False in _benchmark_common)."""
BRIDGE_FP8 = {**BRIDGE_PLAN, "precision": "fp8-tensorwise", "weights_dtype_bytes": 1}
"""And those in FP8 with current scaling (fp8_param_gather)."""
AUTOMODEL_PLAN = {
    "fsdp": True, "logits": "materialized", "recompute": ("layer",), "gradient_dtype_bytes": 2, "moment_dtype_bytes": 2,
    "master_weights": False,
}  # fmt: skip
"""Models are made in bf16 and torch.optim.Adam keeps states of that type."""


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
    def stated(self) -> str:
        """The published figure in its own unit."""
        unit = {"step_seconds": "s", "tokens_per_second_per_gpu": "tokens/s/GPU", "tflops_per_gpu": "TFLOPS"}[self.unit]
        return f"{self.published:,.7g} {unit}"

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
    layout = Layout(tp=tp, sp=tp > 1, cp=cp, pp=pp, vpp=vpp, schedule=schedule or ("interleaved" if vpp > 1 else "1f1b"), ep=ep)
    plan = TrainingPlan(
        sequence_length_tokens=sequence_length_tokens,
        global_batch_sequences=global_batch_sequences,
        micro_batch_sequences=micro_batch_sequences,
        **training,
    )
    return PlannedRun.of(
        SHAPES[shape] if isinstance(shape, str) else shape,
        gpus,
        device=device,
        layout=layout,
        stage_layers=stage_layers,
        training=plan,
    )
