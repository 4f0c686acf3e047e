"""Rotary positions."""

from torch import Tensor

from .checks import require_dims, require_floating, require_integers, require_same_device, require_shape
from .dispatch import define_op, form

AVAILABLE = ("reference", "triton")


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, inverse: bool = False) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of every head by the token's angles (arXiv 2104.09864, half-split as Hugging Face).

    x: [T, N, D], N heads of even size D, float32, bfloat16, float16 or float64; any strides, so queries and keys may be
    rotated together where one projection makes both. cos, sin: [P, D/2], fp32 recommended: in bf16 an angle is off by up to
    2^-9. positions: int32 or int64 [T], the table row of each token; None: token t has row t, and P = T.
    Returns [T, N, D], contiguous, in x's dtype; x is not changed. Computed in fp32 and rounded once.

    inverse=True rotates back. The gradient in x is that rotation of dy, so x may be differentiated any number of times;
    cos and sin get no gradient (RuntimeError where one requires it).

    A position outside 0..P-1 is an IndexError in the reference; Triton, which cannot raise, returns NaN for that token.
    Raises TypeError for other dtypes and ValueError for wrong shapes or devices.
    """
    require_floating("rope", x=x, cos=cos, sin=sin)
    require_dims("rope", "x", x, "[T, N, D]", exact=3)
    require_dims("rope", "cos", cos, "[P, D/2]", exact=2)
    num_tokens, _, size = x.shape
    if size % 2:
        raise ValueError(f"rope: the heads of x have size {size}: an even one is needed, its halves form the pairs")
    rows = num_tokens if positions is None else cos.shape[0]
    require_shape("rope", "cos", cos, (rows, size // 2), "the tokens of x (positions is None) and half a head")
    require_shape("rope", "sin", sin, cos.shape, "the shape of cos")
    require_same_device("rope", x=x, cos=cos, sin=sin)
    if positions is not None:
        require_integers("rope", positions=positions)
        require_shape("rope", "positions", positions, (num_tokens,), "one for each token of x")
        require_same_device("rope", x=x, positions=positions)
    return _rope(x, cos, sin, positions, inverse)


def _run(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    return form("rope", x, AVAILABLE).rope(x, cos, sin, positions, inverse)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    _, cos, sin, positions, ctx.inverse = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise RuntimeError("rope: cos and sin get no gradient: pass cos.detach(), sin.detach()")
    ctx.save_for_backward(cos, sin, positions)


def _gradient(ctx, dy: Tensor):
    return _rope(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None, None


_rope = define_op(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool inverse) -> Tensor",
    _run, _fake, save=_save, backward=_gradient,
)  # fmt: skip
