"""Public op: the policy loss on the LM head, with the gradients of hidden states and weight computed in the forward.

N tokens, H hidden, V vocabulary, S sequences; n tokens of a chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import FLOATING, INDEX, STATISTICS, check_positive, check_positive_values, check_tensor
from .dispatch import choose, define_op, load
from .filled import filled, number_on
from .head_gradient import HeadGradient
from .lm_head import LmHead
from .logprob_ops import SHAPE, FlatShape
from .logprobs import check_head, linear_logprob
from .loss_code import LossCode, encode
from .metrics import METRIC_FIELDS, SUMS, combine_metrics
from .policy import AVAILABLE, check_arguments, contiguous, policy_loss
from .reference.policy_loss import sequence_stats as reference_stats
from .reference.sequences import tokens_before
from .reference.softmax import statistics_dtype
from .specs import SEQUENCE_CORRECTION, SEQUENCE_RATIO, LossSpec
from .stored_gradient import stored_gradient


class LinearPolicyLoss(NamedTuple):
    loss: Tensor
    """0-dim fp32 (fp64 for fp64 inputs); its gradient reaches hidden, weight and bias."""
    logprob: Tensor
    """Of the targets' shape, detached, 0 outside the mask."""
    metrics: Tensor
    """As of `policy_loss`."""


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    spec: LossSpec,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    keep_mask: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    ignore_index: int = -100,
    main_grad: Tensor | None = None,
    deterministic: bool = False,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_stats: Tensor | None = None,
    denominator: float | Tensor,
    loss_scale: float | Tensor = 1.0,
    split_backward: bool = False,
) -> LinearPolicyLoss:
    """policy_loss(linear_logprob(hidden, weight, targets)), tokens outside the mask left out of the products.

    mask: a target that is ignore_index counts as outside it, in every sum and count: it has no log-prob to score.
    hidden: [T, H] or [B, L, H]. Except for loss_scale and main_grad the arguments and the errors are those of the two ops.

    Fused, it is 6 N H V floating-point operations: chunk by chunk of tokens the logits are made, scored, turned into their
    gradient and multiplied into those of hidden, weight and bias. These gradients, in the dtypes of their tensors, are all
    that backward keeps; they belong to three autograd nodes. While it runs, a weight of bf16 or fp16 without main_grad takes
    another V x H in fp32, the sum over the chunks. A token's slope must follow from its own log-prob, so the two
    ops run one after the other instead (8 N H V: backward makes the logits again from three numbers a token) with
      - policies gspo, gspo-token, gmpo and vespo, opsm_delta, and sequence corrections without old_logprob, unless
        sequence_stats are given: they hold what the other tokens would tell;
      - float64, STROP_KERNELS=reference, and devices without a kernel for the policy loss.
    Where no gradient is wanted (torch.no_grad(), nothing requires one) it is 2 N H V.

    loss_scale: what the loss will be multiplied with before backward (a loss scaler's factor, 1 / micro-batches), a number or
        a 0-dim tensor, > 0: the fused form computes the gradients of loss * loss_scale. An upstream gradient u multiplies
        them by u / loss_scale, in place unless the graph is retained; where that is 1 on a CPU nothing is multiplied.
    main_grad: [V, H] in fp32, to which weight's gradient is added; `weight.grad` stays as it is. The fused form adds it *in
        the forward*, without a V x H temporary: it is complete when the call returns, before any hook of weight, which
        backward runs as if the gradient arrived then. There u must be loss_scale: anything else is a ValueError in backward
        on a CPU, a device-side assertion elsewhere and under torch.compile; and a second backward of a retained graph is a
        RuntimeError (torch.compile: a wrong gradient). Whether backward follows or not, the gradient is in main_grad: score
        under torch.no_grad(), zero main_grad to drop a step, and keep activation checkpointing away, which runs a forward
        twice.
    split_backward: that of `linear_logprob`; for the fused form it only gives weight a gradient of zeros beside main_grad.

    Raises also ValueError for a loss_scale that isn't above 0 and finite, and RuntimeError for a double backward.
    """
    check_tensor("hidden", hidden, FLOATING)
    check_tensor("targets", targets, INDEX, device=hidden.device)
    check_tensor("mask", mask, (torch.bool,), tuple(targets.shape), hidden.device, "pass one bool a target")
    mask = mask & (targets != ignore_index)
    scores = torch.empty(targets.shape, dtype=statistics_dtype(hidden), device=hidden.device)  # a shape for the checks
    tokens, statistics, count = check_arguments(
        scores, old_logprob, advantages, mask, spec, ref_logprob, rollout_logprob, scores, cu_seqlens, sequence_stats,
        denominator,
    )  # fmt: skip
    ends, mask_T = tokens.cu_seqlens, tokens.mask
    if ends is not None:  # the padding behind the last sequence isn't trained on
        ends = ends.clamp(0, len(mask_T))  # where nobody reads their values
        mask_T = mask_T & (torch.arange(len(mask_T), device=mask_T.device) < ends[-1])
    wanted = targets.masked_fill(~mask_T.view(targets.shape), ignore_index)
    head = {
        "temperature": temperature, "bias": bias, "softcap": softcap, "keep_mask": keep_mask, "tp_group": tp_group,
        "vocab_range": vocab_range, "ignore_index": ignore_index, "main_grad": main_grad, "deterministic": deterministic,
    }  # fmt: skip
    scale = check_loss_scale(loss_scale, hidden.device)
    needs = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    implementation = choose("policy_loss", hidden, AVAILABLE)
    apart = implementation == "reference" or (statistics is None and slopes_need_all_logprobs(spec, old_logprob))
    if apart or not torch.is_grad_enabled() or not any(needs):
        scores = linear_logprob(hidden, weight, wanted, **head, split_backward=split_backward)
        result = policy_loss(
            scores.logprob, old_logprob, advantages, mask, spec, ref_logprob=ref_logprob, rollout_logprob=rollout_logprob,
            entropy=scores.entropy, cu_seqlens=cu_seqlens, sequence_stats=sequence_stats, denominator=denominator,
        )  # fmt: skip
        return LinearPolicyLoss(result.loss, scores.logprob.detach(), result.metrics)

    x_TH, targets_T, shape = check_head(hidden, weight, wanted, **head)
    if ends is not None and statistics is None:
        old = tokens.old_logprob
        known = torch.zeros_like(tokens.advantages) if old is None else old  # what isn't known yet is not read
        statistics = reference_stats(spec, known, old, tokens.advantages, mask_T, tokens.rollout_logprob, ends)
    code = encode(spec)
    trained = (x_TH, weight, bias)
    loss, logprob, metrics, *gradients = _linear_policy_loss(
        *(None if tensor is None else tensor.detach() for tensor in trained), targets_T, main_grad, *shape,
        tokens.old_logprob, tokens.advantages, mask_T, tokens.ref_logprob, tokens.rollout_logprob, ends, statistics, count,
        scale, code.choices, code.numbers, implementation, needs,
    )  # fmt: skip
    if main_grad is not None:
        gradients[WEIGHT] = None
    for tensor, gradient, is_needed in zip(trained, gradients, needs, strict=True):
        if is_needed:
            loss = loss + stored_gradient(tensor, gradient, scale, once=main_grad is not None, zeros=split_backward)
    return LinearPolicyLoss(loss, logprob.view(targets.shape), metrics)


def slopes_need_all_logprobs(spec: LossSpec, old_logprob: Tensor | None) -> bool:
    """Whether a token's slope depends on the current log-probs of the rest of its sequence."""
    follows_current = old_logprob is None and spec.correction in SEQUENCE_CORRECTION
    return spec.policy in SEQUENCE_RATIO or spec.opsm_delta is not None or follows_current


def check_loss_scale(loss_scale: float | Tensor, device: torch.device) -> Tensor:
    """fp32, 0-dim, on the device."""
    instead = "pass what the loss is multiplied with before backward, a number or a 0-dim tensor; 1 where it isn't"
    if isinstance(loss_scale, Tensor):
        check_tensor("loss_scale", loss_scale, STATISTICS, (), instead=instead)
        check_positive_values("loss_scale", loss_scale, instead)
        return number_on(device, loss_scale, torch.float32)
    check_positive("loss_scale", loss_scale, instead)
    return filled((), loss_scale, torch.float32, device)


WEIGHT = 1  # of hidden, weight, bias
SEQUENCES = SUMS.index("sequences")


def _run(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, main_grad_VH: Tensor | None,
    inverse_temperature: Tensor | None, scale: float, softcap: float | None, keep_mask: Tensor | None, group_name: str | None,
    old_N: Tensor | None, advantages_N: Tensor, mask_N: Tensor, ref_N: Tensor | None, rollout_N: Tensor | None,
    ends: Tensor | None, statistics: Tensor | None, denominator: Tensor, loss_scale: Tensor,
    choices: Sequence[int], numbers: Sequence[float], implementation: str, needs: Sequence[bool],
):  # fmt: skip
    shape = FlatShape(inverse_temperature, scale, softcap, keep_mask, group_name)
    head = LmHead(hidden_NH, weight_VH, bias_V, targets_N, shape.logit_shape, shape.group)
    gradient = HeadGradient(head, tuple(needs), main_grad_VH)
    score, code = load(implementation, "policy_loss").policy_loss, LossCode(*choices, *numbers)
    old_N, advantages_N, mask_N, ref_N, rollout_N = contiguous(old_N, advantages_N, mask_N, ref_N, rollout_N)
    ends, statistics = contiguous(ends, statistics)
    logprob_N = torch.zeros_like(advantages_N)
    losses, metrics, num_done = [], [], 0
    chunks = list(head.chunks(mask_N)) or [slice(0, 0)]
    if ends is not None and isinstance(chunks[0], Tensor):  # the chunks hold the tokens inside the mask, end to end
        ends = tokens_before(mask_N, ends)
    for rows in chunks:
        logits_nV = head.logits(rows)
        statistics_3n = head.statistics(logits_nV, rows)
        logprob_n, entropy_n, _ = statistics_3n
        old_n, advantages_n, mask_n, ref_n, rollout_n = (
            None if tensor is None else tensor[rows] for tensor in (old_N, advantages_N, mask_N, ref_N, rollout_N)
        )
        own_ends = None if ends is None else (ends - num_done).clamp(0, len(logprob_n))
        loss, chunk_metrics, g_n, h_n = score(
            code, logprob_n, old_n, advantages_n, mask_n, ref_n, rollout_n, entropy_n, own_ends, statistics, denominator
        )
        g_n, h_n = g_n * loss_scale, None if h_n is None else h_n * loss_scale
        gradient.add(rows, head.gradient_(logits_nV, rows, statistics_3n, g_n, h_n, None))
        logprob_N[rows] = logprob_n
        losses.append(loss)
        metrics.append(chunk_metrics)
        num_done += len(logprob_n)
    del logits_nV  # the buffer is free for what finish() takes
    joined = combine_metrics(metrics)
    if statistics is not None:
        joined[SEQUENCES] = (statistics[:, 0] > 0).sum()  # a chunk's count would have those that go on in the next one twice
    gradients = (hidden_NH.new_empty(0) if gradient is None else gradient for gradient in gradient.finish())
    return torch.stack(losses).sum(), logprob_N, joined, *gradients


def _fake(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, main_grad_VH: Tensor | None, *rest):
    needs = list(rest[-1])
    needs[WEIGHT] = needs[WEIGHT] and main_grad_VH is None
    fp32 = (hidden_NH.new_empty(s, dtype=torch.float32) for s in ((), targets_N.shape, (len(METRIC_FIELDS),)))
    tensors = zip((hidden_NH, weight_VH, bias_V), needs, strict=True)
    return *fp32, *(torch.empty_like(tensor) if is_needed else hidden_NH.new_empty(0) for tensor, is_needed in tensors)


_linear_policy_loss = define_op(
    "linear_policy_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor(a!)? main_grad, "
    f"{SHAPE}, Tensor? old_logprob, Tensor advantages, Tensor mask, Tensor? ref_logprob, Tensor? rollout_logprob,"
    " Tensor? cu_seqlens, Tensor? sequence_stats, Tensor denominator, Tensor loss_scale, int[] choices, float[] numbers,"
    " str implementation, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
