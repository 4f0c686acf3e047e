"""TRL's GRPOTrainer on strop's kernels: `from strop.kernels.integrations.trl import GRPOTrainer`, and nothing else changes.

Log-probs and entropies come from `linear_logprob` (hidden states x LM head, no logits), the loss and its gradient from
`policy_loss`. Data, generation, rewards, advantages, optimizer and the names and meaning of the logged metrics are TRL's.
The loss equals TRL's own: fp32 to 1e-5, in fp64 to 1e-10 (tests/kernels/test_integrations_trl*.py). One difference: a log-prob
that vLLM couldn't give (NaN) counts as the old policy's in the off-policy mask too, where TRL skips the token.

Served: one process or plain data parallelism (the model's own forward runs, so DDP's hooks do too; the losses are
normalised as TRL does), tied LM heads, PEFT adapters below the LM head, gradient checkpointing, mixed precision, every
loss_type. DeepSpeed ZeRO-1 and 2 keep the LM head whole, but nobody has run them with this. Refused by name: what
`trl_options` lists.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor

from .. import kl, linear_logprob, policy_loss
from .trl_options import CLIPPING, logit_transform, loss_spec, refuse_unserved

INSTALL = "strop.kernels.integrations.trl needs TRL 1.16: pip install 'trl==1.16.*'"

try:
    import trl
    from accelerate.utils import is_peft_model
    from trl.extras.profiling import profiling_decorator
    from trl.trainer.utils import nanmax, nanmin
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{INSTALL} ({error})", name=error.name) from error
if trl.__version__.split(".")[:2] != ["1", "16"]:
    # It overrides private methods: a release that adds an option would have it ignored here in silence.
    raise ImportError(f"{INSTALL}; {trl.__version__} is installed")


class GRPOTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` with the same arguments. ValueError names an option or a model that isn't served."""

    def __init__(self, model: Any, reward_funcs: Any = None, args: trl.GRPOConfig | None = None, *others: Any, **named: Any):
        if args is not None:
            loss_spec(args)  # refuse before a model is loaded
        super().__init__(model, reward_funcs, args, *others, **named)
        refuse_unserved(self)
        self.loss_spec = loss_spec(self.args)
        for scored in (self.model, self.ref_model):
            if scored is not None:
                scored = self.accelerator.unwrap_model(scored)
                scored = scored.get_base_model() if is_peft_model(scored) else scored
                score_completions(scored, self.temperature, self.args.cast_lm_head_to_fp32)

    @profiling_decorator
    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, compute_aux_loss=False,
        **multimodal,
    ) -> tuple[Tensor, Tensor | None, None]:  # fmt: skip
        """(log-probs, entropies, no auxiliary loss) of the last `logits_to_keep` tokens, [B, K] in fp32; 0 at padding."""
        if given := [name for name, value in multimodal.items() if value is not None]:
            raise ValueError(f"strop's GRPOTrainer scores text only, got {', '.join(given)}: use TRL's own GRPOTrainer")
        if compute_aux_loss:
            raise ValueError("strop's GRPOTrainer computes no router auxiliary loss: set router_aux_loss_coef to 0")
        targets_BK = input_ids.masked_fill(attention_mask == 0, -100)[:, -logits_to_keep:]
        results, size = [], batch_size or len(input_ids)
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            with self.accelerator.autocast():
                results.append(
                    model(input_ids=input_ids[rows], attention_mask=attention_mask[rows], completion_targets=targets_BK[rows])
                )
        logprob_BK = torch.cat([result.logprob for result in results])
        return logprob_BK, torch.cat([result.entropy for result in results]) if compute_entropy else None, None

    def _compute_loss(self, model, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training
        mask_BK = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask_BK = mask_BK & inputs["tool_mask"].bool()
        logprob_BK, entropy_BK, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
        )
        acting_BK = mask_BK  # top_entropy_quantile: the tokens of the policy term and the bonus; KL and counts keep all
        if self.top_entropy_quantile < 1:
            acting_BK = self.get_high_entropy_mask(entropy_BK.detach(), mask_BK, 1 - self.top_entropy_quantile)
        advantages = inputs["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        old_BK = inputs.get("old_per_token_logps")
        accumulation = self.current_gradient_accumulation_steps if training else 1
        denominator, is_step_wide = self._denominator(inputs, mask_BK, accumulation)
        loss = policy_loss(
            logprob_BK,
            old_BK,
            torch.where(acting_BK, advantages, 0).to(logprob_BK.dtype),
            mask_BK,
            self.loss_spec,
            ref_logprob=inputs["ref_per_token_logps"] if self.loss_spec.kl_coef else None,
            rollout_logprob=self._rollout_logprob(inputs, logprob_BK),
            denominator=denominator,
        ).loss
        log = self._metrics["train" if training else "eval"]
        if self._entropy_bonus_enabled:
            whole = loss.detach() if is_step_wide else loss.detach() * accumulation
            log["policy_loss"].append(self.accelerator.gather(whole).nanmean().item())
            if training and self.accelerator.sync_gradients:
                log["entropy_coef"].append(self.entropy_coef)
            mean_entropy = torch.where(acting_BK, entropy_BK, 0).sum() / acting_BK.sum().clamp(min=1)
            loss = loss - self.entropy_coef * mean_entropy / accumulation
        old_BK = logprob_BK.detach() if old_BK is None else old_BK
        self._log_tokens(log, inputs, logprob_BK.detach(), old_BK, entropy_BK.detach(), advantages, mask_BK)
        return loss

    def _denominator(self, inputs: dict[str, Any], mask_BK: Tensor, accumulation: int) -> tuple[float | Tensor, bool]:
        """(what TRL divides this micro-batch's sum by, whether that already counts the tokens of the whole step)."""
        match self.loss_type:
            case "grpo" | "sapo" | "luspo":
                return len(mask_BK) * accumulation, False
            case "bnpo":
                return mask_BK.sum().clamp(min=1) * accumulation, False
            case "dr_grpo":
                return len(mask_BK) * self.max_completion_length * accumulation, False
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes  # of the generation batch
        return (tokens * accumulation / self.args.steps_per_generation if self.model.training else tokens), True

    def _rollout_logprob(self, inputs: dict[str, Any], logprob_BK: Tensor) -> Tensor | None:
        """The sampler's log-probs, where the loss reads them: vLLM's, or the old policy's that sampled itself."""
        if not self.loss_spec.needs_rollout_logprob:
            return None
        old_BK = inputs.get("old_per_token_logps")
        old_BK = logprob_BK.detach() if old_BK is None else old_BK
        sampler_BK = inputs.get("sampling_per_token_logps")
        return old_BK if sampler_BK is None else torch.where(sampler_BK.isnan(), old_BK, sampler_BK)

    @torch.no_grad()
    def _log_tokens(
        self, log: dict[str, list], inputs: dict[str, Any], logprob_BK: Tensor, old_BK: Tensor, entropy_BK: Tensor,
        advantages: Tensor, mask_BK: Tensor,
    ) -> None:  # fmt: skip
        """TRL's metrics of the loss, under its names: means over all processes' tokens (sequences for sequence ratios)."""
        means = {"entropy": entropy_BK}
        log_ratio = logprob_BK - old_BK
        if self.importance_sampling_level == "sequence":
            log_ratio = (torch.where(mask_BK, log_ratio, 0).sum(1) / mask_BK.sum(1).clamp(min=1))[:, None]
        ratio = log_ratio.exp()
        if self.beta:
            means["kl"] = kl(
                logprob_BK, inputs["ref_per_token_logps"], gradient=self.loss_spec.kl_gradient, old_logprob=old_BK
            )
        if self.loss_type in CLIPPING:
            ratio = ratio if self.args.delta is None else ratio.clamp(max=self.args.delta)
            low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
            high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
            means |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
            for name, cut, extreme in (("low_min", low, nanmin), ("high_max", high, nanmax)):
                fraction_B = token_sum(cut, mask_BK, 1) / token_count(cut, mask_BK, 1)
                log[f"clip_ratio/{name}"].append(extreme(self.accelerator.gather(fraction_B)).item())
        elif self.loss_type == "cispo":
            means["cispo_clip_ratio"] = (ratio > self.epsilon_high) & (advantages > 0)
        elif self.loss_type == "vespo":
            (k_pos, lambda_pos), (k_neg, lambda_neg) = self.loss_spec.vespo_positive, self.loss_spec.vespo_negative
            correction = inputs.get("importance_sampling_ratio")
            means["vespo/phi_seq_mean"] = self.get_gamma_weights(
                advantages, logprob_BK - old_BK, mask_BK, correction, k_pos, lambda_pos, k_neg, lambda_neg
            )
        parts = [count(values, mask_BK) for values in means.values() for count in (token_sum, token_count)]
        totals = self.accelerator.reduce(torch.stack(parts), reduction="sum").view(-1, 2)
        for name, (total, count) in zip(means, totals.tolist(), strict=True):
            log[name].append(total / max(count, 1.0))


def token_sum(values: Tensor, mask_BK: Tensor, dim: int | None = None) -> Tensor:
    """Sum of [B, K] values over the mask, or of the whole of [B, 1] values."""
    return (values if values.shape[1] == 1 else torch.where(mask_BK, values, 0)).float().sum(dim)


def token_count(values: Tensor, mask_BK: Tensor, dim: int | None = None) -> Tensor:
    return (torch.ones_like(values) if values.shape[1] == 1 else mask_BK).float().sum(dim)


def score_completions(model: Any, temperature: float, cast_lm_head_to_fp32: bool) -> None:
    """Give this model object a forward that, called with completion_targets [B, K], scores its last K tokens.

    completion_targets: ids of the last K input ids, -100 where nothing is scored. It returns a LogprobResult [B, K]; without
    the argument the forward is what it was. An argument of forward, not a method, because wrappers such as DDP call forward.
    """
    forward_before = model.forward
    temperature, softcap = logit_transform(model.config.get_text_config(), temperature)

    @functools.wraps(type(model).forward)  # generate() checks its arguments against this signature
    def forward(self: Any, *args: Any, completion_targets: Tensor | None = None, **kwargs: Any) -> Any:
        if completion_targets is None:
            return forward_before(*args, **kwargs)
        hidden_BLH = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        hidden_BKH = hidden_BLH[:, -completion_targets.shape[1] - 1 : -1]
        head = self.get_output_embeddings()
        operands = hidden_BKH, head.weight, head.bias
        device = hidden_BKH.device.type
        if cast_lm_head_to_fp32 or torch.is_autocast_enabled(device):
            dtype = torch.float32 if cast_lm_head_to_fp32 else torch.get_autocast_dtype(device)
            operands = tuple(None if tensor is None else tensor.to(dtype) for tensor in operands)
        with torch.autocast(device, enabled=False):  # it would round the fp32 products inside too
            hidden, weight, bias = operands
            return linear_logprob(hidden, weight, completion_targets, temperature=temperature, bias=bias, softcap=softcap)

    model.forward = types.MethodType(forward, model)
