"""Row statistics of a softmax over a vocabulary that arrives in blocks, and the gradient of the logits.

With z = softcap * tanh(u / softcap) / T, u the raw logits, and p = softmax(z) over the kept tokens:
    logprob = z_y - lse,   H = lse - sum_j p_j z_j,   lse = log sum_j e^z_j
    dz_j = g (1[j = y] - p_j) - h p_j (log p_j + H) + k p_j          g, h, k: upstream gradients of logprob, H, lse
    du_j = dz_j (1 - tanh^2(u_j / softcap)) / T

Accuracy, of every form: an fp32 log-prob is right to a few 1e-7 in absolute terms plus 1e-7 of its size, as in eager torch.
So the probability of a nearly certain token, and its gradient g (1 - p), are no better than that: where 1 - p is below
6e-8, both log p and 1 - p come out as 0, since 1 + (1 - p) rounds to 1 in the sum of exponentials.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = torch.iinfo(torch.int64).min
"""The target of a row that counts for nothing, STROP_IGNORED in csrc/include/strop.h."""
UNDERFLOW = -1e4
"""e^-1e4 is 0 in fp32 and fp64, and 0 * -1e4 is 0, whereas 0 * -inf would be NaN."""


class LogitShape(NamedTuple):
    """What happens between a raw logit and the softmax."""

    inverse_temperature: float | Tensor
    """1 / T, a number or [N]."""
    softcap: float | None
    keep_mask: Tensor | None
    """bool [N, V]; tokens outside take no part."""

    def select(self, rows: Tensor) -> "LogitShape":
        """The same for a choice of rows."""
        scale, mask = self.inverse_temperature, self.keep_mask
        scale = scale[rows] if isinstance(scale, Tensor) else scale
        return self._replace(inverse_temperature=scale, keep_mask=None if mask is None else mask[rows])

    def apply_(self, u: Tensor, rows: slice, columns: slice) -> Tensor:
        """u [n, v] (those rows and columns of the logits) becomes z, in place."""
        if self.softcap is not None:
            u.div_(self.softcap).tanh_().mul_(self.softcap)
        scale = self.inverse_temperature
        if isinstance(scale, Tensor):
            u.mul_(scale[rows, None])
        elif scale != 1:
            u.mul_(scale)
        if self.keep_mask is not None:
            u.masked_fill_(~self.keep_mask[rows, columns], -torch.inf)
        return u

    def backward_(self, dz: Tensor, z: Tensor, rows: slice, columns: slice) -> Tensor:
        """dz becomes du, in place; z is what `apply_` gave."""
        scale = self.inverse_temperature
        if isinstance(scale, Tensor):
            scale = scale[rows, None]
        if self.softcap is not None:
            dz.mul_(1 - (z / (scale * self.softcap)).square_())
        if isinstance(scale, Tensor) or scale != 1:
            dz.mul_(scale)
        if self.keep_mask is not None:
            dz.masked_fill_(~self.keep_mask[rows, columns], 0)
        return dz


class RowStatistics(NamedTuple):
    """[N] each: what forward returns, and all that backward needs besides the logits."""

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor

    def select(self, rows: Tensor | slice) -> "RowStatistics":
        return RowStatistics(*(values[rows] for values in self))

    def scatter(self, rows: Tensor, num_rows: int) -> "RowStatistics":
        """Back to all rows, 0 in those that were left out."""
        return RowStatistics(*(values.new_zeros(num_rows).index_copy_(0, rows, values) for values in self))

    def ignore(self, ignored: Tensor, logsumexp: float) -> "RowStatistics":
        """Log-prob and entropy 0, and this logsumexp, in the rows bool [N] that count for nothing."""
        log_p, entropy = (values.masked_fill(ignored, 0) for values in self[:2])
        return RowStatistics(log_p, entropy, self.logsumexp.masked_fill(ignored, logsumexp))


class OnlineSoftmax:
    """Max, sum e^(z - max), sum e^(z - max) (z - max) and the target's z of N rows, one vocabulary block at a time.

    Sums are taken relative to the running maximum, which starts at -inf: what a logit of 1e4 has lost is what fp32 had no room
    for in z itself.
    """

    def __init__(self, partial_5N: Tensor):
        """partial_5N is written into: maximum, total, weighted, target's z, 1 where a block held the target."""
        self.partial_5N = partial_5N
        self.maximum, self.total, self.weighted, self.target, self.found = partial_5N.unbind(0)

    @classmethod
    def empty(cls, num_rows: int, dtype: torch.dtype, device: torch.device) -> "OnlineSoftmax":
        partial_5N = torch.zeros(5, num_rows, dtype=dtype, device=device)
        partial_5N[0] = -torch.inf
        return cls(partial_5N)

    def add_(self, z: Tensor, scratch: Tensor, rows: slice, targets: Tensor, may_be_infinite: bool) -> None:
        """z and scratch [n, v] are overwritten. targets [n]: the column in this block; in another block if outside 0..v."""
        column, inside = locate(targets, z.shape[1])
        self.target[rows] = torch.where(inside, z.gather(1, column).squeeze(1), self.target[rows])
        self.found[rows] += inside
        maximum = torch.maximum(self.maximum[rows], z.amax(1))
        self._raise_maximum(rows, maximum)
        z.sub_(finite(maximum)[:, None])
        if may_be_infinite:
            z.clamp_(min=UNDERFLOW)
        mass = torch.exp(z, out=scratch)
        self.total[rows] += mass.sum(1)
        self.weighted[rows] += z.mul_(mass).sum(1)  # half the time of linalg.vecdot

    def _raise_maximum(self, rows: slice, maximum: Tensor) -> None:
        """Move both sums to a maximum that is at least the present one."""
        shift = (self.maximum[rows] - finite(maximum)).clamp(min=UNDERFLOW)
        scale = shift.exp()
        self.weighted[rows] = scale * (self.weighted[rows] + shift * self.total[rows])
        self.total[rows] *= scale
        self.maximum[rows] = maximum

    def all_reduce_(self, group: dist.ProcessGroup) -> None:
        """Join the shards of a vocabulary-parallel softmax: one max and one sum of 4 floats a row."""
        maximum = self.maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        self._raise_maximum(slice(None), maximum)
        dist.all_reduce(self.partial_5N[1:], group=group)

    def finish(self) -> "RowStatistics":
        """A row whose target lies in no block gets a NaN log-prob rather than a plausible number."""
        base, log_total = finite(self.maximum), self.total.log()
        logprob = torch.where(self.found == 1, (self.target - base) - log_total, torch.nan)
        return RowStatistics(logprob, log_total - self.weighted / self.total, base + log_total)


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def finite(maximum: Tensor) -> Tensor:
    """-inf (nothing kept so far) -> 0, so that -inf - max stays -inf instead of NaN."""
    return torch.where(maximum == -torch.inf, 0, maximum)


def locate(targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """([n, 1] column clamped into the block, [n] whether the target really lies in it)."""
    inside = (targets >= 0) & (targets < width)
    return targets.clamp(0, width - 1)[:, None], inside


class Upstream(NamedTuple):
    """Gradients [N] of the loss with respect to logprob (g), entropy (h) and logsumexp (k); None is zero."""

    g: Tensor | None
    h: Tensor | None
    k: Tensor | None

    @classmethod
    def inside(cls, kept: Tensor, gradients: tuple[Tensor | None, ...]) -> "Upstream":
        return cls(*(None if gradient is None else torch.where(kept, gradient, 0) for gradient in gradients))

    def select(self, rows: Tensor | slice) -> "Upstream":
        return Upstream(*(None if gradient is None else gradient[rows] for gradient in self))

    def live_rows(self, kept: Tensor) -> Tensor:
        """bool [N]: kept rows with any non-zero gradient (NaN is not zero)."""
        given = [gradient != 0 for gradient in self if gradient is not None]
        return torch.stack(given).any(0) & kept if given else torch.zeros_like(kept)


def logit_gradient(
    z: Tensor, out: Tensor, targets: Tensor, rows: RowStatistics, upstream: Upstream, may_be_infinite: bool
) -> Tensor:
    """dz [n, v] into `out`. `rows` and `upstream` are those of these n rows, targets as in `OnlineSoftmax.add_`.

    log p comes from the nearer of two fixed points, z_y with its log-prob (where the target lies in this block) or logsumexp:
    fp32 holds a logsumexp near 1e4 to 5e-4 only, the distance of two logits exactly. The target's entry is written from
    1 - p = -expm1(logprob), as good as logprob; a rounded p would cost all digits of a small 1 - p that logprob has.
    """
    g, h, k = upstream
    constant = torch.zeros_like(rows.logprob)
    if g is not None:
        constant = constant - g
    if k is not None:
        constant = constant + k
    at_target = rows.logprob.exp()
    column, inside = locate(targets, z.shape[1])
    z_target = z.gather(1, column).squeeze(1)
    near = inside & (rows.logprob.abs() < rows.logsumexp.abs()) & z_target.isfinite()
    log_p = torch.sub(z, torch.where(near, z_target, rows.logsumexp)[:, None], out=out)
    log_p += torch.where(near, rows.logprob, 0)[:, None]
    if h is None:
        log_p.exp_().mul_(constant[:, None])
        at_target = at_target * (constant if g is None else constant + g)
    else:
        if may_be_infinite:
            log_p.clamp_(min=UNDERFLOW)
        constant = constant - torch.where(h == 0, 0, h * rows.entropy)  # an infinite entropy without a gradient makes no NaN
        slope = torch.addcmul(constant[:, None], log_p, h[:, None], value=-1)
        log_p.exp_().mul_(slope)
        log_p_target = rows.logprob.clamp(min=UNDERFLOW)
        at_target = at_target * ((constant if g is None else constant + g) - h * log_p_target)
    if g is not None:
        at_target = at_target - g * torch.expm1(rows.logprob)
    return out.scatter_(1, column, torch.where(inside, at_target, out.gather(1, column).squeeze(1))[:, None])
