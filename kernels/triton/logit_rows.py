"""Row kernels of a softmax over the vocabulary: statistics in one read of the logits, their gradient in one read and write.

Every thread keeps a softmax of its own over the 16 bytes that it loads each time round, so that nothing is exchanged between
threads before the row ends, and an element costs one exponential. Sums are taken relative to the running maximum of the
logits *before* the temperature: differences of large logits are exact, and the temperature rides on the conversion to base 2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.softmax import IGNORED
from .ahead_of_time import BF16, BOOL, FP16, FP32, INT64, AotCase
from .elementary import expm1, tanh

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
UNDERFLOW = tl.constexpr(-1e4)
"""2^-1e4 is 0 in fp32, and 0 * -1e4 is 0, whereas 0 * -inf would be NaN."""
SKIPPED = tl.constexpr(IGNORED)
LANES_OF_WARP = 128
"""16-byte lanes of one warp: 4 loads in flight a thread, 64 kB a multiprocessor that holds 32 warps."""
MAX_WARPS = 8
PROGRAMS = 264
"""Two for each of an H100's 132 multiprocessors: with fewer rows than this, the statistics of a row are shared by
several programs. A gradient's aren't: who writes in place would overwrite the target's logit, which all of them need."""
MAX_SPLITS = 16


@triton.jit
def load_values(logits_ptr, bias_ptr, keep_ptr, columns, inside, softcap):
    """v, the logits with bias and softcap, before the temperature; -inf outside and where the token isn't kept."""
    v = tl.load(logits_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        v = softcap * tanh(v / softcap)
    if keep_ptr is not None:
        inside = inside & (tl.load(keep_ptr + columns, mask=inside, other=0) != 0)
    if softcap is not None or keep_ptr is not None:
        v = tl.where(inside, v, -float("inf"))
    return v


@triton.jit
def finite(maximum):
    """-inf (nothing kept so far) -> 0, so that -inf - maximum stays -inf instead of NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def join_softmaxes(largest, total, weighted, to_log2):
    """Sums of several softmaxes (a vector of each) relative to their common maximum: (largest, total, weighted)."""
    maximum = tl.max(largest, axis=0)
    shift = tl.maximum((largest - finite(maximum)) * to_log2, UNDERFLOW)
    factor = tl.exp2(shift)
    return maximum, tl.sum(factor * total, axis=0), tl.sum(factor * (weighted + shift * total), axis=0)


@triton.jit
def store_statistics(
    out_ptr, row, num_rows, ignored, rate, largest, total, weighted, target_value, found, PARTIAL: tl.constexpr
):  # fmt: skip
    """largest and target_value before the temperature 1 / rate, weighted in base 2."""
    cell, nothing = out_ptr + row, -float("inf")
    if PARTIAL:
        tl.store(cell, tl.where(ignored, nothing, largest * rate))
        tl.store(cell + num_rows, total)
        tl.store(cell + 2 * num_rows, weighted * LN_2)
        tl.store(cell + 3 * num_rows, target_value * rate)
        tl.store(cell + 4 * num_rows, found.to(tl.float32))
    else:
        base, log_total = finite(largest), tl.log(total)
        logprob = tl.where(found, (target_value - base) * rate - log_total, float("nan"))
        tl.store(cell, tl.where(ignored, 0.0, logprob))
        tl.store(cell + num_rows, tl.where(ignored, 0.0, log_total - weighted * LN_2 / total))
        tl.store(cell + 2 * num_rows, tl.where(ignored, 0.0, base * rate + log_total))


@triton.jit(do_not_specialize=["num_rows"])
def logit_statistics_kernel(
    logits_ptr, targets_ptr, rate_ptr, bias_ptr, keep_ptr, out_ptr, rate, softcap,
    num_rows, vocab, span, row_stride, keep_stride, PARTIAL: tl.constexpr, SPLIT: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Columns [split * span, (split + 1) * span) of one row. SPLIT: the sums go to out [splits, 5, num_rows] as they are."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    target = tl.load(targets_ptr + row)
    ignored = target == SKIPPED
    if rate_ptr is not None:
        rate = tl.load(rate_ptr + row)
    to_log2 = rate * LOG2_E
    logits_ptr += row * row_stride
    if keep_ptr is not None:
        keep_ptr += row * keep_stride
    first = split * span
    stop = tl.where(ignored, first, tl.minimum(first + span, vocab))  # an ignored row has no columns

    lane_columns = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    largest = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for start in range(first, stop, LANES * WIDTH):
        columns = start + lane_columns
        v = load_values(logits_ptr, bias_ptr, keep_ptr, columns, columns < stop, softcap)
        maximum = tl.maximum(largest, tl.max(v, axis=1))
        base = finite(maximum)
        shift = tl.maximum((largest - base) * to_log2, UNDERFLOW)
        exponent = (v - base[:, None]) * to_log2
        mass, factor = tl.exp2(exponent), tl.exp2(shift)
        weighted = factor * (weighted + shift * total) + tl.sum(mass * tl.maximum(exponent, UNDERFLOW), axis=1)
        total = factor * total + tl.sum(mass, axis=1)  # a NaN logit reaches every statistic through here
        largest = maximum
    largest, total, weighted = join_softmaxes(largest, total, weighted, to_log2)

    found = (target >= first) & (target < stop)
    target_value = load_values(logits_ptr, bias_ptr, keep_ptr, target, found, softcap)
    target_value = tl.where(found, target_value, 0.0)
    if SPLIT:
        cell = out_ptr + split.to(tl.int64) * 5 * num_rows + row
        tl.store(cell, largest)
        tl.store(cell + num_rows, total)
        tl.store(cell + 2 * num_rows, weighted)
        tl.store(cell + 3 * num_rows, target_value)
        tl.store(cell + 4 * num_rows, found.to(tl.float32))
    else:
        store_statistics(
            out_ptr, row, num_rows, ignored, rate, largest, total, weighted, target_value, found, PARTIAL
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def join_splits_kernel(
    splits_ptr, targets_ptr, rate_ptr, out_ptr, rate, num_rows, num_splits, PARTIAL: tl.constexpr, MAX_SPLITS: tl.constexpr
):  # fmt: skip
    """One row of logit_statistics_kernel's SPLIT result [splits, 5, num_rows]."""
    row = tl.program_id(0).to(tl.int64)
    ignored = tl.load(targets_ptr + row) == SKIPPED
    if rate_ptr is not None:
        rate = tl.load(rate_ptr + row)
    splits = tl.arange(0, MAX_SPLITS)
    real = splits < num_splits
    cells = splits_ptr + splits.to(tl.int64) * 5 * num_rows + row
    largest = tl.load(cells, mask=real, other=-float("inf"))
    total = tl.load(cells + num_rows, mask=real, other=0.0)
    weighted = tl.load(cells + 2 * num_rows, mask=real, other=0.0)
    target_value = tl.sum(tl.load(cells + 3 * num_rows, mask=real, other=0.0), axis=0)
    found = tl.sum(tl.load(cells + 4 * num_rows, mask=real, other=0.0), axis=0) > 0
    largest, total, weighted = join_softmaxes(largest, total, weighted, rate * LOG2_E)
    store_statistics(out_ptr, row, num_rows, ignored, rate, largest, total, weighted, target_value, found, PARTIAL)


@triton.jit(do_not_specialize=["num_rows", "statistics_stride"])
def logit_gradient_kernel(
    logits_ptr, targets_ptr, statistics_ptr, g_ptr, h_ptr, k_ptr, rate_ptr, bias_ptr, keep_ptr, out_ptr, rate, softcap,
    num_rows, vocab, row_stride, statistics_stride, keep_stride, out_stride, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row. Rows last first: the L2 (50 MB) holds those that the statistics kernel read last."""
    row = num_rows - 1 - tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logprob = tl.load(statistics_ptr + row)
    entropy = tl.load(statistics_ptr + statistics_stride + row)
    logsumexp = tl.load(statistics_ptr + 2 * statistics_stride + row)
    g = tl.load(g_ptr + row) if g_ptr is not None else 0.0
    h = tl.load(h_ptr + row) if h_ptr is not None else 0.0
    k = tl.load(k_ptr + row) if k_ptr is not None else 0.0
    live = (target != SKIPPED) & ((g != 0.0) | (h != 0.0) | (k != 0.0))  # NaN is not 0
    if rate_ptr is not None:
        rate = tl.load(rate_ptr + row)
    logits_ptr += row * row_stride
    out_ptr += row * out_stride
    if keep_ptr is not None:
        keep_ptr += row * keep_stride

    # log p = z - logsumexp, from the nearer of two fixed points: with logits of 1e4, fp32 holds logsumexp to 5e-4 only, but
    # the distance to the target's logit exactly.
    here = live & (target >= 0) & (target < vocab)
    target_value = load_values(logits_ptr, bias_ptr, keep_ptr, target, here, softcap)
    tl.debug_barrier()  # every warp has it before one writes there: out may be the logits
    near = here & (tl.abs(logprob) < tl.abs(logsumexp)) & (tl.abs(target_value) < float("inf"))
    anchor = tl.where(near, target_value, 0.0)
    offset = tl.where(live, tl.where(near, logprob, -logsumexp), 0.0)

    slope = k - g
    if h_ptr is not None:
        slope -= tl.where(h == 0.0, 0.0, h * entropy)  # an infinite entropy without an upstream gradient makes no NaN
    slope = tl.where(live, slope, 0.0)
    at_target = slope + g
    if h_ptr is not None:
        at_target -= h * tl.maximum(logprob, UNDERFLOW)
    at_target = tl.exp(logprob) * at_target
    if g_ptr is not None:
        at_target -= g * expm1(logprob)  # g (1 - p): a rounded p would cost all digits of a small 1 - p that log p has
    target_column = tl.where(here, target, -1).to(tl.int32)

    lane_columns = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    for start in range(0, vocab, LANES * WIDTH):
        columns = start + lane_columns
        inside = columns < vocab
        v = load_values(logits_ptr, bias_ptr, keep_ptr, columns, inside & live, softcap)
        log_p = (v - anchor) * rate + offset
        du = tl.exp(log_p)
        if h_ptr is not None:
            du *= slope - tl.where(live, h, 0.0) * tl.maximum(log_p, UNDERFLOW)
        else:
            du *= slope
        du = tl.where(columns == target_column, at_target, du) * rate
        if softcap is not None:
            tangent = v / softcap
            du *= 1.0 - tangent * tangent
        if softcap is not None or keep_ptr is not None:
            du = tl.where(v == -float("inf"), 0.0, du)
        tl.store(out_ptr + columns, du.to(out_ptr.dtype.element_ty), mask=inside)


def tile(vocab: int, element_size: int) -> dict[str, int]:
    """16 bytes a lane; a row of fewer lanes than 8 warps have gets fewer warps."""
    width = 16 // element_size
    num_warps = min(max(triton.next_power_of_2(triton.cdiv(vocab, width * LANES_OF_WARP)), 1), MAX_WARPS)
    return {"LANES": LANES_OF_WARP * num_warps, "WIDTH": width, "num_warps": num_warps}


def column_splits(num_rows: int, vocab: int, block: int) -> tuple[int, int]:
    """(programs that share a row, columns of each, a multiple of its block): one where rows enough fill the device."""
    blocks = max(triton.cdiv(vocab, block), 1)
    blocks_each = triton.cdiv(blocks, min(triton.cdiv(PROGRAMS, num_rows), blocks, MAX_SPLITS))
    return triton.cdiv(blocks, blocks_each), blocks_each * block


class RowArguments(NamedTuple):
    """What both kernels take beside logits and targets, as they take it."""

    rate_N: Tensor | None
    bias_V: Tensor | None
    keep_mask_NV: Tensor | None
    rate: float
    softcap: float | None
    keep_stride: int


def row_arguments(
    inverse_temperature: float | Tensor, softcap: float | None, bias_V: Tensor | None, keep_mask_NV: Tensor | None
) -> RowArguments:
    per_row = isinstance(inverse_temperature, Tensor)
    return RowArguments(
        rate_N=inverse_temperature.contiguous() if per_row else None,
        bias_V=None if bias_V is None else bias_V.contiguous(),
        keep_mask_NV=keep_mask_NV,
        rate=1.0 if per_row else float(inverse_temperature),
        softcap=None if softcap is None else float(softcap),
        keep_stride=0 if keep_mask_NV is None else keep_mask_NV.stride(0),
    )


def logit_statistics(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    inverse_temperature: float | Tensor,
    softcap: float | None,
    bias_V: Tensor | None,
    keep_mask_NV: Tensor | None,
    partial: bool,
) -> Tensor:
    """As the reference; one launch, two where a few long rows are split over programs."""
    num_rows, vocab = logits_NV.shape
    out = torch.empty(5 if partial else 3, num_rows, dtype=torch.float32, device=logits_NV.device)
    if not num_rows:
        return out
    rows = row_arguments(inverse_temperature, softcap, bias_V, keep_mask_NV)
    targets_N, meta = targets_N.contiguous(), tile(vocab, logits_NV.element_size())
    splits, span = column_splits(num_rows, vocab, meta["LANES"] * meta["WIDTH"])
    sums = out if splits == 1 else torch.empty(splits, 5, num_rows, dtype=torch.float32, device=out.device)
    logit_statistics_kernel[(num_rows, splits)](
        logits_NV, targets_N, rows.rate_N, rows.bias_V, rows.keep_mask_NV, sums, rows.rate, rows.softcap,
        num_rows, vocab, span, logits_NV.stride(0), rows.keep_stride, PARTIAL=partial, SPLIT=splits > 1, **meta,
    )  # fmt: skip
    if splits > 1:
        join_splits_kernel[(num_rows,)](
            sums, targets_N, rows.rate_N, out, rows.rate, num_rows, splits, PARTIAL=partial, MAX_SPLITS=MAX_SPLITS, num_warps=1
        )
    return out


def logit_gradient(
    logits_NV: Tensor,
    targets_N: Tensor,
    statistics_3N: Tensor,
    g_N: Tensor | None,
    h_N: Tensor | None,
    k_N: Tensor | None,
    *,
    inverse_temperature: float | Tensor,
    softcap: float | None,
    bias_V: Tensor | None,
    keep_mask_NV: Tensor | None,
    out_NV: Tensor,
) -> None:
    """As the reference, in one launch. out_NV is logits_NV or shares no memory with it."""
    num_rows, vocab = logits_NV.shape
    if not num_rows:
        return
    rows = row_arguments(inverse_temperature, softcap, bias_V, keep_mask_NV)
    upstream = (None if gradient is None else gradient.contiguous() for gradient in (g_N, h_N, k_N))
    logit_gradient_kernel[(num_rows,)](
        logits_NV, targets_N.contiguous(), statistics_3N, *upstream, rows.rate_N, rows.bias_V, rows.keep_mask_NV, out_NV,
        rows.rate, rows.softcap, num_rows, vocab, logits_NV.stride(0), statistics_3N.stride(0), rows.keep_stride,
        out_NV.stride(0), **tile(vocab, logits_NV.element_size()),
    )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """A vocabulary's size is a run-time number; 32000, 49152, 128256 and 151936 are all multiples of 16 and compile alike."""
    sizes = dict.fromkeys(("vocab", "row_stride", "keep_stride"), "i32:16") | {"num_rows": "i32"}
    plain = {"rate_ptr": None, "bias_ptr": None, "keep_ptr": None, "softcap": None}
    rows = {"targets_ptr": INT64, "rate": "fp32", **plain, **sizes}
    shaped = {"rate_ptr": FP32, "bias_ptr": BF16, "keep_ptr": BOOL, "softcap": "fp32"}
    upstream = {"statistics_ptr": FP32, "g_ptr": FP32, "h_ptr": FP32, "k_ptr": FP32, "out_stride": "i32:16",
                "statistics_stride": "i32"}  # fmt: skip
    cases = []

    def add(kernel, label: str, logits: str, **others) -> None:
        meta = tile(128256, 4 if logits == FP32 else 2)
        num_warps = meta.pop("num_warps")
        cases.append(AotCase(kernel, {"logits_ptr": logits, **rows, **meta, **others}, num_warps, label=label))

    for logits, name in ((BF16, "bf16"), (FP16, "fp16"), (FP32, "fp32")):
        whole = {"out_ptr": FP32, "span": "i32:16", "PARTIAL": False, "SPLIT": False}
        add(logit_statistics_kernel, name, logits, **whole)
        add(logit_gradient_kernel, f"{name} in place", logits, **upstream, out_ptr=logits)
    add(logit_statistics_kernel, "bf16 shaped", BF16, **whole | shaped | {"PARTIAL": True})
    add(logit_statistics_kernel, "fp32 shaped", FP32, **whole | shaped)
    add(logit_statistics_kernel, "bf16 split", BF16, **whole | {"SPLIT": True})
    add(logit_gradient_kernel, "bf16 shaped", BF16, **upstream | shaped, out_ptr=BF16)
    add(logit_gradient_kernel, "fp32 to bf16", FP32, **upstream | {"h_ptr": None, "k_ptr": None}, out_ptr=BF16)
    add(logit_gradient_kernel, "fp32 to bf16 shaped", FP32, **upstream | shaped, out_ptr=BF16)
    single = {"vocab": 1, "row_stride": 1}  # Triton compiles a 1 into the kernel
    add(logit_statistics_kernel, "one logit", FP32, **whole | single)
    add(logit_gradient_kernel, "one logit", FP32, **upstream | single | {"out_stride": 1}, out_ptr=FP32)
    join = {"splits_ptr": FP32, "targets_ptr": INT64, "rate_ptr": None, "out_ptr": FP32, "rate": "fp32", "num_rows": "i32",
            "num_splits": "i32", "PARTIAL": False, "MAX_SPLITS": MAX_SPLITS}  # fmt: skip
    return [*cases, AotCase(join_splits_kernel, join, 1)]
