"""The swap of weights on T0: what can't be aliased is refused by name, and a proof that fails stops the run."""

import dataclasses
import re

import pytest
import torch

from strop.engine.config import InputError, Layout
from strop.engine.model.transformer import Transformer
from strop.engine.model.weights import ModelWeights, bit_sum
from strop.engine.protocols import Sampling, WeightMeta
from strop.engine.rollout.engine import InProcessEngine, RolloutConfig
from strop.engine.rollout.weights import StaleWeightsError

Q_PROJ = "model.layers.2.self_attn.q_proj.weight"


class Edited:
    """A source with some of its tensors or metadata replaced; None removes them."""

    def __init__(self, source, shards=None, metadata=None):
        self.source, self.shards, self.changes = source, shards or {}, metadata or {}

    def metadata(self):
        changed = [self.changes.get(meta.name, meta) for meta in self.source.metadata()]
        extra = [self.changes[name] for name in self.changes.keys() - {meta.name for meta in self.source.metadata()}]
        return [meta for meta in changed + extra if meta is not None]

    def local_shards(self):
        shards = dict(self.source.local_shards()) | self.shards
        return {name: tensor for name, tensor in shards.items() if tensor is not None}


def unbound(lab, dtype=None, probe=None):
    return InProcessEngine(
        lab.model.config, lab.tokenizer, lab.encode, RolloutConfig(), "cpu", dtype or lab.dtype, probe or lab.logprobs
    )


def test_t0_aliases_every_parameter(lab):
    engine = unbound(lab)
    source = ModelWeights(lab.model)
    plan = engine.bind_weights(source)
    assert set(plan.tiers) == set(source.local_shards()) and set(plan.tiers.values()) == {"alias"}
    stats = engine.sync_weights(3)
    assert (stats.version, stats.bytes_moved, engine.version) == (3, 0, 3) and stats.seconds > 0
    assert engine.probe_difference < 1e-5


def test_checksum_is_of_the_weights_in_use(lab):
    engine = lab.engine()
    before = engine.checksum()
    assert before == {name: f"{bit_sum(tensor):016x}" for name, tensor in ModelWeights(lab.model).local_shards().items()}
    assert before["lm_head.weight"] == before["model.embed_tokens.weight"]
    with torch.no_grad():
        lab.model.layers["2"].attention.q_proj.weight[5, 7] += 1e-3
    after = engine.checksum()
    assert [name for name in before if before[name] != after[name]] == [Q_PROJ]


def case(shard=None, meta=None, dtype=None, expected=""):
    return pytest.param(shard, meta, dtype, expected, id=expected[:40])


@pytest.mark.parametrize(
    ("shard", "meta", "dtype", "expected"),
    [
        case(dtype=torch.bfloat16, expected="in torch.float32, rollouts want torch.bfloat16. T1 (local copy) isn't impl"),
        case(shard=lambda t: t.t().contiguous().t(), expected="layout is (1, 144), rollouts want (144, 1). T1 (local copy)"),
        case(shard=lambda t: t.to("meta"), expected="holds it on meta, rollouts run on cpu. T1 (local copy)"),
        case(meta=lambda m: dataclasses.replace(m, shard=(slice(0, 72),)), expected="only the part (slice(0, 72, None),). T2"),
        case(shard=lambda t: None, expected="this rank's trainer doesn't hold it. T2 (reshard) or T3 (stream) isn't"),
        case(shard=lambda t: t[:, :100].contiguous(), expected="shape (144, 100) in the trainer, (144, 144) in the rollout"),
    ],
)
def test_what_t0_cannot_serve_is_refused(lab, shard, meta, dtype, expected):
    source = ModelWeights(lab.model)
    shards = {} if shard is None else {Q_PROJ: shard(source.local_shards()[Q_PROJ])}
    metadata = {} if meta is None else {Q_PROJ: meta(next(m for m in source.metadata() if m.name == Q_PROJ))}
    with pytest.raises(InputError, match=re.escape(expected)) as error:
        unbound(lab, dtype=dtype).bind_weights(Edited(source, shards, metadata))
    assert ("model.embed_tokens.weight" if dtype else Q_PROJ) in str(error.value)


def test_sets_of_parameters_must_agree(lab):
    source = ModelWeights(lab.model)
    bias = WeightMeta("model.layers.0.self_attn.q_proj.bias", "float32", (144,))
    with pytest.raises(InputError, match=r"weight model.layers.0.self_attn.q_proj.bias of the trainer has no place"):
        unbound(lab).bind_weights(Edited(source, {bias.name: torch.zeros(144)}, {bias.name: bias}))
    apart = source.local_shards()["lm_head.weight"].clone()
    with pytest.raises(InputError, match=r"weight lm_head.weight: .* keeps it apart"):
        unbound(lab).bind_weights(Edited(source, {"lm_head.weight": apart}))


def test_a_copied_parameter_is_caught(lab, prompts):
    """The trainer replaces a storage: the engine would go on with the old one."""
    engine = lab.engine()
    projection = lab.model.layers["2"].attention.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().clone())
    with pytest.raises(StaleWeightsError, match=f"don't use version 1 of {re.escape(Q_PROJ)}"):
        engine.sync_weights(1)
    with pytest.raises(RuntimeError, match=r"no proven weights: call sync_weights\(\)"):
        engine.generate(prompts, Sampling())
    engine.bind_weights(ModelWeights(lab.model))
    engine.sync_weights(1)
    assert len(engine.generate(prompts, Sampling())) == len(prompts)


def test_a_copy_on_the_engine_s_side_is_caught(lab):
    engine = lab.engine()
    norm = engine._paged.model.final_norm
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
    with pytest.raises(StaleWeightsError, match=r"version 1 of model\.norm\.weight"):
        engine.sync_weights(1)


def test_weights_that_differ_from_the_trainer_s_are_caught(sharp_lab):
    """The pointers agree, but the trainer computes with other values (a fused copy that wasn't refreshed, say)."""
    trainer = Transformer(sharp_lab.model.config, dtype=torch.float32, device="cpu")
    trainer.load_state_dict(sharp_lab.model.state_dict())
    engine_side, sharp_lab.model = sharp_lab.model, trainer
    engine = unbound(sharp_lab)
    engine.bind_weights(ModelWeights(engine_side))
    engine.sync_weights(0)
    with torch.no_grad():
        trainer.layers["3"].mlp.up_proj.weight[:, 11] += 0.2
    message = r"don't use version 1 of the weights: log-prob of token \d+ at position \d+ of the fixed prompt is -"
    with pytest.raises(StaleWeightsError, match=message):
        engine.sync_weights(1)
    with torch.no_grad():
        trainer.layers["3"].mlp.up_proj.weight[:, 11] = torch.nan
    with pytest.raises(StaleWeightsError, match=r"is -.* in the engine, nan in the trainer"):
        engine.sync_weights(1)


def test_a_stale_cache_is_caught(lab, prompts, monkeypatch):
    """Keys of the old weights that survive a sync: prompts held for waiting samples, and running responses."""
    engine = lab.engine(max_batch=4)
    engine.submit(prompts[0], Sampling(n=8, max_new_tokens=20))
    engine.step(), engine.step()
    monkeypatch.setattr(engine._scheduler, "flush", lambda: None)
    with pytest.raises(StaleWeightsError, match=r"\d+ cache blocks still hold keys of weights before version 1"):
        engine.sync_weights(1)


def test_a_model_without_proof_does_not_generate(lab, prompts):
    engine = unbound(lab)
    with pytest.raises(AssertionError, match="bind_weights comes before"):
        engine.sync_weights(0)
    engine.bind_weights(ModelWeights(lab.model))
    with pytest.raises(RuntimeError, match="no proven weights"):
        engine.generate(prompts, Sampling())


def test_bf16(lab, prompts):
    """The proof passes, and log-probs agree with a trainer forward to the precision of the dtype."""
    lab.model.to(torch.bfloat16)
    lab.dtype = torch.bfloat16
    engine = lab.engine()
    groups = engine.generate(prompts, Sampling(n=2, max_new_tokens=12))
    sample = groups[0].samples[0]
    expected = lab.logprobs(torch.cat([groups[0].prompt_tokens, sample.tokens]))[len(groups[0].prompt_tokens) - 1 :]
    assert (sample.spans[0].raw_logprobs - expected).abs().max() < 0.03
    assert sample.spans[0].logprobs.dtype == torch.float32
    with pytest.raises(ValueError, match=r"torch.float16.*torch.float32 and torch.bfloat16"):
        unbound(lab, dtype=torch.float16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "--rollout.max-batch 0: must be at least 1"),
        ({"kv_cache_gib": 0.0}, "--rollout.kv-cache-gib 0.0: must be above 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        RolloutConfig(**settings)


def test_a_layout_of_its_own_is_refused():
    assert RolloutConfig(layout=Layout(dp=2)).layout is not None
    with pytest.raises(InputError, match=r"--rollout.layout .*tp=2.*T2.*isn't implemented yet: leave --rollout.layout out"):
        RolloutConfig(layout=Layout(tp=2))
