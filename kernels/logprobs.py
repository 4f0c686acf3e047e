"""Public ops: log-prob, entropy and logsumexp of target tokens, from hidden states and the LM head or from logits."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import logprob_ops as ops
from .checks import (
    FLOATING,
    INDEX,
    STATISTICS,
    check_positive,
    check_positive_values,
    check_tensor,
    values_may_be_read,
)
from .filled import filled
from .lm_head import local_targets
from .logprob_ops import FlatShape
from .reference.softmax import statistics_dtype

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


class LogprobResult(NamedTuple):
    """fp32 (fp64 for fp64 inputs), of the targets' shape, all differentiable; 0 where the target is ignore_index."""

    logprob: Tensor
    """Natural log of the target's probability under softmax(softcap(logits) / T) over the kept tokens."""
    entropy: Tensor
    """Of that distribution, in nats, over the whole vocabulary."""
    logsumexp: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
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
    split_backward: bool = False,
) -> LogprobResult:
    """Log-prob of `targets` under the LM head, without ever holding all logits: backward makes them again, a chunk at a time
    (8 N H V floating-point operations in all, the bare products 6).

    hidden: [..., H]; weight: [V, H], any floating dtypes; products accumulate in fp32 (fp64 for fp64 inputs). Where CUDA
        multiplies bf16 or fp16, the logits' gradient is rounded to it before backward's products: fp16 needs loss scaling.
    targets: int64 [...], ids of the whole vocabulary. Rows with ignore_index give 0, no gradient, and on a CPU cost nothing.
    temperature: divides the logits; a number or a tensor [...], > 0, not differentiable.
    bias: [V]. softcap: c > 0, logits become c tanh(logits / c), before the temperature (Gemma 2, arXiv 2408.00118).
    keep_mask: bool [..., V], the tokens that sampling kept; the others have probability 0.
    tp_group, vocab_range: vocabulary-parallel; this rank's weight (bias, keep_mask) holds the vocabulary rows
        [start, stop), shards may differ in size and must not overlap. Results are the same on every rank, hidden's gradient
        is summed over the group, and every rank must give the same hidden, targets and upstream gradients.
    main_grad: [V, H] in fp32 (fp64 for fp64 inputs); weight's gradient is added to it in place, and `weight.grad` stays as it
        is (with split_backward it gets zeros).
    deterministic: bit-equal results and gradients from run to run on the same machine and number of threads. No form has
        atomic sums, so on a CPU they always are. On CUDA they are as far as cuBLAS is, which promises it for products on
        several streams only under CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8: True is an error where that isn't set.
    split_backward: hidden's gradient and weight's (and bias's) come from two autograd nodes, each of which makes the logits
        again (10 N H V). For schedules that run dX and dW apart (zero-bubble, DualPipeV): torch.distributed.pipelining calls
        one node of both gradients twice, which would compute everything twice and add to main_grad twice.

    Raises ValueError or TypeError naming the argument. A target outside the vocabulary is a ValueError on a CPU and under
    STROP_KERNELS_DEBUG=1; elsewhere, under torch.compile, and where no vocabulary-parallel shard holds it, its log-prob is
    NaN. Differentiating twice is a RuntimeError.
    """
    x, y, shape = check_head(
        hidden, weight, targets, temperature, bias, softcap, keep_mask, tp_group, vocab_range, ignore_index, main_grad,
        deterministic,
    )  # fmt: skip
    train_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if split_backward and torch.is_grad_enabled() and hidden.requires_grad and train_head:
        fixed_bias = None if bias is None else bias.detach()
        results = ops.linear_logprob(x, weight.detach(), fixed_bias, y, None, *shape)
        values = [result.detach() for result in results]
        zeros = ops.weight_node(weight, bias, x.detach(), y, *values, main_grad, *shape)
        results = [result + zero for result, zero in zip(results, zeros, strict=True)]
    else:
        results = ops.linear_logprob(x, weight, bias, y, main_grad, *shape)
    return LogprobResult(*(values.view(targets.shape) for values in results))


def logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    keep_mask: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_range: tuple[int, int] | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> LogprobResult:
    """`linear_logprob` for logits [..., V] that exist already (a bias belongs into them). Evenly spaced rows of neighbouring
    columns are read where they are; logits of other strides are copied.

    inplace_backward: backward writes the gradient into the logits' own storage, which saves [..., V] numbers; whoever reads
        the logits afterwards reads gradients. A RuntimeError where autograd would: in a second backward of a retained graph,
        and in the backward of any other op that saved these logits. It needs contiguous logits that an op has computed:
        a leaf would become its own gradient.
    The other arguments, the results and the errors are those of `linear_logprob`; -inf logits are tokens of probability 0.
    """
    check_tensor("logits", logits, FLOATING)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: pass [..., V] with at least one token")
    if inplace_backward and not logits.is_contiguous():
        raise ValueError("inplace_backward needs contiguous logits: pass logits.contiguous() or inplace_backward=False")
    if inplace_backward and is_leaf_in_training(logits):
        raise ValueError("inplace_backward would overwrite a leaf that requires grad: pass inplace_backward=False for logits "
                         "that no op has computed")  # fmt: skip
    rows_shape, vocab, dtype = logits.shape[:-1], logits.shape[-1], statistics_dtype(logits)
    first = check_vocabulary(targets, rows_shape, vocab, logits.device, tp_group, vocab_range, ignore_index)
    shape = flat_shape(temperature, softcap, keep_mask, rows_shape, vocab, dtype, logits.device, tp_group)
    rows = logits.reshape(-1, vocab)
    if rows.stride(1) != 1:
        rows = rows.contiguous()  # row kernels read neighbouring columns
    results = ops.logprob(rows, local_targets(targets.reshape(-1), ignore_index, first), inplace_backward, *shape)
    return LogprobResult(*(values.view(rows_shape) for values in results))


def is_leaf_in_training(tensor: Tensor) -> bool:
    """Whether backward would keep a gradient beside this tensor's own storage. (A graph of torch.compile sees no leaves.)"""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not tensor.requires_grad:
        return False
    owner = tensor if tensor._base is None else tensor._base
    return owner.is_leaf and owner.requires_grad


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    keep_mask: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    vocab_range: tuple[int, int] | None,
    ignore_index: int,
    main_grad: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, FlatShape]:
    """(hidden [N, H], columns of this rank's vocabulary rows [N], shape) after checking the arguments of `linear_logprob`."""
    check_tensor("hidden", hidden, FLOATING)
    check_tensor("weight", weight, FLOATING, device=hidden.device)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} don't fit: pass [..., H] and [V, H]")
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: every rank needs at least one vocabulary row")
    rows_shape, vocab, dtype = hidden.shape[:-1], weight.shape[0], statistics_dtype(hidden)
    if statistics_dtype(weight) != dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: use float64 for both or for neither")
    if bias is not None:
        check_tensor("bias", bias, FLOATING, (vocab,), hidden.device, "pass one number for each row of weight")
    if main_grad is not None:
        check_tensor("main_grad", main_grad, (dtype,), tuple(weight.shape), hidden.device, "pass zeros of weight's shape")
        if main_grad.requires_grad:
            raise ValueError("main_grad.requires_grad is True, but gradients are added to it in place: pass main_grad.detach()")
        if any(size > 1 and stride == 0 for size, stride in zip(main_grad.shape, main_grad.stride(), strict=True)):
            raise ValueError(f"main_grad has strides {main_grad.stride()}, several entries in one place: pass main_grad.clone("
                             "memory_format=torch.contiguous_format)")  # fmt: skip
        if torch.is_grad_enabled() and not weight.requires_grad:
            raise ValueError("main_grad is given but weight.requires_grad is False: leave main_grad out, or train the weight")
    if deterministic and hidden.is_cuda and os.environ.get(WORKSPACE_VARIABLE) not in (":4096:8", ":16:8"):
        raise ValueError(f"deterministic=True needs {WORKSPACE_VARIABLE}=:4096:8 in the environment before CUDA starts")
    first = check_vocabulary(targets, rows_shape, vocab, hidden.device, tp_group, vocab_range, ignore_index)
    shape = flat_shape(temperature, softcap, keep_mask, rows_shape, vocab, dtype, hidden.device, tp_group)
    return hidden.reshape(-1, hidden.shape[-1]), local_targets(targets.reshape(-1), ignore_index, first), shape


def check_vocabulary(
    targets: Tensor,
    rows_shape: torch.Size,
    vocab: int,
    device: torch.device,
    tp_group: dist.ProcessGroup | None,
    vocab_range: tuple[int, int] | None,
    ignore_index: int,
) -> int:
    """The first token id of this rank's vocabulary rows, after checking targets against the range."""
    instead = "pass one id for each row; the last hidden state of a sequence, which has no next token, can get ignore_index"
    check_tensor("targets", targets, INDEX, tuple(rows_shape), device, instead)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is a {type(ignore_index).__name__}: pass an int, -100 by default")
    if (tp_group is None) != (vocab_range is None):
        given, missing = ("vocab_range", "tp_group") if tp_group is None else ("tp_group", "vocab_range")
        raise ValueError(f"{given} is given without {missing}: a vocabulary-parallel head needs both, a whole one neither")
    if vocab_range is not None and (len(vocab_range) != 2 or not all(isinstance(edge, int) for edge in vocab_range)):
        raise TypeError(f"vocab_range {vocab_range}: pass two ints (start, start + {vocab})")
    first, stop = (0, vocab) if vocab_range is None else vocab_range
    if first < 0 or stop - first != vocab:
        raise ValueError(f"vocab_range {vocab_range} doesn't fit this rank's {vocab} tokens: pass (start, start + {vocab})")
    if values_may_be_read(device) and targets.numel():
        kept = targets[targets != ignore_index]
        largest = stop - 1 if tp_group is None else torch.iinfo(torch.int64).max
        wrong = kept[(kept < 0) | (kept > largest)]
        if wrong.numel():
            raise ValueError(f"targets holds {int(wrong[0])}, not in 0..{largest}: give rows without a target {ignore_index}")
    return first


def flat_shape(
    temperature: float | Tensor,
    softcap: float | None,
    keep_mask: Tensor | None,
    rows_shape: torch.Size,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    tp_group: dist.ProcessGroup | None,
) -> FlatShape:
    """What the flat ops take, after checking it."""
    if softcap is not None:
        check_positive("softcap", softcap, "pass a number; None leaves the logits alone")
    if keep_mask is not None:
        instead = "pass one bool for each row and token of this rank"
        check_tensor("keep_mask", keep_mask, (torch.bool,), (*rows_shape, vocab), device, instead)
        keep_mask = keep_mask.reshape(-1, vocab)
        keep_mask = keep_mask if keep_mask.stride(1) == 1 else keep_mask.contiguous()
    group_name = None if tp_group is None else tp_group.group_name
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature, "pass a number or one for each row (score greedy samples at 1)")
        if temperature == 1 or not torch.compiler.is_compiling():
            return FlatShape(None, 1.0 / temperature, softcap, keep_mask, group_name)
        return FlatShape(filled((rows_shape.numel(),), 1.0 / temperature, dtype, device), 1.0, softcap, keep_mask, group_name)
    instead = "pass a number, or one for each row: temperature.expand(...) of a single one"
    check_tensor("temperature", temperature, STATISTICS, tuple(rows_shape), device, instead)
    check_positive_values("temperature", temperature, "score greedy samples at 1")
    inverse_temperature = temperature.detach().to(dtype).reshape(-1).reciprocal()
    return FlatShape(inverse_temperature, 1.0, softcap, keep_mask, group_name)
