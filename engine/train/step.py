"""One step of GRPO training: from this rank's scored groups to updated parameters on every rank."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import (
    AdvantageSpec,
    LossSpec,
    PolicyLoss,
    combine_metrics,
    denominator_kind,
    summarize_metrics,
)
from ..batch import Group
from ..config import InputError
from ..model.transformer import Recompute, Transformer
from ..model.weights import bit_sum
from ..parallel.collectives import all_gather_objects, all_gather_rows
from ..parallel.mesh import Mesh
from .census import Census
from .clock import StepClock
from .microbatches import MicroBatch, microbatches
from .nonfinite import raise_nonfinite
from .objective import batch_logprobs, named_metrics, objective, sequence_logprobs
from .optimizer import AdamConfig, DistributedAdamW
from .packing import Example, require_fitting
from .schedule import LrSchedule, check_schedule, learning_rate


@dataclass(frozen=True)
class TrainConfig:
    """How rollouts change the policy."""

    steps: int = 100
    """Steps of the whole run (a step is one rollout): the horizon of the learning-rate schedule."""
    lr: float = 1e-6
    """Peak learning rate. R1-Zero used 3e-6."""
    warmup_steps: int = 0
    """Steps of linear warm-up to the peak."""
    lr_schedule: LrSchedule = "constant"
    """What follows the warm-up: constant (as R1's RL stages), or linear or cosine decay to the floor."""
    lr_floor: float = 0.0
    """End of the decay, as a fraction of the peak."""
    minibatches: int = 1
    """Optimizer steps on each rollout; every sample is in one of them. R1-Zero split 8,192 outputs into 16."""
    microbatch_tokens: int = 4096
    """Tokens of a forward and backward pass on each rank, prompts included. Changes memory and speed, not the result."""
    microbatch_sequences: int = 128
    """Most sequences in a micro-batch."""
    loss: LossSpec = field(default_factory=LossSpec)
    advantage: AdvantageSpec = field(default_factory=AdvantageSpec)
    constant_length: int = 0
    """Tokens that loss.aggregation 'constant' counts for each sample (Dr. GRPO: the response limit); 0 otherwise."""
    kl_refresh_steps: int = 0
    """The reference policy becomes a copy of the current one every so many steps (R1-Zero: 400); 0 keeps the first."""
    adam: AdamConfig = field(default_factory=AdamConfig)
    clip_grad_norm: float = 1.0
    """Largest global norm of the gradients; 0 doesn't clip."""
    recompute: Recompute = "none"
    """full keeps only each layer's input and computes the rest again in backward: less memory, a third more time."""

    def __post_init__(self) -> None:
        for name in ("steps", "minibatches", "microbatch_tokens", "microbatch_sequences"):
            if getattr(self, name) < 1:
                raise InputError(f"--train.{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("lr", "kl_refresh_steps", "clip_grad_norm", "constant_length"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"--train.{name.replace('_', '-')} {getattr(self, name)}: must be a number of at least 0")
        check_schedule(self.steps, self.warmup_steps, self.lr_floor)
        if self.lr_floor and self.lr_schedule == "constant":
            raise InputError(f"--train.lr-floor {self.lr_floor} has no effect with --train.lr-schedule constant: leave it at 0")
        if self.kl_refresh_steps and not self.loss.kl_coef:
            raise InputError(
                f"--train.kl-refresh-steps {self.kl_refresh_steps} has no effect without a KL term: "
                "set --train.loss.kl-coef above 0 (R1-Zero: 0.001)"
            )
        if (denominator_kind(self.loss) == "constant") != (self.constant_length > 0):
            raise InputError(
                f"--train.constant-length {self.constant_length} with --train.loss.aggregation {self.loss.aggregation}: "
                "'constant' needs a length above 0 (Dr. GRPO: the response limit), the others leave it at 0"
            )


class Trainer:
    """Trains `model` in place, on every rank of `mesh` together.

    reference: the policy that the KL term stays close to; None copies the model as it is now (only where
    config.loss.kl_coef is above 0). A reference that never changes is not part of the state: a resume makes the trainer from
    the first model again, then loads. All data-parallel ranks must pass equal models: a RuntimeError otherwise.
    """

    def __init__(self, model: Transformer, mesh: Mesh, config: TrainConfig, reference: Transformer | None = None) -> None:
        self.model, self.mesh, self.config = model, mesh, config
        self._has_kl = config.loss.kl_coef > 0
        if reference is not None and not self._has_kl:
            raise ValueError("a reference policy is of no use with loss.kl_coef 0: leave it out or set kl_coef")
        if self._has_kl and reference is None:
            reference = copy.deepcopy(model)
        self.reference = None if reference is None else reference.requires_grad_(False)
        model.recompute = config.recompute
        self._clock = StepClock(mesh.device)
        self._parameters = dict(model.named_parameters())
        sums = all_gather_objects(sum(bit_sum(parameter) for parameter in self._parameters.values()), mesh.zero)
        if len(set(sums)) > 1:
            raise RuntimeError(f"the data-parallel ranks start from different parameters (bit sums {sums}): load the same ones")
        self.optimizer = DistributedAdamW(
            self._parameters.items(), mesh, config.adam, clip_grad_norm=config.clip_grad_norm or None
        )

    def train_on(self, groups: Sequence[Group], step: int, seed: int) -> tuple[list[Group], dict[str, float]]:
        """Train on one rollout; returns (the groups with their advantages, metrics: the same on every rank). Collective.

        groups: this rank's, scored and whole; a rank may have none. step: 1 .. config.steps. seed: with the step, it keys
        the permutation of all ranks' samples that config.minibatches divides.
        Raises InputError for a sequence longer than a micro-batch, and NonFiniteError; both on every rank.
        """
        config = self.config
        census = Census.take(groups, self.mesh.dp)
        require_fitting([record.sequence_length for record in census.records], config.microbatch_tokens)
        advantages, metrics = census.advantages(config.advantage)
        examples = {
            sample.id: Example(group.prompt_tokens, sample, advantages[sample.id])
            for group in groups for sample in group.samples
        }  # fmt: skip
        minibatch_ids = census.minibatches(config.minibatches, seed, step)
        only_advantage_pulls = not (config.loss.kl_coef or config.loss.entropy_coef)
        minibatches = microbatches(
            [[examples[i] for i in ids if i in examples] for ids in minibatch_ids],
            self.mesh, config.microbatch_tokens, config.microbatch_sequences, census.longest, only_advantage_pulls,
        )  # fmt: skip
        with self._clock.part("logprobs"):
            minibatches = self._add_logprobs(minibatches)
        lr = learning_rate(step, config.lr, config.steps, config.warmup_steps, config.lr_schedule, config.lr_floor)
        kind = denominator_kind(config.loss)
        updates, norms = [], []
        for ids, minibatch in zip(minibatch_ids, minibatches, strict=True):
            denominator = census.denominator(ids, kind, config.constant_length)
            with self._clock.part("gradients"):
                update, norm = self._compute_gradients(minibatch, denominator, f"step {step}, mini-batch {len(norms)}")
            with self._clock.part("optimizer"):
                self.optimizer.step(lr)
            updates.append(update)
            norms.append(norm)
        if config.kl_refresh_steps and step % config.kl_refresh_steps == 0:
            self._refresh_reference()
        metrics |= census.metrics() | {"lr": lr}
        if updates:
            metrics |= {"grad_norm": math.fsum(norms) / len(norms)} | named_metrics(combine_metrics(updates), len(updates))
        return [replace(group, advantages=tuple(advantages[one.id] for one in group.samples)) for group in groups], metrics

    @torch.no_grad()
    def _add_logprobs(self, minibatches: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """Add what must be computed before the first update: old log-probs, and those of the reference.

        The first mini-batch meets the old policy itself, so it needs no pass for old log-probs.
        """

        def complete(microbatch: MicroBatch, is_first: bool) -> MicroBatch:
            batch, max_seqlen = microbatch.batch, microbatch.max_seqlen
            old = None if is_first else batch_logprobs(self.model, batch, max_seqlen).logprob
            ref = None if self.reference is None else batch_logprobs(self.reference, batch, max_seqlen).logprob
            return microbatch._replace(batch=replace(batch, old_logprob=old, ref_logprob=ref))

        return [[complete(one, index == 0) for one in minibatch] for index, minibatch in enumerate(minibatches)]

    def _compute_gradients(self, minibatch: list[MicroBatch], denominator: int, where: str) -> tuple[Tensor, float]:
        """(metrics over all ranks, global gradient norm); the gradients are left in the optimizer."""

        def run(microbatch: MicroBatch) -> PolicyLoss:
            with torch.set_grad_enabled(microbatch.has_gradient):
                result = objective(self.model, microbatch.batch, self.config.loss, denominator, microbatch.max_seqlen)
            if result.loss.requires_grad:
                result.loss.backward()
            return result

        own = combine_metrics([run(microbatch).metrics for microbatch in minibatch])
        norm = self.optimizer.reduce_gradients()
        axis = self.mesh.zero
        everyone = own.new_empty(axis.size, len(own))
        everyone[axis.rank] = own
        metrics = combine_metrics(all_gather_rows(everyone, axis).unbind())
        summary = summarize_metrics(metrics)
        if not (math.isfinite(norm) and math.isfinite(summary["loss"])) or summary["nonfinite"]:
            bad_tokens = f"{summary['nonfinite']:.0f} tokens with inputs that aren't finite"
            what = f"{where}: loss {summary['loss']}, gradient norm {norm}, {bad_tokens}"
            raise_nonfinite(what, minibatch, lambda microbatch: run(microbatch).loss, self.optimizer, self.mesh)
        return metrics, norm

    @torch.no_grad()
    def _refresh_reference(self) -> None:
        for name, parameter in self.reference.named_parameters():
            parameter.copy_(self._parameters[name])

    def take_times(self) -> dict[str, float]:
        """Seconds of this rank since the last call: time/train_logprobs (old policy and reference), time/train_gradients
        (forward, backward and their sum over the ranks) and time/train_optimizer."""
        return self._clock.take()

    def token_logprobs(self, tokens: Tensor) -> Tensor:
        """`sequence_logprobs` of the policy as it is now: int64 [T] -> fp32 [T - 1]. This rank alone, no collective."""
        return sequence_logprobs(self.model, tokens.to(self.mesh.device))

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs besides the step number: tensors by reference, nested by canonical names.

        Whoever overwrites them in place (torch.distributed.checkpoint.load) has restored the trainer. "model" holds plain
        tensors, equal on all ranks; "optimizer" DTensors, which any number of ranks can load; "reference" the reference
        policy where it changes during the run.
        """
        state = {
            "model": {name: parameter.detach() for name, parameter in self._parameters.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        if self.config.kl_refresh_steps:
            state["reference"] = {name: parameter.detach() for name, parameter in self.reference.named_parameters()}
        return state
