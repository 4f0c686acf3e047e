import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import swiglu


def inputs(*shape: int, dtype=torch.float64, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up, dy = (torch.randn(shape, dtype=dtype) * scale for _ in range(3))
    return gate.requires_grad_(), up.requires_grad_(), dy


def test_gradients_are_exact():
    gate, up, _ = inputs(2, 3, 4)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@given(st.lists(st.integers(0, 5), min_size=0, max_size=3), st.sampled_from([1e-3, 1.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_equals_torch(shape, scale):
    gate, up, dy = inputs(*shape, scale=scale)
    y, expected = swiglu(gate, up), F.silu(gate) * up
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, (gate, up), dy), torch.autograd.grad(expected, (gate, up), dy))


@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (2, 5, 70), (3, 1500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_triton(interpreted, shape, dtype, scale):
    gate, up, dy = inputs(*shape, dtype=dtype, scale=scale)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    interpreted.check(swiglu, gate, up, upstream=[dy], rtol=tolerance, atol=tolerance)


def test_triton_strides(interpreted):
    halves = torch.randn(5, 2 * 48).chunk(2, dim=-1)
    gate, up = (half.detach().requires_grad_() for half in halves)
    interpreted.check(swiglu, gate, up, upstream=[torch.randn(48, 5).T])
    gate, up = torch.randn(9, 5).T.requires_grad_(), torch.randn(5, 9).requires_grad_()
    interpreted.check(swiglu, gate, up, upstream=[torch.randn(5, 1).expand(5, 9)])


def test_saves_only_its_inputs():
    gate, up, _ = inputs(4, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert sorted(saved) == sorted([gate.data_ptr(), up.data_ptr()])


def test_compiles_and_passes_opcheck():
    gate, up, dy = inputs(4, 8, dtype=torch.float32)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(gate, up), (gate, up), dy)
    torch.testing.assert_close(gradients, torch.autograd.grad(swiglu(gate, up), (gate, up), dy))
    torch.library.opcheck(torch.ops.strop.swiglu.default, (gate, up))


def test_refuses():
    gate, up, _ = inputs(4, 8)
    with pytest.raises(TypeError, match=r"up has dtype torch\.int32"):
        swiglu(gate, up.detach().int())
    with pytest.raises(ValueError, match=r"up has shape \(8,\): \(4, 8\) is needed"):
        swiglu(gate, up[0])
    with pytest.raises(ValueError, match="up is on meta"):
        swiglu(gate, up.detach().to("meta"))
    gradient = torch.autograd.grad(swiglu(gate, up).square().sum(), gate, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward isn't supported"):
        gradient.sum().backward()
