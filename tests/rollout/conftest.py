"""A tiny trainer-side model and engines on its weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from strop.engine.batch import Prompt
from strop.engine.model.checkpoint import load_hf_folder
from strop.engine.model.context import ForwardContext
from strop.engine.model.sources import make_tiny
from strop.engine.model.transformer import Transformer
from strop.engine.model.weights import ModelWeights
from strop.engine.rollout.engine import InProcessEngine, RolloutConfig
from strop.engine.rollout.kv_cache import KVCache


@dataclass
class Lab:
    """A trainer's model with the tokenizer, and engines that use its weights."""

    model: Transformer
    tokenizer: object
    dtype: torch.dtype = torch.float32

    def encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt.text, add_special_tokens=False)

    def logits(self, tokens: torch.Tensor, grad: bool = False) -> torch.Tensor:
        """fp32 [L, V], by a trainer-style packed forward over one sequence."""
        with torch.set_grad_enabled(grad):
            hidden = self.model(tokens, ForwardContext.one_sequence(len(tokens)))
            return torch.nn.functional.linear(hidden, self.model.lm_head_weight).float()

    def logprobs(self, tokens: torch.Tensor) -> torch.Tensor:
        """fp32 [L - 1]: of tokens 1 .. L - 1."""
        return self.logits(tokens)[:-1].log_softmax(1).gather(1, tokens[1:, None]).squeeze(1)

    def cache_of(self, blocks: int, block_size: int) -> dict[str, float]:
        """The setting that gives an engine this many cache blocks."""
        return {"kv_cache_gib": blocks * KVCache.block_bytes(self.model.config, block_size, self.dtype) / 2**30}

    def engine(self, sync: bool = True, **settings) -> InProcessEngine:
        engine = InProcessEngine(
            self.model.config, self.tokenizer, self.encode, RolloutConfig(**settings), "cpu", self.dtype, self.logprobs
        )
        engine.bind_weights(ModelWeights(self.model))
        if sync:
            engine.sync_weights(0)
        return engine


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def make_lab() -> Callable[[Path], Lab]:
    """The laboratory on the model of a folder, in fp32."""
    return lambda folder: Lab(load_hf_folder(folder, torch.float32, "cpu"), AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def lab(make_lab, tiny_folder) -> Lab:
    """A fresh tiny model: tests may change its weights."""
    return make_lab(tiny_folder)


@pytest.fixture
def sharp_lab(lab) -> Lab:
    """Matrices three times as large: distributions with an entropy of about 2 nats, in which a wrong key shows."""
    with torch.no_grad():
        for parameter in lab.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return lab


@pytest.fixture
def prompts() -> list[Prompt]:
    """Eight prompts of 5 to 40 characters (tokens, for the tiny model)."""
    texts = [f"question {i}: " + "how many? " * (i % 4) for i in range(8)]
    return [Prompt(id=f"p{i}", source="test", text=text) for i, text in enumerate(texts)]
