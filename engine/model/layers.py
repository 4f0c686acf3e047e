"""RMSNorm, rotary positions and the SwiGLU MLP."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467), computed in fp32 and rounded once at the end.

    In bf16 that is closer to the exact value than transformers' form, which rounds before it applies the weight too.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TH)) * self.up_proj(x_TH))


@dataclass(frozen=True)
class Rotary:
    """The rotation of each token of one forward pass: cos and sin, [T, 1, D], the two halves of D alike."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x_TND: Tensor) -> Tensor:
        """Rotate the pairs (x[i], x[i + D/2]) of every head by the token's angles (arXiv 2104.09864, half-split form)."""
        first, second = x_TND.chunk(2, dim=-1)
        return x_TND * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class RotaryTable:
    """Rotary frequencies of a model. Plain data, not a module: a model on "meta" then has nothing but parameters."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = rotary_frequencies(config)
        self._on_device: dict[torch.device, Tensor] = {}

    def at(self, positions_T: Tensor, dtype: torch.dtype) -> Rotary:
        """Rotations of the given positions. Angles are fp32 as in transformers (fp64 for fp64 models)."""
        device = positions_T.device
        if device not in self._on_device:
            self._on_device[device] = self._frequencies.to(device)
        frequencies = self._on_device[device]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions_T.to(wide)[:, None] * frequencies.to(wide)
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each of the D/2 pairs, fp32 [D/2], computed as transformers does.

    llama3 (Meta's reference code for Llama 3.1), with L the original context: frequencies of wavelengths above
    L / low_freq_factor are divided by `factor`, those below L / high_freq_factor stay; between, linear in L / wavelength.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # L / wavelength
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies
