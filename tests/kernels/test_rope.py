import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import rope


def table(rows: int, half: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def test_gradients_are_exact_twice():
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = table(9, 3)
    positions = torch.tensor([3, 0, 8, 3])
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin, positions), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rope(x, cos, sin, positions), (x,))


@given(st.integers(0, 5), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_is_a_complex_product(num_tokens, num_heads, half, table_rows, random):
    """(x[i] + j x[i + D/2]) e^(j angle), and the inverse undoes it."""
    x = torch.randn(num_tokens, num_heads, 2 * half, dtype=torch.float64)
    positions = torch.tensor([random.randrange(table_rows) for _ in range(num_tokens)], dtype=torch.int32)
    cos, sin = table(table_rows, half)
    y = rope(x, cos, sin, positions)
    rotated = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[positions.long()][:, None]
    torch.testing.assert_close(y, torch.cat((rotated.real, rotated.imag), -1))
    torch.testing.assert_close(rope(y, cos, sin, positions, inverse=True), x)


def test_equals_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(7, 4, 16), torch.randn(7, 2, 16)
    cos, sin = table(7, 8, torch.float32)
    doubled = [torch.cat((t, t), -1)[None] for t in (cos, sin)]
    expected = llama.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *doubled)
    for x, want in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rope(x, cos, sin), want[0].transpose(0, 1))


@pytest.mark.parametrize("num_tokens, num_heads, size", [(1, 1, 2), (5, 3, 6), (9, 20, 96), (70, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("given", [True, False])
def test_triton(interpreted, num_tokens, num_heads, size, dtype, given):
    cos, sin = table(32 if given else num_tokens, size // 2, torch.float32)
    x = torch.randn(num_tokens, num_heads, size, dtype=dtype, requires_grad=True)
    positions = torch.randint(0, 32, (num_tokens,)) if given else None
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    interpreted.check(rope, x, cos, sin, positions, upstream=[torch.randn_like(x)], rtol=tolerance, atol=tolerance)


def test_triton_strides(interpreted):
    """Queries and keys together out of one projection [T, q k v], and heads first."""
    cos, sin = table(5, 8, torch.float32)
    projected = torch.randn(5, 6, 16)
    for x in (projected[:, :4].requires_grad_(), projected.transpose(0, 1)[:5].detach().requires_grad_()):
        interpreted.check(rope, x, cos, sin, upstream=[torch.randn(x.shape[2], x.shape[1], 5).permute(2, 1, 0)])


def test_position_outside_the_table(interpreted):
    cos, sin = table(4, 2, torch.float32)
    x, positions = torch.randn(3, 2, 4), torch.tensor([0, 4, -5])
    with pytest.raises(IndexError):
        rope(x, cos, sin, positions)
    y, _ = interpreted(rope, x, cos, sin, positions)
    assert y[0].isfinite().all() and y[1:].isnan().all()


def test_compiles_and_passes_opcheck():
    cos, sin = table(4, 2, torch.float32)
    x = torch.randn(4, 3, 4, requires_grad=True)
    compiled = torch.compile(lambda x: rope(x, cos, sin), fullgraph=True, backend="aot_eager")
    upstream = torch.randn(4, 3, 4)
    expected = torch.autograd.grad(rope(x, cos, sin), x, upstream)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x, upstream), expected)
    torch.library.opcheck(torch.ops.strop.rope.default, (x, cos, sin, None, False))


def test_refuses():
    cos, sin = table(4, 2, torch.float32)
    x = torch.randn(4, 3, 4)
    with pytest.raises(ValueError, match="x has shape"):
        rope(x[0], cos, sin)
    with pytest.raises(ValueError, match="size 5: an even one"):
        rope(torch.randn(4, 3, 5), cos, sin)
    with pytest.raises(ValueError, match=r"cos has shape \(4, 2\): \(3, 2\) is needed, the tokens of x"):
        rope(x[:3], cos, sin)
    with pytest.raises(ValueError, match=r"sin has shape"):
        rope(x, cos, sin[:2])
    with pytest.raises(ValueError, match=r"positions has shape \(3,\)"):
        rope(x, cos, sin, torch.arange(3))
    with pytest.raises(TypeError, match=r"positions has dtype torch\.float32"):
        rope(x, cos, sin, torch.arange(4.0))
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        rope(x.long(), cos, sin)
    with pytest.raises(RuntimeError, match="cos and sin get no gradient"):
        rope(x, cos.requires_grad_(), sin)
