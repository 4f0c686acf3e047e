import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import rms_norm


def inputs(*shape: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight (both requiring gradients) and a random upstream gradient."""
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    return x, torch.randn(shape[-1], dtype=dtype).requires_grad_(), torch.randn(shape, dtype=dtype)


def test_gradients_are_exact():
    x, weight, _ = inputs(2, 3, 5)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


@given(st.integers(0, 4), st.integers(1, 9), st.sampled_from([0.0, 1e-6, 1e-2]), st.sampled_from([1e-8, 1.0, 1e8]))
@settings(max_examples=30, deadline=None)
def test_equals_torch(num_rows, size, eps, magnitude):
    x, weight, dy = inputs(num_rows, size)
    x = (x.detach() * magnitude).requires_grad_()
    y, expected = rms_norm(x, weight, eps), F.rms_norm(x, (size,), weight, eps)
    torch.testing.assert_close(y, expected)
    (dx, dweight), (want_dx, want_dweight) = (torch.autograd.grad(out, (x, weight), dy) for out in (y, expected))
    torch.testing.assert_close(dx * magnitude, want_dx * magnitude)  # dx is of the order of 1 / x
    torch.testing.assert_close(dweight, want_dweight)


def test_rounds_once():
    """bf16 in and out, fp32 between: the result is the fp64 one rounded, give or take an fp32 error."""
    x, weight, dy = inputs(64, 576, dtype=torch.bfloat16)
    y = rms_norm(x, weight, 1e-6)
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    assert (y == exact.bfloat16()).double().mean() > 0.999
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    exact_dx, exact_dweight = torch.autograd.grad(exact, (x, weight), dy.double())
    torch.testing.assert_close(dx, exact_dx, rtol=2**-7, atol=1e-6)  # one unit of bf16, both being rounded
    assert dweight.dtype == torch.bfloat16
    torch.testing.assert_close(dweight, exact_dweight, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (40, 96), (2, 2100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton(interpreted, shape, dtype):
    x, weight, dy = inputs(*shape, dtype=dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3
    interpreted.check(rms_norm, x, weight, 1e-6, upstream=[dy], rtol=tolerance, atol=tolerance)


def test_triton_sums_weight_gradients_over_several_tiles(interpreted):
    """More tiles (400, of one row each) than partial sums."""
    x, weight, dy = inputs(400, 1100, dtype=torch.float32)
    interpreted.check(rms_norm, x, weight, 1e-6, upstream=[dy], rtol=1e-5, atol=1e-5)


def test_triton_strides(interpreted):
    x, weight, dy = inputs(6, 33, dtype=torch.float32)
    transposed = torch.randn(33, 6).T.requires_grad_()
    sliced = torch.randn(6, 80)[:, 3:36].requires_grad_()
    for strided in (transposed, sliced):
        interpreted.check(rms_norm, strided, weight, 1e-6, upstream=[torch.randn(33, 6).T])
    interpreted.check(rms_norm, x, weight, 1e-6, upstream=[dy[:, :1].expand(6, 33)])


def test_triton_names_its_limit(interpreted):
    with pytest.raises(ValueError, match=r"rows of 8193.*STROP_KERNELS=reference"):
        interpreted(rms_norm, torch.ones(1, 8193), torch.ones(8193), 1e-6)


def test_compiles_and_passes_opcheck():
    x, weight, dy = inputs(4, 16, dtype=torch.float32)
    compiled = torch.compile(lambda x, weight: rms_norm(x, weight, 1e-6) * 2, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(x, weight), (x, weight), dy)
    torch.testing.assert_close(gradients, torch.autograd.grad(rms_norm(x, weight, 1e-6) * 2, (x, weight), dy))
    torch.library.opcheck(torch.ops.strop.rms_norm.default, (x, weight, 1e-6))


def test_refuses():
    x, weight, _ = inputs(4, 16, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"rms_norm: x has dtype torch\.int64"):
        rms_norm(torch.ones(2, 16, dtype=torch.long), weight, 1e-6)
    with pytest.raises(ValueError, match=r"weight has shape \(8,\): \(16,\) is needed"):
        rms_norm(x, torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="weight is on meta but x on cpu"):
        rms_norm(x, torch.ones(16, device="meta"), 1e-6)
    with pytest.raises(ValueError, match="eps is -1"):
        rms_norm(x, weight, -1.0)
    gradient = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward isn't supported"):
        gradient.sum().backward()
