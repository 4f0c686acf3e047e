"""The GRPO loop's middle on a GPU: generate, train, swap in place, proven; and the proof's alarm."""

import pytest
import torch
from transformers import AutoTokenizer

from strop.engine.batch import Prompt, Score
from strop.engine.model.checkpoint import load_hf_folder
from strop.engine.model.sources import make_tiny
from strop.engine.model.weights import ModelWeights
from strop.engine.parallel.mesh import Mesh
from strop.engine.protocols import Sampling
from strop.engine.rollout.engine import EngineConfig, InProcessEngine
from strop.engine.rollout.weights import MAX_PROBE_DIFFERENCE, StaleWeightsError
from strop.engine.train.step import TrainConfig, Trainer
from strop.kernels import LossSpec

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PROMPTS = [Prompt(id=f"p{i}", source="test", text=f"{i} and " * (i + 1)) for i in range(4)]
GROUP = 4


@pytest.fixture
def start(tmp_path):
    """start(dtype, **training settings) -> (trainer, engine bound to its weights, but not yet synchronised)."""
    make_tiny(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def start(dtype, **settings):
        model = load_hf_folder(tmp_path, dtype, DEVICE)
        config = TrainConfig(steps=4, lr=1e-3, microbatch_tokens=256, microbatch_sequences=32, **settings)
        trainer = Trainer(model, Mesh.single(DEVICE), config)
        engine = InProcessEngine(
            model.config, tokenizer, lambda prompt: tokenizer.encode(prompt.text, add_special_tokens=False),
            EngineConfig(kv_cache_gib=0.05), DEVICE, dtype, trainer.token_logprobs,
        )  # fmt: skip
        engine.bind_weights(ModelWeights(model))
        return trainer, engine

    return start


def score(groups):
    """1 for every other response."""
    marks = tuple(Score(float(index % 2), {"exact": float(index % 2)}) for index in range(GROUP))
    return [type(group)(group.prompt, group.prompt_tokens, group.samples, marks) for group in groups]


@pytest.mark.parametrize(
    ("dtype", "most_mismatch"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("settings", [
    {"minibatches": 2},
    {"loss": LossSpec(kl_coef=0.01, entropy_coef=0.01)},
    {"recompute": "full"},
], ids=["two mini-batches", "KL and entropy", "recompute"])  # fmt: skip
def test_generate_train_and_swap(start, dtype, most_mismatch, settings):
    trainer, engine = start(dtype, **settings)
    places = [parameter.data_ptr() for parameter in trainer.model.parameters()]
    engine.sync_weights(0)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    for step in (1, 2):
        ids = [(step * len(PROMPTS) + ordinal) * GROUP for ordinal in range(len(PROMPTS))]
        groups = engine.generate(PROMPTS, Sampling(n=GROUP, max_new_tokens=12, temperature=0.9, seed=3), ids)
        _, metrics = trainer.train_on(score(groups), step, seed=0)
        assert metrics["mismatch/mean"] < most_mismatch, "rollout and trainer don't agree about the same weights"
        assert 0 < metrics["grad_norm"] < 1e3 and metrics["entropy"] > 0
        times = trainer.take_times()
        assert times.keys() == {"time/train_logprobs", "time/train_gradients", "time/train_optimizer"}
        assert all(0 <= seconds < 60 for seconds in times.values()) and times["time/train_gradients"] > 0
        engine.sync_weights(step)
        assert engine.probe_difference <= MAX_PROBE_DIFFERENCE[dtype]
    after = list(trainer.model.parameters())
    assert [parameter.data_ptr() for parameter in after] == places, "T0: weights stay where they are"
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True)), "every parameter moved"
    assert {tensor.device.type for tensor in trainer.optimizer.main_grads().values()} == {DEVICE}


def test_stale_weights_are_caught(start):
    trainer, engine = start(torch.bfloat16)
    engine.sync_weights(0)
    projection = trainer.model.layers["2"].attention.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().clone())
    with pytest.raises(StaleWeightsError, match="don't use version 1"):
        engine.sync_weights(1)


def test_a_resumed_state_is_the_saved_one(start):
    """Checkpoints copy tensors to the host and back into the same places."""
    trainer, engine = start(torch.bfloat16)
    engine.sync_weights(0)
    trainer.train_on(score(engine.generate(PROMPTS, Sampling(n=GROUP, max_new_tokens=8, seed=1))), 1, seed=0)
    saved = {name: tensor.to("cpu", copy=True) for name, tensor in flat(trainer.state_dict()).items()}
    engine.sync_weights(1)
    trainer.train_on(score(engine.generate(PROMPTS, Sampling(n=GROUP, max_new_tokens=8, seed=2))), 2, seed=0)
    live = flat(trainer.state_dict())
    assert any(not torch.equal(live[name].cpu(), tensor) for name, tensor in saved.items())
    for name, tensor in live.items():
        tensor.copy_(saved[name])
    engine.sync_weights(1)
    restored = flat(trainer.state_dict())
    assert all(torch.equal(restored[name].cpu(), tensor) for name, tensor in saved.items())


def flat(state, prefix=""):
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    return {key: tensor for name, part in state.items() for key, tensor in flat(part, f"{prefix}/{name}").items()}
