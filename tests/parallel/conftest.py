"""A policy of 10 thousand parameters and made-up rollouts for it."""

from collections.abc import Callable

import pytest
import torch

from strop.engine.batch import Group, Prompt, Sample, Score, Span
from strop.engine.model.config import ModelConfig
from strop.engine.model.transformer import Transformer

VOCAB, GROUPS, GROUP_SIZE = 37, 6, 4


@pytest.fixture
def make_policy() -> Callable[..., Transformer]:
    """`make_policy(seed=0, dtype=torch.float32)`: always the same weights for a seed. Embeddings are tied."""
    return _make_policy


@pytest.fixture
def make_rollout() -> Callable[[int], list[Group]]:
    """`make_rollout(step)`: 6 scored groups of 4 with ids unique over steps. Responses have 1 to 16 tokens; group 4's rewards
    are equal, one sample of group 5 has a NaN reward."""
    return _make_rollout


def _make_policy(seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    config = ModelConfig(
        family="llama", vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=12, max_positions=64, tie_embeddings=True, init_std=0.3,
    )  # fmt: skip
    model = Transformer(config, dtype=dtype, device="cpu")
    model.init_weights(seed)
    return model


def _make_rollout(step: int) -> list[Group]:
    generator = torch.Generator().manual_seed(step)

    def draw(high: int, size: int = 1) -> torch.Tensor:
        return torch.randint(high, (size,), generator=generator)

    groups = []
    for ordinal in range(GROUPS):
        prompt_tokens = draw(VOCAB, 2 + int(draw(6)))
        samples, scores = [], []
        for index in range(GROUP_SIZE):
            tokens = draw(VOCAB, 1 + int(draw(16)))
            logprobs = -3.6 + 0.3 * torch.randn(len(tokens), generator=generator)
            span = Span(tokens, True, step - 1, logprobs, logprobs, temperature=0.9)
            sample_id = (step * GROUPS + ordinal) * GROUP_SIZE + index
            samples.append(Sample(sample_id, (span,), "stop" if int(draw(4)) else "length", text=""))
            reward = 1.0 if ordinal == 4 else float(draw(3)) / 2
            scores.append(Score(float("nan") if (ordinal, index) == (5, 2) else reward, {"exact": reward, "format": 0.5}))
        prompt = Prompt(id=f"{step}-{ordinal}", source="made-up", text="?")
        groups.append(Group(prompt, prompt_tokens, tuple(samples), tuple(scores)))
    return groups
