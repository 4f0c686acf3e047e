"""Every setting of each launch file in one dataclass, and the presets: values that are known to work together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from strop.engine.config import Device, InputError, Layout, Placement, Precision
from strop.engine.data.prompts import DataConfig
from strop.engine.evaluate.benchmark import EvalConfig
from strop.engine.reward.rules import RewardConfig
from strop.engine.rollout.engine import EngineConfig, RolloutConfig
from strop.engine.run.folder import RunConfig
from strop.engine.train.step import TrainConfig


@dataclass(frozen=True)
class GrpoConfig:
    """One GRPO run (launch/grpo.py)."""

    model: str
    """smollm2 (SmolLM2-135M-Instruct), tiny (random weights), or a Hugging Face folder."""
    seed: int = 0
    """Draws questions, orders them and keys every sampled token."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""
    precision: Precision = "fp32"
    """Of parameters and activations. bf16 keeps fp32 gradients, master weights and moments."""
    placement: Placement = "colocated"
    """colocated: the ranks train and generate in turn, with the same weights. split is not implemented yet."""
    eval_every: int = 0
    """Steps between evaluations on the held-out questions; 0 evaluates before the first step and after the last only."""
    layout: Layout = field(default_factory=Layout)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.placement == "split":
            raise InputError("--placement split is not implemented yet: use colocated")
        check_seed(self.seed)
        if self.eval_every < 0:
            raise InputError(f"--eval-every {self.eval_every}: must be 0 (before and after only) or above")
        if self.rollout.temperature == 0:
            raise InputError("--rollout.temperature 0 gives equal responses, which have no advantage: set it above 0")
        if self.rollout.top_p < 1 or self.rollout.top_k or self.rollout.min_p:
            raise InputError(
                f"--rollout.top-p {self.rollout.top_p} --rollout.top-k {self.rollout.top_k} "
                f"--rollout.min-p {self.rollout.min_p}: training on truncated samples is not implemented yet: leave 1, 0 and 0"
            )
        if self.eval.stop != self.rollout.stop:
            raise InputError(
                f"--eval.stop {self.eval.stop} differs from --rollout.stop {self.rollout.stop}: responses would be judged by "
                "an ending that training doesn't teach; give both the same"
            )
        for rule in (self.reward.rule, *self.reward.sources.values()):
            if "</answer>" in "".join(self.rollout.stop) and (rule.extract == "tag" or rule.format == "think-answer"):
                raise InputError("--rollout.stop cuts </answer> from the text, where --reward.rule looks for it: drop it there")
        if self.rollout.group_size < 2:
            raise InputError("--rollout.group-size 1 leaves nothing to compare a response with: at least 2")
        samples = self.rollout.prompts_per_step * self.rollout.group_size
        if self.train.minibatches > samples:
            raise InputError(f"--train.minibatches {self.train.minibatches}: a step has only {samples} samples to split")


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation (launch/evaluate.py)."""

    model: str
    """smollm2, tiny, or a Hugging Face folder, such as the model/ that a run leaves behind."""
    seed: int = 0
    """As in the run to be compared with: the questions of reasoning-gym families depend on it."""
    device: Device = "auto"
    precision: Precision = "fp32"
    split: Literal["held-out", "all"] = "held-out"
    """held-out: the questions that training with the same --data and --seed never sees; all: every question."""
    lenient: bool = False
    """Judge by the last number anywhere in the response, finished or not, instead of the reward's rule."""
    report: Path | None = None
    """Folder to write report.json and answers.jsonl into; unset prints the table only."""
    layout: Layout = field(default_factory=Layout)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: must lie in 0 .. 2^63 - 1")


ARITHMETIC = DataConfig(
    path=("reasoning-gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1",), held_out_fraction=0.25
)
"""All 200 one-digit additions and subtractions: 150 to train on, 50 held out."""

GRPO_PRESETS: dict[str, tuple[str, GrpoConfig]] = {
    "tiny": (
        "a random 1.3M-parameter model on one-digit sums; seconds, for trying things out",
        GrpoConfig(
            model="tiny",
            data=ARITHMETIC,
            rollout=RolloutConfig(prompts_per_step=4, group_size=4, max_new_tokens=8, kv_cache_gib=0.01),
            train=TrainConfig(steps=4, lr=1e-3, warmup_steps=0, microbatch_tokens=1024),
            eval=EvalConfig(max_new_tokens=8),
            run=RunConfig(save_every=2),
        ),
    ),
    "smollm2": (
        "SmolLM2-135M-Instruct learns one-digit sums; minutes on two CPU cores",
        GrpoConfig(
            model="smollm2",
            data=ARITHMETIC,
            rollout=RolloutConfig(prompts_per_step=8, group_size=8, max_new_tokens=16, kv_cache_gib=0.25),
            train=TrainConfig(steps=20, lr=1e-5, warmup_steps=2, microbatch_tokens=2048),
            eval=EvalConfig(max_new_tokens=16),
        ),
    ),
}

EVALUATE_PRESETS: dict[str, tuple[str, EvaluateConfig]] = {
    name: (f"the held-out questions of the GRPO preset {name}", EvaluateConfig(grpo.model, data=grpo.data, eval=grpo.eval))
    for name, (_, grpo) in GRPO_PRESETS.items()
}
