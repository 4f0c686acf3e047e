"""The Transformer against transformers' own Llama, Qwen2 and Qwen3: random tiny models, forward and gradients."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from strop.engine.model import names
from strop.engine.model.config import ModelConfig
from strop.engine.model.context import ForwardContext, Packed
from strop.engine.model.transformer import Transformer

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
THEIR_CONFIGS = {
    "llama, linear rope, untied": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama, llama3 rope, tied, wide heads": LlamaConfig(
        **SIZES, rope_parameters=LLAMA3_ROPE, head_dim=24, tie_word_embeddings=True
    ),
    "qwen2, biases, tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3, q/k norm, own head_dim, untied": Qwen3Config(**SIZES, head_dim=16),
}


@pytest.fixture(params=THEIR_CONFIGS.values(), ids=THEIR_CONFIGS.keys())
def theirs(request: pytest.FixtureRequest) -> torch.nn.Module:
    """A transformers model whose every parameter is random (their norms start at 1 and biases at 0: blind spots)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.param, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model


def copy_of(theirs: torch.nn.Module, dtype: torch.dtype = torch.float32, layers: range | None = None) -> Transformer:
    """Our model (or stage) with their weights; every one of their parameters must have a place in the whole model."""
    config = ModelConfig.from_hf(theirs.config.to_dict(), "their config")
    model = Transformer(config, dtype=dtype, device="cpu", layers=layers)
    weights = dict(theirs.named_parameters())
    ours = {names.to_hf(name): parameter for name, parameter in model.named_parameters()}
    assert layers is not None or ours.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(weights[name])
    return model


def batch_of(lengths: list[int], padding: int) -> tuple[Tensor, ForwardContext, list[slice]]:
    """Random ids of sequences end to end, then padding ids; where each sequence lies."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    total = int(ends[-1]) + padding
    positions = torch.cat([torch.arange(length) for length in [*lengths, padding]])
    ids = torch.randint(0, SIZES["vocab_size"], (total,), generator=torch.Generator().manual_seed(1))
    where = [slice(a, b) for a, b in itertools.pairwise(ends.tolist())]
    return ids, ForwardContext(positions, Packed(ends.int(), max(lengths))), where


def logits_of(model: Transformer, ids: Tensor, ctx: ForwardContext) -> Tensor:
    return model(ids, ctx) @ model.lm_head_weight.T


def greatest_difference(a: Tensor, b: Tensor) -> float:
    """Relative to the largest entry of b, absolute below 1."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def test_forward_and_gradients_equal_transformers(theirs):
    ours = copy_of(theirs)
    ids, ctx, where = batch_of([100, 7], padding=5)
    direction = torch.randn(len(ids), SIZES["vocab_size"]) / len(ids)
    logits = logits_of(ours, ids, ctx)
    (logits * direction)[: where[-1].stop].sum().backward()
    for part in where:
        expected = theirs(ids[None, part]).logits[0]
        assert greatest_difference(logits[part], expected) <= 1e-5
        (expected * direction[part]).sum().backward()
    expected_gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = expected_gradients[names.to_hf(name)].grad
        assert expected.abs().max() > 1e-3, f"{name} has no gradient worth comparing"
        assert greatest_difference(parameter.grad, expected) <= 1e-5, name


def test_fp64_agrees_with_fp32_to_fp32_precision(theirs):
    ids, ctx, _ = batch_of([60, 9], padding=3)
    single, double = (logits_of(copy_of(theirs, dtype), ids, ctx) for dtype in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert 0 < greatest_difference(single.double(), double) < 1e-5


def test_two_stages_chained_equal_the_whole(theirs):
    ids, ctx, where = batch_of([30, 1, 12], padding=2)
    whole, first, last = copy_of(theirs), copy_of(theirs, layers=range(1)), copy_of(theirs, layers=range(1, 4))
    assert not hasattr(first, "final_norm") and first.is_first and last.is_last
    assert hasattr(last, "embedding") == whole.config.tie_embeddings
    names_of_stages = {name for stage in (first, last) for name, _ in stage.named_parameters()}
    assert names_of_stages == {name for name, _ in whole.named_parameters()}
    expected = logits_of(whole, ids, ctx)
    handed_over = first(ids, ctx)
    actual = last(handed_over, ctx) @ last.lm_head_weight.T
    assert torch.equal(actual, expected)
    expected[: where[-1].stop].square().mean().backward()
    actual[: where[-1].stop].square().mean().backward()
    for name, parameter in whole.named_parameters():
        gradients = [p.grad for stage in (first, last) for n, p in stage.named_parameters() if n == name and p.grad is not None]
        assert greatest_difference(sum(gradients), parameter.grad) <= 1e-6, name  # a tied head: the sum of both stages


def test_recomputation_changes_no_gradient(theirs):
    ids, ctx, _ = batch_of([40, 25], padding=0)
    gradients = []
    for recompute in ("none", "full"):
        model = copy_of(theirs)
        model.recompute = recompute
        logits_of(model, ids, ctx).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


def test_transformers_reads_the_config_we_write_as_the_same_config(theirs):
    config = ModelConfig.from_hf(theirs.config.to_dict(), "their config")
    reloaded = type(theirs.config).from_dict(config.to_hf("float32"))
    ignored = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    assert isinstance(reloaded, PreTrainedConfig)
    ours, original = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (reloaded, theirs.config))
    assert ours == original


def test_initial_weights_depend_on_seed_and_name_only():
    config = ModelConfig.from_hf(THEIR_CONFIGS["qwen2, biases, tied"].to_dict(), "a config")
    whole, stage, other = (
        Transformer(config, dtype=torch.float32, device="cpu", layers=layers) for layers in (None, range(2, 4), None)
    )
    whole.init_weights(seed=3)
    stage.init_weights(seed=3)
    other.init_weights(seed=4)
    values = dict(whole.named_parameters())
    assert all(torch.equal(parameter, values[name]) for name, parameter in stage.named_parameters())
    matrix = values["layers.2.mlp.up_proj.weight"]
    assert not torch.equal(matrix, dict(other.named_parameters())["layers.2.mlp.up_proj.weight"])
    assert not torch.equal(matrix, values["layers.3.mlp.up_proj.weight"])
    assert abs(matrix.std().item() / config.init_std - 1) < 0.05
    assert bool((values["final_norm.weight"] == 1).all()) and bool((values["layers.2.attention.q_proj.bias"] == 0).all())


def test_aliased_model_follows_the_trainer_in_place(theirs):
    trainer = copy_of(theirs)
    rollout = Transformer(trainer.config, dtype=torch.float32, device="meta")
    rollout.alias_parameters(dict(trainer.named_parameters()))
    assert not any(parameter.requires_grad for parameter in rollout.parameters())
    ids, ctx, _ = batch_of([20], padding=0)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(1.1)
        assert torch.equal(logits_of(rollout, ids, ctx), logits_of(trainer, ids, ctx))
    with pytest.raises(ValueError, match=r"no tensor for parameter layers\.0"):
        rollout.alias_parameters({"embedding.weight": trainer.embedding.weight, "lm_head.weight": trainer.lm_head_weight})
    transposed = {name: parameter.mT if parameter.ndim == 2 else parameter for name, parameter in trainer.named_parameters()}
    with pytest.raises(ValueError, match=r"embedding.weight: shape \(48, 97\), this model needs \(97, 48\)"):
        rollout.alias_parameters(transposed)
