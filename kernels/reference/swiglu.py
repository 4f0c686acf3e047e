"""SwiGLU's product (arXiv 2002.05202): y = silu(gate) up, silu(g) = g s, s = sigmoid(g)."""

from torch import Tensor

from .precision import wide


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [...] -> y [...] contiguous, in gate's dtype."""
    gate_wide = wide(gate)
    return (gate_wide * gate_wide.sigmoid() * wide(up)).to(gate.dtype).contiguous()


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup): dgate = dy up s (1 + g (1 - s)) and dup = dy g s."""
    dy_wide, gate_wide = wide(dy), wide(gate)
    s = gate_wide.sigmoid()
    dgate = dy_wide * wide(up) * s * (1 + gate_wide * (1 - s))
    dup = dy_wide * gate_wide * s
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()
