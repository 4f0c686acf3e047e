"""What the programs of a loss leave behind, a row of METRIC_FIELDS each, and the sum of the rows.

The order of the rows is the order of the sum: the same bits in every run.
"""

import triton
import triton.language as tl

from ..metrics import FIRST_MAXIMUM, FIRST_MINIMUM, METRIC_FIELDS
from .elementary import from_order_key, order_key
from .tickets import takes_last_ticket

NUM_FIELDS = tl.constexpr(len(METRIC_FIELDS))
MINIMA, MAXIMA = tl.constexpr(FIRST_MINIMUM), tl.constexpr(FIRST_MAXIMUM)
"""First field of each kind; sums come before."""
NAMES = [name for name, _ in METRIC_FIELDS]
TOKENS, SEQUENCES, LOSS, CLIP_LOW = (
    tl.constexpr(NAMES.index(name)) for name in ("tokens", "sequences", "loss", "clip_low")
)
"""The loss and its three parts are the fields from LOSS to CLIP_LOW."""
ROWS = tl.constexpr(128)
"""Rows of the workspace that a program reads at once, and the least number of programs in a group."""
GROUPS = tl.constexpr(255)
"""At most."""


@triton.jit
def stack_four(a, b, c, d):
    """[LANES] each, as one [LANES, 4]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4])


@triton.jit
def stack_eight(a, b, c, d, e, f, g, h):
    """[LANES] each, as one [LANES, 8]."""
    return tl.reshape(tl.join(stack_four(a, c, e, g), stack_four(b, d, f, h)), [a.shape[0], 8])


@triton.jit
def largest_key(live, values):
    """[LANES, WIDTH] -> [LANES], the order key of the largest live value."""
    return tl.max(order_key(tl.where(live, values, -float("inf"))), 1)


@triton.jit
def sum_rows(shares_ptr, first, stop, step):
    """Rows first * step, (first + 1) * step, ... before stop * step, in this order, as one."""
    fields = tl.arange(0, NUM_FIELDS)
    total = tl.zeros([NUM_FIELDS], tl.float32)
    largest = order_key(tl.full([NUM_FIELDS], -float("inf"), tl.float32))
    for start in range(first, stop, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        cells, real = shares_ptr + rows.to(tl.int64) * step * NUM_FIELDS + fields[None, :], rows < stop
        share = tl.load(cells, mask=real, other=0.0, cache_modifier=".cg")
        total += tl.sum(share, 0)
        share = tl.where(real, tl.where(fields[None, :] < MAXIMA, -share, share), -float("inf"))
        largest = tl.maximum(largest, tl.max(order_key(share), 0))
    largest = from_order_key(largest)
    return tl.where(fields < MINIMA, total, tl.where(fields < MAXIMA, -largest, largest))


@triton.jit
def add_shares(shares_ptr, counters_ptr, loss_ptr, metrics_ptr, program, num_programs):
    """Called by every program when its row is stored. The last of each group of programs puts the sum of their rows in place of
    the first; the last of these adds up the groups: thousands of programs (one a sequence at least) would keep one waiting."""
    fields = tl.arange(0, NUM_FIELDS)
    group_size = tl.maximum(ROWS, tl.cdiv(num_programs, GROUPS))
    num_groups, group = tl.cdiv(num_programs, group_size), program // group_size
    first = group * group_size
    stop = tl.minimum(first + group_size, num_programs)
    if takes_last_ticket(counters_ptr + 1 + group, stop - first):
        row = sum_rows(shares_ptr, first, stop, 1)
        tl.debug_barrier()  # every thread has read before one writes
        tl.store(shares_ptr + first.to(tl.int64) * NUM_FIELDS + fields, row)
        if takes_last_ticket(counters_ptr, num_groups):
            row = sum_rows(shares_ptr, 0, num_groups, group_size)
            tl.store(metrics_ptr + fields, row)
            tl.store(loss_ptr, tl.sum(tl.where(fields == LOSS, row, 0.0), 0))
