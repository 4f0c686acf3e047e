"""The verl adapter against verl's formulas, written out here in plain torch, and in a worker loop that stands in for verl's.

verl is no test dependency (it brings ray and an inference engine). The formulas are those of its core_algos.py and dp_actor.py
at the commit that kernels/integrations/verl.py names.
"""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from strop.kernels.integrations.verl import (
    MODES,
    compute_log_prob,
    compute_policy_loss,
    fused_linear_for_ppo,
    policy_loss_fn,
    register,
)

AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
GLOBAL = {"dp_size": 2, "batch_num_tokens": 41, "global_batch_size": 11, "loss_scale_factor": 13}
BATCH, PROMPT, RESPONSE, HIDDEN, VOCAB = 5, 3, 7, 8, 19


def actor_config(**changes) -> SimpleNamespace:
    settings = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5, "tau_pos": 1.0,
                "tau_neg": 1.05, "global_batch_info": {}}  # fmt: skip
    return SimpleNamespace(**settings | changes)


def verl_aggregate(values, mask, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    sums, lengths = (values * mask).sum(1), mask.sum(1)
    if mode == "token-mean":
        return dp_size * sums.sum() / (mask.sum() if batch_num_tokens is None else batch_num_tokens)
    if mode == "seq-mean-token-sum-norm":
        return sums.sum() / (mask.shape[1] if loss_scale_factor is None else loss_scale_factor)
    if mode == "seq-mean-token-mean":
        sums = sums / (lengths + 1e-8)
    return dp_size * sums.sum() / ((lengths > 0).sum() if global_batch_size is None else global_batch_size)


def verl_policy_loss(mode, old, log_prob, advantages, mask, agg_mode, config, weights=None):
    difference = log_prob - old
    if mode == "gspo":
        mean = (difference * mask).sum(1) / mask.sum(1).clamp(min=1)
        difference = log_prob - log_prob.detach() + mean.detach()[:, None]
    ratio = difference.clamp(-20, 20).exp()
    low, high = 0.2, 0.28
    clipped = ratio.clamp(1 - low, 1 + high)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    if mode == "vanilla":
        losses = torch.where(advantages < 0, torch.minimum(-advantages * config.clip_ratio_c, losses), losses)
    elif mode == "sapo":
        tau = torch.full_like(advantages, config.tau_neg).masked_fill(advantages > 0, config.tau_pos)
        losses = -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    elif mode == "cispo":
        losses = -clipped.detach() * advantages * log_prob
    elif mode == "gpg":
        losses = -advantages * log_prob
    return verl_aggregate(losses if weights is None else losses * weights, mask, agg_mode, **config.global_batch_info)


def random_batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(BATCH, RESPONSE, generator=generator, dtype=torch.float64)

    log_prob = normal() - 2
    return {
        "log_prob": log_prob.requires_grad_(), "old_log_prob": log_prob.detach() + normal(0.4), "advantages": normal(),
        "response_mask": (torch.arange(RESPONSE) < torch.tensor([RESPONSE, 1, 4, 0, 5])[:, None]).long(),
        "rollout_is_weights": normal(0.3).exp().clamp(max=1.5),
    }  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("global_info", [{}, GLOBAL], ids=["micro-batch", "global"])
@pytest.mark.parametrize("agg_mode", AGG_MODES)
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_and_gradient_equal_verls(mode, agg_mode, global_info, weighted):
    batch = random_batch(seed=len(agg_mode))
    weights = batch.pop("rollout_is_weights") if weighted else batch.pop("rollout_is_weights") * 0 + 1
    config = actor_config(global_batch_info=global_info)
    expected = verl_policy_loss(mode, batch["old_log_prob"], batch["log_prob"], batch["advantages"], batch["response_mask"],
                                agg_mode, config, weights)  # fmt: skip
    (wanted,) = torch.autograd.grad(expected, batch["log_prob"])
    loss, metrics = policy_loss_fn(mode)(
        **batch, loss_agg_mode=agg_mode, config=config, rollout_is_weights=weights if weighted else None
    )
    (gradient,) = torch.autograd.grad(loss, batch["log_prob"])
    # verl divides a sequence's sum by its length + 1e-8
    torch.testing.assert_close(loss, expected, rtol=2e-8, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=2e-8, atol=1e-12)
    assert gradient.count_nonzero() > 0
    assert set(metrics) == (set() if mode == "gpg" else {f"actor/{n}" for n in ("pg_clipfrac", "ppo_kl", "pg_clipfrac_lower")})


def test_metrics_are_verls():
    batch = random_batch(seed=4)
    del batch["rollout_is_weights"]
    mask, a = batch["response_mask"].bool(), batch["advantages"]
    difference = (batch["log_prob"] - batch["old_log_prob"]).detach()
    ratio = difference.exp()
    _, metrics = compute_policy_loss("vanilla", **batch, config=actor_config())
    cut = (a > 0) & (ratio > 1.28) | (a < 0) & (ratio < 0.8)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(cut[mask].double().mean().item()) and cut[mask].any()
    dual = (a < 0) & (ratio > 1.5)
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(dual[mask].double().mean().item()) and dual[mask].any()
    assert metrics["actor/ppo_kl"] == pytest.approx(-difference[mask].mean().item(), rel=1e-6)


def test_a_batch_without_trainable_tokens_is_a_zero():
    batch = random_batch(seed=0) | {"response_mask": torch.zeros(BATCH, RESPONSE)}
    for mode in MODES:
        for agg_mode in AGG_MODES:
            loss, _ = compute_policy_loss(mode, **batch, loss_agg_mode=agg_mode, config=actor_config())
            assert loss.item() == 0


class Actor(torch.nn.Module):
    """Hidden states that depend on the token before, and an LM head."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, HIDDEN)
        self.mix = torch.nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids):
        return torch.tanh(self.mix(self.embedding(input_ids)))


def plain_log_prob(hidden_states, vocab_weights, micro_batch, temperature, calculate_entropy=False):
    """dp_actor's padded path: all logits, the response's positions shifted by one."""
    length = micro_batch["responses"].shape[1]
    log_p = ((hidden_states @ vocab_weights.T)[:, -length - 1 : -1] / temperature).log_softmax(-1)
    chosen = log_p.gather(-1, micro_batch["responses"][..., None]).squeeze(-1)
    return {"log_probs": chosen, "entropys": -(log_p.exp() * log_p).sum(-1)}


def plain_policy_loss(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):
    return verl_policy_loss("vanilla", old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config), {}


def worker_update(actor, log_prob_fn, policy_loss_fn, batch, config, agg_mode) -> list[float]:
    """verl's compute_log_prob, then update_policy: 2 epochs of 2 mini-batches of 2 micro-batches; entropy is the worker's."""
    optimizer = torch.optim.SGD(actor.parameters(), lr=0.5)
    with torch.no_grad():
        old = log_prob_fn(actor(batch["input_ids"]), actor.lm_head.weight, batch, temperature=0.7)["log_probs"]
    losses = []
    for _ in range(2):
        for mini in torch.arange(8).split(4):
            optimizer.zero_grad()
            for micro in mini.split(2):
                part = {name: tensor[micro] for name, tensor in batch.items()}
                outputs = log_prob_fn(actor(part["input_ids"]), actor.lm_head.weight, part, 0.7, calculate_entropy=True)
                loss, _ = policy_loss_fn(
                    old_log_prob=old[micro], log_prob=outputs["log_probs"], advantages=part["advantages"],
                    response_mask=part["response_mask"], loss_agg_mode=agg_mode, config=config, rollout_is_weights=None,
                )  # fmt: skip
                entropy = verl_aggregate(outputs["entropys"], part["response_mask"], agg_mode)
                ((loss - 0.01 * entropy) / 2).backward()
                losses.append(loss.item())
            optimizer.step()
    return losses


@pytest.mark.parametrize("agg_mode", AGG_MODES)
def test_worker_loop_equals_plain_torch(agg_mode, monkeypatch):
    registry = fake_verl(monkeypatch)
    register("vanilla")
    ids = torch.randint(0, VOCAB, (8, PROMPT + RESPONSE))
    mask = (torch.arange(RESPONSE) < torch.tensor([RESPONSE, 1, 4, 6, 5, 2, 3, 7])[:, None]).long()
    batch = {
        "input_ids": ids, "responses": ids[:, PROMPT:], "response_mask": mask,
        "attention_mask": torch.cat([torch.ones(8, PROMPT, dtype=torch.int64), mask], 1),
        "advantages": torch.randn(8, 1).double().expand(8, RESPONSE),
    }  # fmt: skip
    runs = []
    for log_prob_fn, loss_fn in ((plain_log_prob, plain_policy_loss), (compute_log_prob, registry["strop_vanilla"])):
        torch.manual_seed(1)
        actor = Actor().double()
        before = torch.cat([parameter.detach().flatten() for parameter in actor.parameters()])
        losses = worker_update(actor, log_prob_fn, loss_fn, batch, actor_config(), agg_mode)
        runs.append((losses, torch.cat([parameter.detach().flatten() for parameter in actor.parameters()]) - before))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-6, abs=1e-7)  # 1e-8 of seq-mean-token-mean, grown over 4 steps
    assert (runs[1][1] - runs[0][1]).norm() <= 1e-6 * runs[0][1].norm()
    assert runs[0][1].norm() > 0.1


def test_the_readmes_snippet_runs(readme_examples):
    batch = random_batch(seed=2)
    hidden_states, lm_head = torch.randn(BATCH, PROMPT + RESPONSE, HIDDEN), torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    micro_batch = {
        "responses": torch.randint(0, VOCAB, (BATCH, RESPONSE)), "attention_mask": torch.ones(BATCH, PROMPT + RESPONSE),
        "old_log_probs": batch["old_log_prob"], "advantages": batch["advantages"], "response_mask": batch["response_mask"],
    }  # fmt: skip
    given = {"hidden_states": hidden_states, "lm_head": lm_head, "micro_batch": micro_batch, "temperature": 0.9}
    exec(readme_examples[2], names := given | {"config": actor_config()})
    names["pg_loss"].backward()
    assert lm_head.weight.grad.norm() > 0 and names["metrics"]["actor/ppo_kl"] != 0


def test_unpadded_layout_and_gradients():
    """[1, N] with rolled ids, as use_remove_padding calls the fused head."""
    hidden = torch.randn(1, 12, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, VOCAB, (1, 12)).roll(-1, 1)
    log_p = (hidden @ weight.T / 0.6).log_softmax(-1)
    expected = log_p.gather(-1, ids[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    got = fused_linear_for_ppo(hidden, weight, ids, temperature=0.6)
    upstream = torch.randn(2, 1, 12, dtype=torch.float64)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    ours, wanted = (
        torch.autograd.grad((pair[0] * upstream[0] + pair[1] * upstream[1]).sum(), (hidden, weight)) for pair in (got, expected)
    )
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_bf16_log_probs_of_an_autocast_worker():
    batch = random_batch(seed=1)
    rounded = batch["log_prob"].detach().bfloat16().requires_grad_()
    loss, _ = compute_policy_loss("vanilla", **batch | {"log_prob": rounded}, config=actor_config())
    loss.backward()
    assert loss.dtype == torch.float32 and rounded.grad.dtype == torch.bfloat16 and rounded.grad.count_nonzero() > 0


def fake_verl(monkeypatch) -> dict:
    """verl's registry, as far as `register` sees it."""
    registry: dict = {}

    def register_policy_loss(name):
        return lambda function: registry.setdefault(name, function)

    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["verl.trainer.ppo.core_algos"].register_policy_loss = register_policy_loss
    return registry


def test_register_is_opt_in(monkeypatch):
    registry = fake_verl(monkeypatch)
    monkeypatch.delitem(sys.modules, "strop.kernels.integrations.verl_external_lib", raising=False)
    assert not registry
    assert register("gspo", "gpg") == ["strop_gspo", "strop_gpg"] == list(registry)
    import strop.kernels.integrations.verl_external_lib  # noqa: F401

    assert set(registry) == {f"strop_{mode}" for mode in MODES}


def test_register_without_verl_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ModuleNotFoundError, match="pip install verl"):
        register()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda batch: policy_loss_fn("clip_cov"), r"loss_mode 'clip_cov'.*vanilla.*verl's own"),
        (lambda batch: register("geo_mean"), r"loss_mode 'geo_mean'"),
        (lambda batch: compute_policy_loss("vanilla", **batch), r"config is None"),
        (lambda batch: compute_policy_loss("vanilla", **batch, config=actor_config(), loss_agg_mode="sample-mean"),
         r"loss_agg_mode 'sample-mean'.*token-mean"),
        (lambda batch: compute_policy_loss("vanilla", **batch, config=actor_config(clip_ratio_c=0.9)),
         r"actor config: clip_ratio_c 0\.9 must be above 1"),
        (lambda batch: compute_policy_loss("sapo", **batch, config=actor_config(tau_neg=0.0)),
         r"actor config: tau_neg 0\.0"),
        (lambda batch: compute_policy_loss("vanilla", **batch | {"advantages": torch.ones(2)}, config=actor_config()),
         r"advantages has shape \(2,\)"),
        (lambda batch: compute_policy_loss("vanilla", **batch | {"rollout_is_weights": torch.ones(2)}, config=actor_config()),
         r"rollout_is_weights has shape \(2,\)"),
        (lambda batch: compute_log_prob(torch.zeros(2, 5, 4), torch.zeros(9, 4),
                                        {"responses": torch.zeros(2, 5).long(), "attention_mask": torch.ones(2, 5)}, 1.0),
         r"hidden_states \(2, 5, 4\).*P >= 1"),
    ],
)  # fmt: skip
def test_errors_name_what_to_pass_instead(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_batch(seed=0))


def test_importing_strop_kernels_imports_no_adapter():
    code = "import sys, strop.kernels; print([m for m in sys.modules if 'integrations' in m or m in ('trl', 'verl')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
