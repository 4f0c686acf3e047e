"""The emulation that runs .cu files on the CPU, against answers known by hand."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROBE = Path(__file__).parent / "emulation/probe.cu"


@pytest.fixture(params=[0, 1])
def probe(request, emulated_library):
    """The probe library, with threads and blocks in both orders."""
    library = emulated_library(PROBE)
    library.strop_emulation_order(request.param)
    yield library
    library.strop_emulation_order(0)


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_reduction_over_lanes_warps_and_blocks(probe):
    x = torch.arange(10_000, dtype=torch.float32)
    partial, finished, total = torch.zeros(3), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    assert probe.probe_sum(pointer(x), ctypes.c_int64(10_000), pointer(partial), pointer(finished), pointer(total), None) == 0
    assert total.item() == x.sum().item() and finished.item() == 3


def test_order_shows_a_missing_barrier(probe, request):
    numbers, out = torch.arange(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    probe.probe_reverse(pointer(numbers), pointer(out), 1, None)
    assert torch.equal(out, numbers.flip(0))
    probe.probe_reverse(pointer(numbers), pointer(out), 0, None)
    wrong = (out != numbers.flip(0)).nonzero()
    half = slice(128, 256) if request.node.callspec.params["probe"] else slice(0, 128)  # those who ran too early
    assert set(range(256)[half]) == set(wrong.flatten().tolist())


def test_warp_functions(probe):
    out = torch.zeros(16, 32, dtype=torch.int32)
    probe.probe_warp(pointer(out), None)
    lane = torch.arange(32, dtype=torch.int32)
    expected = [
        torch.full_like(lane, 0b01001001001001001001001001001001),
        torch.ones_like(lane),
        torch.zeros_like(lane),
        torch.full_like(lane, 25),
        torch.where(lane < 2, lane, lane - 2),
        torch.where(lane % 8 < 5, lane + 3, lane),
        lane ^ 4,
        torch.full_like(lane, 31 * 16),
        torch.where(lane < 16, lane ^ 1, lane ^ 8),
        torch.tensor([bin(i).count("1") * 100 + 32 - i.bit_length() + ((i & -i).bit_length()) for i in range(32)]).int(),
        torch.full_like(lane, 9),
        torch.ones_like(lane),
    ]
    torch.testing.assert_close(out[: len(expected)], torch.stack(expected))


def test_atomics(probe):
    counters = torch.zeros(5, dtype=torch.int32)
    probe.probe_atomic(pointer(counters), None)
    assert counters.tolist() == [2 * 6 * 50, 49, -5, 42, 6 * 50 % 7]


def test_16_bit_floats_round_as_torch(probe):
    x = torch.tensor([0.1, -1e-7, 6e-8, 3e-8, 65519.0, 65520.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11,
                      3.4e38, 1e-40, torch.inf, -torch.inf, torch.nan, -0.0])  # fmt: skip
    bf16, half = torch.zeros_like(x, dtype=torch.bfloat16), torch.zeros_like(x, dtype=torch.float16)
    probe.probe_round(pointer(x), pointer(bf16), pointer(half), len(x), None)
    torch.testing.assert_close(bf16, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(half, x.half(), rtol=0, atol=0, equal_nan=True)


def test_dead_lock_is_named(probe):
    """In a process of its own: it is aborted."""
    code = f"import ctypes; ctypes.CDLL({probe._name!r}).probe_deadlock(None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode < 0 and "block (0, 0, 0): dead-lock: some threads wait at a barrier" in done.stderr
