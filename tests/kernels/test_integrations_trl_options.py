"""strop's GRPOTrainer against TRL's own under every option of the loss, in fp64; and every option it refuses.

`_compute_loss` of both runs on the same batch, in trainers built without __init__. The model's logits are its parameter,
because TRL's own LM head computes its statistics in fp32. Loss, gradient and all logged metrics are compared.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from strop.kernels import logprob
from strop.kernels.integrations.trl_options import logit_transform, loss_spec, refuse_unserved

trl = pytest.importorskip("trl", reason="needs trl (pip install strop[test])")


@pytest.fixture(scope="module")
def strop_trainer():
    from strop.kernels.integrations.trl import GRPOTrainer

    return GRPOTrainer


SEQUENCES, PROMPT, LENGTH, VOCAB = 6, 2, 7, 11
SEQUENCE_LEVEL = {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06}
VLLM = {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.2}
OPTIONS = {  # name: GRPOConfig
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "luspo": {"loss_type": "luspo", **SEQUENCE_LEVEL},
    "luspo on tokens": {"loss_type": "luspo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 1.25, "sapo_temperature_pos": 0.75},  # TRL rounds them to fp32
    "vespo": {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_neg": 0.0},
    "gspo": {"loss_type": "grpo", **SEQUENCE_LEVEL},
    "gspo, two-sided": {"loss_type": "dr_grpo", **SEQUENCE_LEVEL, "delta": 1.1},
    "two-sided": {"delta": 1.3, "epsilon_high": 0.28},
    "unbiased kl": {"beta": 0.1},
    "naive kl": {"beta": 0.1, "use_bias_correction_kl": False, "loss_type": "grpo"},
    "naive kl, sequence level": {"beta": 0.1, "use_bias_correction_kl": False, **SEQUENCE_LEVEL},
    "kl with cispo": {"beta": 0.1, "loss_type": "cispo", "epsilon_high": 1.1},
    "off-policy mask": {"off_policy_mask_threshold": 0.05, "beta": 0.1},
    "off-policy mask, sequence level": {"off_policy_mask_threshold": 0.05, "loss_type": "grpo", **SEQUENCE_LEVEL},
    "top entropy": {"top_entropy_quantile": 0.4, "beta": 0.1, "loss_type": "grpo"},
    "top entropy, sequence level": {"top_entropy_quantile": 0.4, "loss_type": "grpo", **SEQUENCE_LEVEL},
    "top entropy, vespo": {"top_entropy_quantile": 0.4, "loss_type": "vespo"},
    "entropy bonus": {"entropy_coef": 0.1},
    "entropy bonus, grpo": {"entropy_coef": 0.1, "loss_type": "grpo"},
    "entropy bonus, dr_grpo, top entropy": {"entropy_coef": 0.1, "loss_type": "dr_grpo", "top_entropy_quantile": 0.5},
    "token truncate": VLLM,
    "token truncate from below": {**VLLM, "vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": None},
    "token mask": {**VLLM, "vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.8},
    "sequence truncate": {**VLLM, "vllm_importance_sampling_mode": "sequence_truncate", "beta": 0.1},
    "sequence mask, top entropy": {
        **VLLM, "vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 1.6,
        "top_entropy_quantile": 0.4, "loss_type": "grpo",
    },
    "sequence mask, gspo": {**VLLM, "vllm_importance_sampling_mode": "sequence_mask", "loss_type": "grpo", **SEQUENCE_LEVEL},
    "vespo, token truncate": {**VLLM, "loss_type": "vespo"},
    "vespo, token mask": {**VLLM, "loss_type": "vespo", "vllm_importance_sampling_mode": "token_mask"},
    "vllm uncorrected, off-policy mask": {
        **VLLM, "vllm_importance_sampling_correction": False, "off_policy_mask_threshold": 0.05
    },
    "token truncate, off-policy mask": {**VLLM, "off_policy_mask_threshold": 0.05},
}  # fmt: skip


class Scorer(torch.nn.Module):
    """A language model whose logits [B, prompt + L, V] are its parameter; it answers TRL's call and strop's."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, labels=None, fused_lm_head=False, completion_targets=None):
        if completion_targets is not None:
            return logprob(self.logits[:, -completion_targets.shape[1] :], completion_targets)
        log_p = self.logits.log_softmax(-1)
        chosen = log_p.gather(-1, input_ids[..., None]).squeeze(-1)
        return SimpleNamespace(log_probs=chosen, entropy=-(log_p.exp() * log_p).sum(-1))


def bare_trainer(trainer_class, config, model: Scorer):
    """A trainer without __init__ (which loads a model and a data set), as far as `_compute_loss` reads it."""
    from accelerate import Accelerator

    trainer = trainer_class.__new__(trainer_class)
    trainer.__dict__.update(
        args=config, model=model, loss_spec=loss_spec(config), current_gradient_accumulation_steps=3,
        accelerator=Accelerator(cpu=True),  # after the config, which resets its state
        aux_loss_enabled=False, epsilon_low=config.epsilon, _entropy_bonus_enabled=config.entropy_coef != 0,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, max_completion_length=LENGTH,
    )  # fmt: skip
    for name in (
        "loss_type", "beta", "importance_sampling_level", "top_entropy_quantile", "off_policy_mask_threshold", "use_vllm",
        "vllm_importance_sampling_correction", "use_adaptive_entropy", "entropy_coef",
    ):  # fmt: skip
        setattr(trainer, name, getattr(config, name))
    return trainer


def trls_ratio(config, old: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """importance_sampling_ratio of TRL's `_generate_and_score_completions`."""
    gap = ((old - sampler) * mask).nan_to_num(nan=0.0)
    mode = config.vllm_importance_sampling_mode
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    ratio = (gap.sum(-1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(min=low, max=high)
    return ratio.masked_fill((ratio < (low or 0)) | (ratio > high), 0.0)


def fp64_batch(config, model: Scorer, generator: torch.Generator, on_policy: bool, tools: bool) -> dict:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(0, VOCAB, (SEQUENCES, PROMPT + LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 1, 4, 6, 3, 5])[:, None]).long()
    current = logprob(model.logits.detach()[:, PROMPT:], ids[:, PROMPT:]).logprob
    old, ref = (current + 0.3 * normal(SEQUENCES, LENGTH) for _ in range(2))
    batch = {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones(SEQUENCES, PROMPT, dtype=torch.int64),
        "completion_ids": ids[:, PROMPT:], "completion_mask": mask, "ref_per_token_logps": ref,
        "advantages": torch.tensor([1.5, -0.7, 0.0, -1.1, 0.4, -0.2]).double(), "num_items_in_batch": 3 * mask.sum(),
    }  # fmt: skip
    if tools:
        batch["tool_mask"] = (torch.rand(mask.shape, generator=generator) < 0.7).long()
        batch["tool_mask"][1] = 1
    if config.use_vllm:
        sampler = old + 0.2 * normal(SEQUENCES, LENGTH)
        if config.off_policy_mask_threshold is None:
            sampler[0, 2] = torch.nan  # vLLM couldn't score it
        batch["sampling_per_token_logps"] = sampler
        loss_mask = mask * batch.get("tool_mask", 1)
        batch["importance_sampling_ratio"] = trls_ratio(config, old, sampler, loss_mask)
    if config.use_vllm or not on_policy:
        batch["old_per_token_logps"] = old
    return batch


@pytest.mark.parametrize("variant", ["train", "eval", "on-policy", "tools"])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_equals_trls_in_fp64(strop_trainer, case, variant, tmp_path):
    config = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_accumulation_steps=3,
                            steps_per_generation=6, num_generations=2, **OPTIONS[case])  # fmt: skip
    generator = torch.Generator().manual_seed(len(case))
    model = Scorer(torch.randn(SEQUENCES, PROMPT + LENGTH, VOCAB, generator=generator, dtype=torch.float64))
    model.train(variant != "eval")
    batch = fp64_batch(config, model, generator, on_policy=variant == "on-policy", tools=variant == "tools")
    losses, gradients, metrics = [], [], []
    for trainer_class in (trl.GRPOTrainer, strop_trainer):
        trainer = bare_trainer(trainer_class, config, model)
        loss = trainer._compute_loss(model, batch)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, model.logits)[0])
        metrics.append(trainer._metrics["train" if model.training else "eval"])
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    print(f"{case}: loss {losses[1]:.9f}, TRL {losses[0]:.9f}; gradients differ by {difference:.1e} of their norm")
    assert gradients[0].norm() > 1e-3
    assert losses[1] == pytest.approx(losses[0], rel=1e-10, abs=1e-12)
    assert difference <= 1e-10
    assert set(metrics[1]) == set(metrics[0]) >= {"entropy"}
    for name, values in metrics[0].items():
        assert metrics[1][name] == pytest.approx(values, rel=1e-6, abs=1e-7), name  # TRL counts in fp32, and so do we


def test_an_unscored_token_counts_as_the_old_policys(strop_trainer, tmp_path):
    """The documented difference: with an off-policy mask, a NaN from vLLM is read as the old policy's log-prob."""
    config = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], off_policy_mask_threshold=0.05,
                            **VLLM)  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    model = Scorer(torch.randn(SEQUENCES, PROMPT + LENGTH, VOCAB, generator=generator, dtype=torch.float64)).eval()
    batch = fp64_batch(config, model, generator, on_policy=False, tools=False)
    unscored = torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool)
    unscored[[0, 2, 3], [2, 1, 4]] = True
    sampler, old = batch["sampling_per_token_logps"], batch["old_per_token_logps"]
    filled = torch.where(unscored, old, sampler)
    ratio = trls_ratio(config, old, filled, batch["completion_mask"])
    given = batch | {"sampling_per_token_logps": sampler.masked_fill(unscored, torch.nan), "importance_sampling_ratio": ratio}
    loss = bare_trainer(strop_trainer, config, model)._compute_loss(model, given)
    expected = bare_trainer(trl.GRPOTrainer, config, model)._compute_loss(model, given | {"sampling_per_token_logps": filled})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)


REFUSED = [  # (GRPOConfig, what the message names)
    ({"loss_type": "ppo"}, r"loss_type='ppo'.*dapo"),
    ({"importance_sampling_level": "token_sequence"}, r"importance_sampling_level='token_sequence'.*'token'"),
    ({"importance_sampling_level": "sequence", "loss_type": "cispo"}, r"importance_sampling_level='sequence'.*'cispo'"),
    ({"importance_sampling_level": "sequence", "loss_type": "sapo"}, r"importance_sampling_level='sequence'.*'sapo'"),
    ({"importance_sampling_level": "sequence", "beta": 0.1}, r"use_bias_correction_kl=True.*set it to False"),
    ({"delta": 2.0, "loss_type": "sapo"}, r"delta=2\.0.*leave it at None"),
    ({"delta": 1.1}, r"delta 1\.1 must be above 1 \+ epsilon_high = 1\.2"),
    ({"epsilon": -0.5}, r"epsilon -0\.5: must be finite and at least 0"),
    ({"beta": -1.0}, r"beta -1\.0: must be finite and at least 0"),
    ({"off_policy_mask_threshold": -1.0}, r"off_policy_mask_threshold -1\.0"),
    ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, r"sapo_temperature_neg 0\.0: must be finite and above 0"),
    ({**VLLM, "vllm_importance_sampling_mode": "none"}, r"vllm_importance_sampling_mode='none'.*token_truncate"),
    ({**VLLM, "vllm_importance_sampling_mode": "sequence_mask", "loss_type": "vespo"},
     r"vllm_importance_sampling_mode='sequence_mask'.*'token_truncate' or 'token_mask'"),
    ({"use_adaptive_entropy": True}, r"use_adaptive_entropy=True.*fixed entropy_coef"),
    ({"use_liger_kernel": True}, r"use_liger_kernel=True.*set it to False"),
]  # fmt: skip


@pytest.mark.parametrize("settings, message", REFUSED, ids=lambda value: str(value)[:60])
def test_unserved_options_are_refused_before_anything_is_built(strop_trainer, settings, message, tmp_path):
    config = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    for name, value in settings.items():
        setattr(config, name, value)  # after its own checks, which refuse some of these too
    with pytest.raises(ValueError, match=message):
        strop_trainer("no such model", len, config)


def served_trainer(**changes) -> SimpleNamespace:
    plugin = SimpleNamespace(zero_stage=changes.pop("zero_stage", 2))
    served = {
        "accelerator": SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)), "is_deepspeed_enabled": False,
        "is_fsdp_enabled": False, "_is_vlm": False, "aux_loss_enabled": False, "router_aux_loss_coef": 0.001,
        "processing_class": object(),
    }  # fmt: skip
    return SimpleNamespace(**served | changes)


def test_unserved_models_and_layouts_are_refused():
    refuse_unserved(served_trainer())
    refuse_unserved(served_trainer(is_deepspeed_enabled=True))
    for changes, message in (
        ({"_is_vlm": True}, r"images.*pass a tokenizer"),
        ({"aux_loss_enabled": True}, r"router_aux_loss_coef=0\.001.*set it to 0"),
        ({"is_fsdp_enabled": True}, r"FSDP.*data parallelism"),
        ({"is_deepspeed_enabled": True, "zero_stage": 3}, r"ZeRO-3.*stage 1 or 2"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse_unserved(served_trainer(**changes))


def test_scoring_refuses_images_and_router_losses(strop_trainer, tmp_path):
    config = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = bare_trainer(strop_trainer, config, Scorer(torch.zeros(1, 2, 3)))
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"text only, got pixel_values"):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, ids + 1, 1, pixel_values=torch.zeros(1))
    with pytest.raises(ValueError, match=r"set router_aux_loss_coef to 0"):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, ids + 1, 1, compute_aux_loss=True)


def test_logit_transform_refuses_what_one_division_cannot_say():
    with pytest.raises(ValueError, match=r"logit_scale 0\.5 with final_logit_softcapping 30\.0.*TRL's own GRPOTrainer"):
        logit_transform(SimpleNamespace(final_logit_softcapping=30.0, logit_scale=0.5), 1.0)
    with pytest.raises(ValueError, match=r"output_multiplier 0\.0"):
        logit_transform(SimpleNamespace(output_multiplier=0.0), 1.0)
    assert logit_transform(SimpleNamespace(logits_scaling=4.0, model_type="hyperclovax"), 2.0) == (0.5, None)
