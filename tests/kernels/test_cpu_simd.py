"""The vector functions of csrc/cpu/simd.h against fp64, on each level of vector instructions that this CPU has."""

import ctypes
import math
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from strop.kernels import native
from strop.kernels.cpu import logit_rows
from strop.kernels.native_structs import address

FUNCTIONS = ("exp", "expm1", "tanh", "tanh's slope")
SMALLEST_NORMAL = 2.0**-126


def call(function: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    native.call("elementary", ctypes.c_int(FUNCTIONS.index(function)), address(x), address(y), ctypes.c_int64(len(x)))
    return y


def exact(function: str, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return {"exp": x.exp(), "expm1": x.expm1(), "tanh": x.tanh(), "tanh's slope": x.cosh().pow(-2)}[function]


def floats_of_every_kind() -> torch.Tensor:
    """Bit patterns of every exponent and sign, subnormal numbers, infinities and NaN; and a fine grid of everyday numbers."""
    patterns = torch.arange(-(2**31), 2**31, 2003).to(torch.int32).view(torch.float32)
    return torch.cat([patterns, torch.linspace(-105, 90, 10**6), torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])])


@pytest.mark.parametrize(("function", "ulp"), [("exp", 1.1), ("expm1", 2.0), ("tanh", 2.0), ("tanh's slope", 5.0)])
def test_error_is_as_stated(cpu_level, function, ulp):
    x = floats_of_every_kind()
    y, wanted = call(function, x), exact(function, x)
    nearest = wanted.float()
    spacing = (torch.nextafter(nearest.abs(), torch.tensor(math.inf)) - nearest.abs()).double()
    # Left out here, seen to below: where e^x or e^-2|x| over- or underflows.
    usual = wanted.isfinite() & (wanted.abs() >= SMALLEST_NORMAL) & (x <= 88.37)
    if function == "tanh's slope":
        usual &= x.abs() < 43.6
    error = ((y.double() - wanted).abs() / spacing)[usual]
    assert usual.sum() > 10**6 and error.max() <= ulp, (error.max(), x[usual][error.argmax()])
    assert torch.equal(y.isnan(), x.isnan())


def test_limits(cpu_level):
    x = torch.tensor([-math.inf, -1e30, -103.0, -87.4, 88.4, 1e30, math.inf])
    assert call("exp", x).tolist() == [0, 0, 0, 0, math.inf, math.inf, math.inf]
    assert call("expm1", x).tolist() == [-1, -1, -1, -1, math.inf, math.inf, math.inf]
    assert call("tanh", x).tolist() == [-1, -1, -1, -1, 1, 1, 1]
    assert call("tanh's slope", x).tolist() == [0] * 7
    assert call("exp", torch.zeros(3)).tolist() == [1] * 3
    subnormal = torch.tensor([1e-40, -1e-40])
    assert torch.equal(call("tanh", subnormal), subnormal) and torch.equal(call("expm1", subnormal), subnormal)


def test_any_length_is_written_and_nothing_behind_it(cpu_level):
    for length in range(70):
        zeros, memory = torch.zeros(length), torch.full((length + 64,), 7.0)
        native.call("elementary", ctypes.c_int(0), address(zeros), address(memory), ctypes.c_int64(length))
        assert memory.tolist() == [1.0] * length + [7.0] * 64


PLAIN = {"inverse_temperature": 1.0, "softcap": None, "bias_V": None, "keep_mask_NV": None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 64])
def test_every_16_bit_number_is_read_exactly(cpu_level, dtype, width):
    """The logsumexp of a row that holds one number beside -inf is that number; `width` 64 reads whole vectors."""
    numbers = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    rows = torch.full((len(numbers), width), -math.inf, dtype=dtype)
    rows[:, width // 2] = numbers
    read = logit_rows.logit_statistics(rows, torch.zeros(len(rows), dtype=torch.int64), **PLAIN, partial=False)[2]
    finite = numbers.isfinite()
    assert torch.equal(read[finite], numbers.float()[finite])
    assert torch.equal(read.isnan(), ~finite & (numbers != -math.inf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(cpu_level, dtype):
    """k p = k for a vocabulary of 1: the gradient is what is rounded. Ties, subnormal numbers, overflow and NaN among them."""
    patterns = torch.arange(-(2**31), 2**31, 10007).to(torch.int32).view(torch.float32)
    ties = (torch.arange(2**16, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    halves = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.float16)
    numbers = torch.cat([patterns, ties, halves.float() * (1 + 2**-12), halves.float() + 2.0**-25])
    targets, out = torch.zeros(len(numbers), dtype=torch.int64), torch.empty(len(numbers), 1, dtype=dtype)
    statistics = torch.zeros(3, len(numbers))
    logit_rows.logit_gradient(torch.zeros(len(numbers), 1), targets, statistics, None, None, numbers, **PLAIN, out_NV=out)
    wanted = numbers.to(dtype)
    same = (out[:, 0].view(torch.int16) == wanted.view(torch.int16)) | (numbers.isnan() & out[:, 0].isnan())
    zero = (out[:, 0] == 0) & (wanted == 0)  # a k of 0 leaves the row 0, whose sign is +
    assert (same | zero).all(), (numbers[~(same | zero)][:5], out[~(same | zero)][:5])


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm")
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_a_level_shares_no_function_with_the_others(level, tmp_path):
    """Of a function that several object files define, the linker keeps any one: AVX-512 code would run on a CPU without it."""
    if level != "baseline" and platform.machine() != "x86_64":
        pytest.skip(f"{level} is x86-64")
    source, compiled = Path(__file__).parents[2] / f"csrc/cpu/{level}.cpp", tmp_path / "level.o"
    subprocess.run(["g++", "-std=c++17", "-O0", "-fPIC", "-c", source, "-o", compiled], check=True)
    symbols = subprocess.run(["nm", compiled], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if line.split()[-2] in "WVu"]
    assert not shared and f"strop_{level}_kernels" in symbols
