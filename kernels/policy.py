"""Public ops: the policy loss and the whole-sequence statistics that it needs under context parallelism."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import STATISTICS, check_instance, check_positive, check_tensor, values_may_be_read
from .dispatch import choose, define_op, load, refuse_double_backward
from .filled import filled, number_on
from .loss_code import NUM_CHOICES, LossCode, encode
from .metrics import METRIC_FIELDS
from .reference import policy_loss as reference
from .reference.policy_loss import SEQUENCE_FIELDS
from .specs import LossSpec, denominator_kind

AVAILABLE = ("reference", "triton", "cuda", "cpu")


class PolicyLoss(NamedTuple):
    loss: Tensor
    """0-dim, in the dtype of logprob; its gradient reaches logprob and entropy."""
    metrics: Tensor
    """fp32 [len(METRIC_FIELDS)], detached: `combine_metrics` joins several, `summarize_metrics` reads them."""


class TokenTensors(NamedTuple):
    """Arguments of one call, all [T] and detached where no gradient may flow, and its boundaries."""

    logprob: Tensor
    old_logprob: Tensor | None
    advantages: Tensor
    mask: Tensor
    ref_logprob: Tensor | None
    rollout_logprob: Tensor | None
    entropy: Tensor | None
    cu_seqlens: Tensor | None
    """int64 [S + 1]; None only where the spec needs no sequences."""


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    spec: LossSpec,
    *,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_stats: Tensor | None = None,
    denominator: float | Tensor,
) -> PolicyLoss:
    """Loss of a micro-batch under `spec`, as its share of the optimizer step's loss, and metrics; no host sync.

    logprob: [T] packed or [B, L] dense, fp32 or fp64; every other token tensor has the same shape, any floating dtype.
    old_logprob: of the policy before the step's first update; None is the detached current one (ratio 1, slope A).
    mask: bool, the trainable tokens; what the others hold, NaN included, has no effect.
    ref_logprob: needed by kl_coef > 0. rollout_logprob: by a correction or opsm_delta. entropy: by entropy_coef > 0. Given
        without need, they are only measured.
    cu_seqlens: int32 or int64 [S + 1], ascending from 0; sequence s is tokens cu_seqlens[s] : cu_seqlens[s + 1] and those
        behind the last are padding. Packed only, and needed where `spec.needs_sequences`; the rows of a dense batch are its
        sequences.
    sequence_stats: [S, len(SEQUENCE_FIELDS)], the sum over context-parallel ranks of `sequence_stats(...)`; None where this
        call holds whole sequences. The metric `sequences` then counts the whole sequences, on each of these ranks the same.
    denominator: > 0, counted over the whole step and all ranks; which count, `denominator_kind(spec)` says. A tensor may hold
        0 where nothing is trainable: loss and gradients are 0.

    A kernel computes loss, gradients and metrics in one launch; kept for backward are the gradients, 4 bytes a token (8 with
    an entropy bonus), which the upstream gradient multiplies. float64, STROP_KERNELS=reference and devices without a kernel
    take the plain-torch form, which autograd differentiates.

    Raises ValueError or TypeError naming the argument, RuntimeError for a double backward through a kernel. What cu_seqlens
    and a tensor denominator hold is checked on a CPU and under STROP_KERNELS_DEBUG=1; elsewhere wrong boundaries give wrong
    numbers, but nothing outside the tensors is read or written. Non-finite inputs inside the mask make the loss non-finite
    and are counted in the metrics.
    """
    tokens, sequence_stats, denominator = check_arguments(
        logprob, old_logprob, advantages, mask, spec, ref_logprob, rollout_logprob, entropy, cu_seqlens, sequence_stats,
        denominator,
    )  # fmt: skip
    implementation = choose("policy_loss", logprob, AVAILABLE)
    if implementation == "reference":
        return PolicyLoss(*reference.policy_loss(spec, *tokens, sequence_stats, denominator))
    code = encode(spec)
    loss, metrics, *_ = _policy_loss(*tokens, sequence_stats, denominator, code.choices, code.numbers, implementation)
    return PolicyLoss(loss, metrics)


def sequence_stats(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    spec: LossSpec,
    *,
    rollout_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """[S, len(SEQUENCE_FIELDS)]: what `policy_loss` must know of whole sequences, summed over the tokens given, detached.
    Always the first column, the tokens; the others hold 0 unless `spec.needs_sequence_sums`. Bit-equal from run to run.

    Under context parallelism each rank calls this with its tokens of the same S sequences (empty ones where it has none),
    the results are summed over the ranks and passed to `policy_loss`. Arguments and errors are those of `policy_loss`.
    """
    tokens = check_tokens(logprob, old_logprob, advantages, mask, spec, rollout_logprob, cu_seqlens)
    if tokens.cu_seqlens is None:
        raise ValueError("sequence_stats needs cu_seqlens for packed tokens: pass the int32 [S + 1] boundaries")
    return reference.sequence_stats(spec, *tokens[:4], tokens.rollout_logprob, tokens.cu_seqlens)


def check_arguments(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    spec: LossSpec,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    entropy: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_stats: Tensor | None,
    denominator: float | Tensor,
) -> tuple[TokenTensors, Tensor | None, Tensor]:
    """(tokens, sequence_stats, denominator) of `policy_loss`, checked, in the dtype and on the device of logprob."""
    tokens = check_tokens(logprob, old_logprob, advantages, mask, spec, rollout_logprob, cu_seqlens, ref_logprob, entropy)
    if spec.kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef {spec.kl_coef} needs ref_logprob: pass it, or set kl_coef to 0")
    if spec.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef {spec.entropy_coef} needs entropy: pass it, or set entropy_coef to 0")
    if sequence_stats is not None:
        if tokens.cu_seqlens is None:
            raise ValueError("sequence_stats is given without cu_seqlens: pass the boundaries that it was made with")
        shape = (len(tokens.cu_seqlens) - 1, len(SEQUENCE_FIELDS))
        instead = "pass what sequence_stats(...) of the same cu_seqlens gives, summed over the ranks"
        check_tensor("sequence_stats", sequence_stats, STATISTICS, shape, logprob.device, instead)
        sequence_stats = sequence_stats.detach().to(logprob.dtype)
    return tokens, sequence_stats, check_denominator(denominator, tokens, spec)


def check_denominator(denominator: float | Tensor, tokens: TokenTensors, spec: LossSpec) -> Tensor:
    """0-dim, in the dtype and on the device of the tokens."""
    logprob = tokens.logprob
    instead = f"pass the step's count of {denominator_kind(spec)}, a number or a 0-dim tensor"
    if not isinstance(denominator, Tensor):
        check_positive("denominator", denominator, instead)
        return filled((), denominator, logprob.dtype, logprob.device)
    check_tensor("denominator", denominator, (*STATISTICS, torch.int32, torch.int64), (), instead=instead)
    if values_may_be_read(logprob.device):
        value, ends = denominator.item(), tokens.cu_seqlens
        trained = tokens.mask if ends is None else tokens.mask[: int(ends[-1])]
        if not 0 <= value < math.inf or (value == 0 and trained.any()):
            raise ValueError(f"denominator holds {value}: must be above 0 and finite; {instead}")
    return number_on(logprob.device, denominator, logprob.dtype)


def check_boundaries(cu_seqlens: Tensor, num_tokens: int) -> None:
    """ValueError unless cu_seqlens ascends from 0 to num_tokens at most, on devices whose values may be read."""
    if not values_may_be_read(cu_seqlens.device):
        return
    ends = cu_seqlens.tolist()
    if ends[0] == 0 and ends == sorted(ends) and ends[-1] <= num_tokens:
        return
    wrong, why = 0, "the first sequence starts at token 0: begin with 0"
    if ends[0] == 0:
        falls = (s for s in range(1, len(ends)) if ends[s] < ends[s - 1])
        wrong = next(falls, len(ends) - 1)
        why = f"there are only {num_tokens} tokens: end with at most that"
        if ends[wrong] < ends[wrong - 1]:
            why = f"below cu_seqlens[{wrong - 1}] = {ends[wrong - 1]}: pass the running sums of the lengths"
    raise ValueError(f"cu_seqlens[{wrong}] is {ends[wrong]}, but {why}")


def check_tokens(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    spec: LossSpec,
    rollout_logprob: Tensor | None,
    cu_seqlens: Tensor | None,
    ref_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
) -> TokenTensors:
    """The arguments of `policy_loss`, checked, flattened and in logprob's dtype."""
    check_instance("spec", spec, LossSpec)
    check_tensor("logprob", logprob, STATISTICS)
    if logprob.dim() not in (1, 2):
        raise ValueError(f"logprob has shape {tuple(logprob.shape)}: pass packed [T] or dense [B, L]")
    shape, device = tuple(logprob.shape), logprob.device
    one_each = f"pass one number a token, as logprob {shape} has"
    check_tensor("mask", mask, (torch.bool,), shape, device, one_each)
    per_sequence = "repeat_interleave one number a sequence by the lengths" if logprob.dim() == 1 else "expand [B, 1]"
    instead = f"{one_each} ({per_sequence})"
    named = {
        "old_logprob": old_logprob, "advantages": advantages, "rollout_logprob": rollout_logprob, "ref_logprob": ref_logprob,
        "entropy": entropy,
    }  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None or name == "advantages":
            check_tensor(name, tensor, (*STATISTICS, torch.bfloat16, torch.float16), shape, device, instead)
    if spec.needs_rollout_logprob and rollout_logprob is None:
        why = f"correction {spec.correction!r}" if spec.correction != "none" else f"opsm_delta {spec.opsm_delta}"
        raise ValueError(f"{why} needs rollout_logprob: pass the sampler's log-probs, or turn it off")
    if logprob.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError(f"cu_seqlens goes with packed [T] tensors, logprob is dense {shape}: leave it out, or flatten")
        cu_seqlens = torch.arange(shape[0] + 1, device=device) * shape[1]
    elif cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), device=device)
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [S + 1]: pass 0 and the running sums "
                             "of the lengths")  # fmt: skip
        check_boundaries(cu_seqlens, shape[0])
    elif spec.needs_sequences:
        raise ValueError(
            f"policy {spec.policy!r}, aggregation {spec.aggregation!r}, correction {spec.correction!r} and opsm_delta "
            f"{spec.opsm_delta} need whole sequences: pass cu_seqlens, or dense [B, L] tensors"
        )

    def flat(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or (tensor.dim() == 1 and tensor.dtype == logprob.dtype):
            return tensor  # without 2 us of calls that change nothing
        return tensor.reshape(-1).to(logprob.dtype)

    def constant(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else flat(tensor.detach())

    return TokenTensors(
        flat(logprob), constant(old_logprob), constant(advantages), mask.reshape(-1), constant(ref_logprob),
        constant(rollout_logprob), flat(entropy), None if cu_seqlens is None else cu_seqlens.to(torch.int64),
    )  # fmt: skip


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """What a form takes: it reads memory from the first element on and knows no strides."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _run(
    logprob: Tensor, old_logprob: Tensor | None, advantages: Tensor, mask: Tensor, ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None, entropy: Tensor | None, cu_seqlens: Tensor | None, sequence_stats: Tensor | None,
    denominator: Tensor, choices: Sequence[int], numbers: Sequence[float], implementation: str,
):  # fmt: skip
    loss, metrics, d_logprob, d_entropy = load(implementation, "policy_loss").policy_loss(
        LossCode(*choices, *numbers),
        *contiguous(logprob, old_logprob, advantages, mask, ref_logprob, rollout_logprob, entropy, cu_seqlens, sequence_stats),
        denominator,
    )
    return loss, metrics, d_logprob, logprob.new_empty(0) if d_entropy is None else d_entropy


def _fake(logprob: Tensor, *arguments):
    *_, numbers, _ = arguments
    num_tokens = len(logprob)
    with_entropy = numbers[LossCode._fields.index("entropy_coef") - NUM_CHOICES] != 0
    shapes = ((), (len(METRIC_FIELDS),), (num_tokens,), (num_tokens if with_entropy else 0,))
    return tuple(logprob.new_empty(shape) for shape in shapes)


def _save(ctx, inputs, output) -> None:
    _, *constants = output
    ctx.mark_non_differentiable(*constants)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*constants[1:])


def _backward(ctx, upstream: Tensor, *_):
    refuse_double_backward("policy_loss")
    d_logprob, d_entropy = ctx.saved_tensors
    gradients = [None] * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[LOGPROB]:
        gradients[LOGPROB] = upstream * d_logprob
    if ctx.needs_input_grad[ENTROPY] and d_entropy.shape == d_logprob.shape:
        gradients[ENTROPY] = upstream * d_entropy
    return tuple(gradients)


LOGPROB, ENTROPY = (TokenTensors._fields.index(name) for name in ("logprob", "entropy"))
_policy_loss = define_op(
    "policy_loss(Tensor logprob, Tensor? old_logprob, Tensor advantages, Tensor mask, Tensor? ref_logprob,"
    " Tensor? rollout_logprob, Tensor? entropy, Tensor? cu_seqlens, Tensor? sequence_stats, Tensor denominator,"
    " int[] choices, float[] numbers, str implementation)"
    " -> (Tensor loss, Tensor metrics, Tensor d_logprob, Tensor d_entropy)",
    _run,
    _fake,
    save=_save,
    backward=_backward,
)
