"""Which program of a launch finishes last, so that it can join what the others left in global memory."""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def takes_last_ticket(counter_ptr, num_programs):
    """True in one program of the launch, the last to call: there, all that the others stored before is visible.

    counter_ptr: of `ticket_counter`, 0 again afterwards.
    """
    tl.debug_barrier()  # every thread's stores come before the ticket
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1
    if last:
        tl.atomic_xchg(counter_ptr, 0)
    tl.debug_barrier()
    return last


def ticket_counter(device: torch.device) -> Tensor:
    """int32 [1] that holds 0 whenever a kernel of the current stream starts; kernels of one stream share it, in turn.

    A CUDA graph gets one of its own for each launch, zeroed by a node of the graph: it may be replayed on any stream.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = (device, stream.cuda_stream)
    if key not in _counters:
        _counters[key] = _outside_of_pools(device)
        stream.wait_stream(torch.cuda.default_stream(device))
    return _counters[key]


def _outside_of_pools(device: torch.device) -> Tensor:
    """Zeroed on the default stream by another thread: a warm-up before a graph is captured routes the allocations of its own
    thread into a pool that is emptied later, and this memory stays."""
    made = []
    thread = threading.Thread(target=lambda: made.append(torch.zeros(1, dtype=torch.int32, device=device)))
    thread.start()
    thread.join()
    return made[0]
