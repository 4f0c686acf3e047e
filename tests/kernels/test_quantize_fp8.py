import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import quantize_fp8
from strop.kernels.reference.quantize_fp8 import dequantize_fp8

BLOCKS = [(1, 128), (128, 128)]


def same_bits(actual: tuple, expected: tuple) -> None:
    torch.testing.assert_close(actual[0].view(torch.uint8), expected[0].view(torch.uint8), rtol=0, atol=0)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0, equal_nan=True)


@given(
    st.integers(1, 130), st.integers(1, 260), st.sampled_from(BLOCKS), st.booleans(), st.sampled_from([1e-30, 1.0, 1e30]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_error_and_scales(m, k, block, power_of_two, magnitude):
    """Within half a unit of E4M3 (3 mantissa bits, least exponent -6 - 3); the largest value of a block is met."""
    x = torch.randn(m, k) * magnitude
    q, scale = quantize_fp8(x, block, power_of_two_scales=power_of_two)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (math.ceil(m / block[0]), math.ceil(k / 128))
    y = dequantize_fp8(q, scale, block[0])
    spread = scale.repeat_interleave(block[0], 0)[:m].repeat_interleave(128, 1)[:, :k]
    half_unit = (x.abs() * 2.0**-4).maximum(spread * 2.0**-10)
    assert ((y - x).abs() <= half_unit * (1 + 1e-5)).all()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            largest = x[i * block[0] : (i + 1) * block[0], j * 128 : (j + 1) * 128].abs().max().item()
            exact = largest / 448
            if power_of_two:
                assert math.frexp(scale[i, j].item())[0] == 0.5 and exact * (1 - 1e-6) <= scale[i, j] <= 2 * exact
            else:
                assert scale[i, j].item() == pytest.approx(exact, rel=1e-6)


def test_exact_values():
    """What E4M3 holds exactly survives; a power-of-two scale of an exact power of two is not rounded up."""
    x = torch.zeros(1, 128)
    x[0, :5] = torch.tensor([448.0, -448.0, 1.125, 2.0**-9, -0.0])
    for power_of_two in (False, True):
        q, scale = quantize_fp8(x, power_of_two_scales=power_of_two)
        assert scale.item() == 1
        assert torch.equal(q.float(), x)


def test_zeros_tiny_and_broken_blocks():
    x = torch.zeros(4, 128)
    x[1, 3], x[2, 0], x[3, 5] = 1e-44, torch.inf, torch.nan
    q, scale = quantize_fp8(x)
    assert scale[0] == 1 and scale[1] == 2.0**-126 and scale[2:].isnan().all()
    assert (q[:2].float() == 0).all() and dequantize_fp8(q, scale, 1)[2:].isnan().all()
    assert quantize_fp8(torch.zeros(0, 5))[1].shape == (0, 1)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (130, 260), (2, 5, 129), (0, 128)])
def test_triton_is_bit_equal(interpreted, block, power_of_two, shape):
    for scale in (1.0, 1e-30, 300.0):
        x = torch.randn(shape) * scale
        same_bits(interpreted(quantize_fp8, x, block, power_of_two_scales=power_of_two)[0],
                  quantize_fp8(x, block, power_of_two_scales=power_of_two))  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_triton_edge_cases(interpreted, block):
    x = torch.randn(300, 140, dtype=torch.float16)
    x[0, 0], x[200, 135], x[1], x[2] = torch.inf, torch.nan, 0, 65504
    for strided in (x, x.T, x[::2, 3:]):
        same_bits(interpreted(quantize_fp8, strided, block)[0], quantize_fp8(strided, block))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_takes_more_matrices_than_an_axis_of_blocks():
    """65,535 blocks are the most along the second and third axis of a grid."""
    x = torch.randn(65_537, 3, 130, device="cuda")
    same_bits(tuple(out.cpu() for out in quantize_fp8(x)), quantize_fp8(x.cpu()))


def test_compiles_and_passes_opcheck():
    x = torch.randn(3, 200)
    compiled = torch.compile(lambda x: quantize_fp8(x, (128, 128)), fullgraph=True, backend="aot_eager")
    same_bits(compiled(x), quantize_fp8(x, (128, 128)))
    torch.library.opcheck(torch.ops.strop.quantize_fp8.default, (x, 1, False), test_utils=("test_schema", "test_faketensor"))


def test_refuses():
    with pytest.raises(ValueError, match=r"block is \(128, 1\): choose"):
        quantize_fp8(torch.ones(2, 2), (128, 1))
    with pytest.raises(ValueError, match="x has shape"):
        quantize_fp8(torch.ones(2))
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        quantize_fp8(torch.ones(2, 2).long())
    assert not quantize_fp8(torch.ones(2, 2, requires_grad=True))[1].requires_grad
