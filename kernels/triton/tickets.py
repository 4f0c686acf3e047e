"""Which program of a launch finishes last, so that it can join what the others left in global memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_memory import zeroed_memory


@triton.jit
def takes_last_ticket(counter_ptr, num_programs):
    """True in one of the num_programs programs that call, the last: there, all that the others stored before is visible.

    counter_ptr: of `ticket_counter`, 0 again afterwards.
    """
    tl.debug_barrier()  # every thread's stores come before the ticket
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1
    if last:
        tl.atomic_xchg(counter_ptr, 0)
    tl.debug_barrier()
    return last


def ticket_counter(device: torch.device, count: int = 1) -> Tensor:
    """int32 [count] that hold 0 whenever a kernel of the current stream starts."""
    return zeroed_memory("tickets", 4 * count, device).view(torch.int32)
