"""Device memory that one launch of a kernel finds zeroed, as a counter of finished blocks must be.

A fill before each launch would be a second launch, so a kernel leaves its memory as it found it and the next launch uses it
again. That is safe as long as the launches that share it run one after the other:

- Each stream has memory of its own, for launches of one stream are in order whichever thread makes them. It is never freed
  and never grows, because another stream allocated it: the allocator wouldn't know when this one is done with it.
- A CUDA graph may be replayed on any stream, beside any other. What it captures gets new memory from the graph's own pool,
  which a fill inside the graph zeroes at every replay.
- The warm-up before a capture (torch.compile's cudagraph trees, torch.cuda.use_mem_pool) doesn't capture, but routes the
  allocations of its thread into a pool that is rewound or emptied afterwards. So the lasting memory is allocated by another
  thread, in the ordinary pool.
- A device's memory is that of its own streams: the key holds the device, as the default streams of all devices are 0.

An external stream must have finished before it is destroyed, as CUDA may give its handle to the next one.
"""

import threading

import torch
from torch import Tensor

_lasting: dict[tuple[str, int, torch.device, int], Tensor] = {}
"""By user, size, device and stream."""
_lock = threading.Lock()


def zeroed_memory(user: str, num_bytes: int, device: torch.device) -> Tensor:
    """uint8 [num_bytes], zero whenever a launch on the current stream of `device` starts.

    user: the kernels that share it; each leaves what must be zero at 0. Other users of the stream have memory of their own.
    """
    if device.type != "cuda":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream()
        key = (user, num_bytes, torch.device("cuda", torch.cuda.current_device()), stream.cuda_stream)
        with _lock:
            if key not in _lasting:
                _lasting[key] = _in_the_ordinary_pool(num_bytes, key[2])
                stream.wait_stream(torch.cuda.default_stream())  # on which it is zeroed
            return _lasting[key]


def _in_the_ordinary_pool(num_bytes: int, device: torch.device) -> Tensor:
    made = []

    def allocate() -> None:
        with torch.cuda.stream(torch.cuda.default_stream(device)):
            made.append(torch.zeros(num_bytes, dtype=torch.uint8, device=device))

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    if not made:
        raise RuntimeError(f"no {num_bytes} bytes could be allocated on {device}: free some memory there")
    return made[0]
