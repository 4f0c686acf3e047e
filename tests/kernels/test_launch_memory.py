"""Memory that launches find zeroed: who shares it, and who must not."""

import threading
from contextlib import nullcontext

import pytest
import torch

from strop.kernels import launch_memory
from strop.kernels.launch_memory import zeroed_memory


class FakeCuda:
    """As much of torch.cuda as `zeroed_memory` asks, with memory on the CPU; notes the thread that allocates."""

    def __init__(self, monkeypatch):
        self.stream, self.capturing, self.index, self.allocations, self.waits = 7, False, 0, [], []
        monkeypatch.setattr(launch_memory, "_lasting", {})
        for name in ("is_current_stream_capturing", "current_stream", "default_stream", "current_device", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        zeros = torch.zeros

        def allocate(size, *, dtype, device):
            self.allocations.append(threading.current_thread() is threading.main_thread())
            return zeros(size, dtype=dtype)

        monkeypatch.setattr(torch, "zeros", allocate)

    def device(self, device):
        self.index = device.index
        return nullcontext()

    def current_device(self):
        return self.index

    def is_current_stream_capturing(self):
        return self.capturing

    def default_stream(self, device=None):
        return "default"

    def current_stream(self):
        class Stream:
            cuda_stream = self.stream
            wait_stream = self.waits.append

        return Stream()


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_launches_of_one_stream_share_it(cuda):
    first = torch.device("cuda", 0)
    memory = zeroed_memory("tickets", 4, first)
    assert memory.shape == (4,) and memory.dtype == torch.uint8
    assert zeroed_memory("tickets", 4, first) is memory
    assert cuda.allocations == [False] and cuda.waits == ["default"]  # by another thread: no warm-up's pool takes it
    others = [zeroed_memory("policy_loss", 4, first), zeroed_memory("tickets", 8, first)]
    others.append(zeroed_memory("tickets", 4, torch.device("cuda", 1)))
    cuda.stream = 8
    others.append(zeroed_memory("tickets", 4, first))
    assert len({id(tensor) for tensor in (memory, *others)}) == 5
    cuda.stream = 7
    assert zeroed_memory("tickets", 4, first) is memory


def test_a_captured_launch_has_its_own(cuda):
    device = torch.device("cuda", 0)
    lasting = zeroed_memory("tickets", 4, device)
    cuda.capturing = True
    captured = [zeroed_memory("tickets", 4, device) for _ in range(2)]
    assert len({id(tensor) for tensor in (lasting, *captured)}) == 3
    assert cuda.allocations == [False, True, True]  # in the graph's pool
    cuda.capturing = False
    assert zeroed_memory("tickets", 4, device) is lasting


def test_memory_that_cannot_be_allocated_is_an_error(cuda, monkeypatch):
    monkeypatch.setattr(launch_memory.threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(launch_memory.threading.Thread, "join", lambda thread: None)
    with pytest.raises(RuntimeError, match="no 4 bytes could be allocated on cuda:0: free some memory there"):
        zeroed_memory("tickets", 4, torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_warm_ups_pool_does_not_take_it(monkeypatch):
    """What is allocated inside use_mem_pool belongs to the pool, but not this."""
    monkeypatch.setattr(launch_memory, "_lasting", {})
    device, pool = torch.device("cuda", 0), torch.cuda.MemPool()
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.use_mem_pool(pool):
        memory = zeroed_memory("tickets", 4, device)
        assert not memory.any()
    segments = [(part["address"], part["address"] + part["total_size"]) for part in pool.snapshot()]
    assert not any(start <= memory.data_ptr() < stop for start, stop in segments)
