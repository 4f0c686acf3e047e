"""The dense decoder: one class for training, rollouts and every pipeline stage.

Shape suffixes: T tokens of the pass, H hidden, V vocabulary, N query heads, K key/value heads, D head dimension.
"""

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attention
from .config import ModelConfig
from .context import ForwardContext, Paged
from .layers import MLP, RMSNorm, Rotary, RotaryTable

Recompute = Literal["none", "full"]


class Layer(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_TH: Tensor, rotary: Rotary, ctx: ForwardContext, cache_index: int) -> Tensor:
        x_TH = x_TH + self.attention(self.attention_norm(x_TH), rotary, ctx, cache_index)
        return x_TH + self.mlp(self.mlp_norm(x_TH))


class Transformer(nn.Module):
    """`layers` of the model (all by default): a stage that starts at layer 0 has the embedding, one that ends at the last
    layer the final norm and the LM head. With tied embeddings the last stage holds the embedding matrix as its head.

    Parameters are uninitialised until `init_weights`, a checkpoint or `alias_parameters` gives them values; on device
    "meta" they have no storage. There are no buffers, so parameters are all the state there is.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        if not 0 <= layers.start < layers.stop <= config.num_layers or layers.step != 1:
            raise ValueError(f"layers {layers}: must be a non-empty consecutive part of range({config.num_layers})")
        self.config = config
        self.layer_range = layers
        self.recompute: Recompute = recompute
        self._rotary = RotaryTable(config)
        with torch.device("meta"):
            if self.is_first or (self.is_last and config.tie_embeddings):
                self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleDict({str(i): Layer(config) for i in layers})
            if self.is_last:
                self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
                if not config.tie_embeddings:
                    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(dtype)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)

    @property
    def is_first(self) -> bool:
        """This stage reads token ids."""
        return self.layer_range.start == 0

    @property
    def is_last(self) -> bool:
        """This stage gives what the LM head takes."""
        return self.layer_range.stop == self.config.num_layers

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H], the parameter itself; the embedding's when tied. Only on the last stage."""
        assert self.is_last, f"the LM head is on the last stage, this one holds layers {self.layer_range}"
        return self.embedding.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Hidden states [T, H], after the final norm on the last stage; the LM head is the caller's (kernels.linear_logprob).

        x: int64 [T] token ids on the first stage, [T, H] hidden states of the stage before on the others.
        """
        assert len(x) == len(ctx.positions), f"{len(x)} tokens but {len(ctx.positions)} positions"
        assert not (isinstance(ctx.attention, Paged) and torch.is_grad_enabled()), "paged attention needs torch.no_grad()"
        x_TH = F.embedding(x, self.embedding.weight) if self.is_first else x
        rotary = self._rotary.at(ctx.positions, x_TH.dtype)
        save_memory = self.recompute == "full" and torch.is_grad_enabled()
        for cache_index, layer in enumerate(self.layers.values()):
            if save_memory:
                x_TH = checkpoint(layer, x_TH, rotary, ctx, cache_index, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TH = layer(x_TH, rotary, ctx, cache_index)
        return self.final_norm(x_TH) if self.is_last else x_TH

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random weights: matrices normal(0, init_std), norms 1, biases 0.

        Each tensor has its own generator, keyed (seed, canonical name): a stage has the values the whole model would have.
        """
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu") * self.config.init_std
                )

    def alias_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Make every parameter share the storage of the tensor of its (canonical) name, without gradients.

        For a rollout model built on "meta" that uses the trainer's weights in place. Raises ValueError where a name is
        missing or a shape differs; extra names are left alone (a tied head, another stage's layers).
        """
        for name, parameter in list(self.named_parameters()):
            if name not in tensors:
                raise ValueError(f"no tensor for parameter {name}")
            if tensors[name].shape != parameter.shape:
                raise ValueError(f"{name}: shape {tuple(tensors[name].shape)}, this model needs {tuple(parameter.shape)}")
            module_name, _, attribute = name.rpartition(".")
            aliased = nn.Parameter(tensors[name].detach(), requires_grad=False)
            setattr(self.get_submodule(module_name), attribute, aliased)
