"""The product inside a SwiGLU MLP."""

from torch import Tensor

from .checks import require_floating, require_same_device, require_shape
from .dispatch import define_op, form

AVAILABLE = ("reference", "triton")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), in fp32 and rounded once, at the end.

    gate, up: [..., F] of one shape, float32, bfloat16, float16 or float64 (then computed in float64), any strides: the two
    halves of one projection, `projected.chunk(2, -1)`, need no copy. Returns [..., F], contiguous, in gate's dtype.
    Differentiable once in both; saves nothing but its inputs.

    Raises TypeError for other dtypes, ValueError for wrong shapes or devices, RuntimeError for a double backward.
    """
    require_floating("swiglu", gate=gate, up=up)
    require_shape("swiglu", "up", up, gate.shape, "the shape of gate")
    require_same_device("swiglu", gate=gate, up=up)
    return _swiglu(gate, up)


def _run(gate: Tensor, up: Tensor) -> Tensor:
    return form("swiglu", gate, AVAILABLE).swiglu(gate, up)


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy: Tensor):
    return _swiglu_backward(dy, *ctx.saved_tensors)


def _run_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return form("swiglu", gate, AVAILABLE).swiglu_backward(dy, gate, up)


def _fake_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_swiglu = define_op("swiglu(Tensor gate, Tensor up) -> Tensor", _run, _fake, save=_save, backward=_gradient)
_swiglu_backward = define_op(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)", _run_backward, _fake_backward
)
