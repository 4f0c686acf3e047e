"""SwiGLU's product (arXiv 2002.05202): y = silu(gate) up, silu(g) = g s, s = sigmoid(g).

On a CPU this form is the one that runs, so it goes over memory as rarely as plain torch can: silu and its derivative are one
pass each, and products are written over what is not needed again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import wide


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [...] -> y [...] contiguous, in gate's dtype."""
    return F.silu(wide(gate)).mul_(wide(up)).to(gate.dtype).contiguous()


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup): dgate = dy up s (1 + g (1 - s)) and dup = dy g s."""
    dy_wide, gate_wide = wide(dy), wide(gate)
    dgate = torch.ops.aten.silu_backward(dy_wide * wide(up), gate_wide)
    dup = F.silu(gate_wide).mul_(dy_wide)
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()
