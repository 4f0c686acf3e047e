"""Numbers as tensors of a device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from strop.kernels.filled import filled, number_on


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("number", [torch.tensor(7), torch.tensor(0.25, dtype=torch.float64), torch.tensor(3.0)])
def test_numbers_stay_what_they_are(number):
    for dtype in (torch.float32, torch.float64):
        here = number_on(torch.device("cpu"), number, dtype)
        assert here.dtype == dtype and here.shape == () and here == number
        assert filled((2,), number.item(), dtype, torch.device("cpu")).tolist() == [number, number]
    assert not number_on(torch.device("cpu"), torch.tensor(2.0, requires_grad=True), torch.float32).requires_grad


def test_no_copy_of_cpu_memory_to_another_device():
    """Which CUDA refuses while it captures a graph. "meta" is a device that every machine has."""
    number = torch.tensor(3)
    with Calls() as calls:
        there = number_on(torch.device("meta"), number, torch.float32)
    assert there.device.type == "meta" and there.dtype == torch.float32
    assert {"full", "_local_scalar_dense"} == set(calls.names) - {"detach"}


@pytest.mark.gpu
def test_cpu_numbers_may_be_captured():
    number, graph = torch.tensor(3.0), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there = number_on(torch.device("cuda"), number, torch.float32)
    graph.replay()
    assert there.item() == 3
