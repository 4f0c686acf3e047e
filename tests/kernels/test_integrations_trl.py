"""strop's GRPOTrainer against TRL's own: whole training steps of a tiny Llama, log-probs of several model families.

The steps run twice from the same seed, so both trainers generate the same completions; then everything TRL logs (but times)
and every parameter's change must agree. test_integrations_trl_options.py has the loss under every option.
"""

import inspect
import itertools
import subprocess
import sys

import pytest
import torch

from strop.kernels import LogprobResult

trl = pytest.importorskip("trl", reason="needs trl (pip install strop[test])")

STEPS = {  # name: GRPOConfig
    "dapo, the default": {},
    "dapo, accumulated": {"gradient_accumulation_steps": 2, "max_steps": 2},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo", "temperature": 0.7},
    "kl, second update on the same samples": {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "max_steps": 2},
    "entropy bonus": {"entropy_coef": 0.01, "num_iterations": 2, "max_steps": 2},
    "sequence level, clipped": {"importance_sampling_level": "sequence", "epsilon": 0.01, "num_iterations": 2, "max_steps": 2},
    "fp32 LM head, no checkpointing": {"cast_lm_head_to_fp32": True, "gradient_checkpointing": False},
    "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-3},
}
TIME = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


@pytest.fixture(scope="module")
def strop_trainer():
    from strop.kernels.integrations.trl import GRPOTrainer

    return GRPOTrainer


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{index}" for index in range(14))]
    tokens = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A tiny Llama with a tied LM head on disk, from where TRL loads the reference model too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = str(tmp_path_factory.mktemp("llama"))
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.2,
    )).save_pretrained(folder)  # fmt: skip
    return folder


def some_words(completions: list[str], **columns) -> list[float]:
    return [float(sum(map(len, completion.split())) % 7) for completion in completions]


def build(trainer_class, folder: str, tokenizer, output: str, adapters=None, **settings):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    config = trl.GRPOConfig(**({
        "output_dir": output, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12,
        "max_steps": 1, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant",
    } | settings))  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [f"w{first} w{second}" for first, second in itertools.pairwise(range(10))]})
    model = AutoModelForCausalLM.from_pretrained(folder)
    return trainer_class(
        model, some_words, config, train_dataset=prompts, processing_class=tokenizer, peft_config=adapters
    )


@pytest.mark.parametrize("case", STEPS)
def test_training_steps_equal_trls(strop_trainer, llama_folder, tokenizer, tmp_path, case):
    trainers = []
    for trainer_class in (trl.GRPOTrainer, strop_trainer):
        trainer = build(trainer_class, llama_folder, tokenizer, str(tmp_path), **STEPS[case])
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        trainers.append(trainer)
    trls, ours = trainers

    assert len(trls.state.log_history) == len(ours.state.log_history) == trls.args.max_steps + 1
    for expected, got in zip(trls.state.log_history, ours.state.log_history, strict=True):
        assert set(got) == set(expected)
        for name in set(expected) - TIME:
            # loss and kl at ratio 1 are sums that cancel: their scale is that of the advantages and log-probs, 1
            assert got[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    assert "entropy" in trls.state.log_history[0]
    shortest = trls.state.log_history[0]["completions/min_length"]
    assert shortest < trls.state.log_history[0]["completions/max_length"], "all completions are equally long: no padding"
    for (name, expected), got in zip(trls.model.named_parameters(), ours.model.parameters(), strict=True):
        change = (expected - before[name]).norm()
        difference = (got - expected).norm()
        print(f"{name}: changed by {change:.1e}, difference {difference / expected.norm():.1e} of its norm")
        assert change > 0
        assert difference <= 1e-5 * expected.norm()
        assert difference <= 1e-4 * change  # fp32: a change of 1e-3 of the weight is known to 1e-4
    head, embedding = ours.model.get_output_embeddings().weight, ours.model.get_input_embeddings().weight
    assert head is embedding


def test_lora_steps_equal_trls(strop_trainer, llama_folder, tokenizer, tmp_path):
    """The reference is the base model: the adapters are switched off for it."""
    peft = pytest.importorskip("peft", reason="needs peft (pip install strop[test])")
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    settings = {"beta": 0.1, "num_iterations": 2, "max_steps": 2, "learning_rate": 0.5}
    trainers = []
    for trainer_class in (trl.GRPOTrainer, strop_trainer):
        trainers.append(build(trainer_class, llama_folder, tokenizer, str(tmp_path), adapters, **settings))
        trainers[-1].train()
    trls, ours = trainers
    for expected, got in zip(trls.state.log_history[:2], ours.state.log_history[:2], strict=True):
        assert expected["kl"] > 0.01
        for name in ("loss", "kl", "entropy", "grad_norm"):
            assert got[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    for expected, got in zip(trls.model.parameters(), ours.model.parameters(), strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_a_bf16_step_equals_trls_to_bf16(strop_trainer, llama_folder, tokenizer, tmp_path):
    """GRPOConfig's default precision. TRL rounds the logits to bf16 before their softmax, strop's products end in fp32.

    One update: in a second one, a token whose ratio lies at a clip bound may fall on either side of it.
    """
    logs, ends = [], []
    for trainer_class in (trl.GRPOTrainer, strop_trainer):
        trainer = build(trainer_class, llama_folder, tokenizer, str(tmp_path), bf16=True, beta=0.1)
        start = torch.cat([parameter.detach().flatten().clone() for parameter in trainer.model.parameters()])
        trainer.train()
        ends.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
        logs.append(trainer.state.log_history[0])
    difference = (ends[1] - ends[0]).norm() / (ends[0] - start).norm()
    print(f"changes differ by {difference:.1e}")
    assert difference <= 2**-6  # logits up to 4 are known to 2^-7
    assert logs[1]["entropy"] == pytest.approx(logs[0]["entropy"], rel=2**-7)
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], abs=2**-7)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_two_data_parallel_processes_equal_trls(strop_trainer, llama_folder, tokenizer, tmp_path, run_ranks, loss_type):
    """Under DDP, whose hooks hang on the model's forward: each rank ends with the parameters that TRL's trainer ends with."""

    def train_both() -> tuple[float, float, float]:
        settings = {"loss_type": loss_type, "beta": 0.1, "num_iterations": 2, "max_steps": 2, "ddp_backend": "gloo"}
        ends, logs = [], []
        for trainer_class in (trl.GRPOTrainer, strop_trainer):
            trainer = build(trainer_class, llama_folder, tokenizer, str(tmp_path), **settings)
            assert trainer.accelerator.num_processes == 2
            start = torch.cat([parameter.detach().flatten().clone() for parameter in trainer.model.parameters()])
            trainer.train()
            ends.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
            logs.append(trainer.state.log_history[1])
        for name in ("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_max", "loss"):
            assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5, abs=1e-6), name
        return ((ends[1] - ends[0]).norm() / (ends[0] - start).norm()).item(), ends[1].double().sum().item(), logs[1]["entropy"]

    (difference, checksum, entropy), (other_difference, other_checksum, other_entropy) = run_ranks(2, train_both)
    assert max(difference, other_difference) <= 1e-4
    assert checksum == other_checksum and entropy == other_entropy, "the ranks have drifted apart"


def test_evaluation_and_generation_still_work(strop_trainer, llama_folder, tokenizer, tmp_path):
    from datasets import Dataset

    results = []
    for trainer_class in (trl.GRPOTrainer, strop_trainer):
        trainer = build(trainer_class, llama_folder, tokenizer, str(tmp_path), per_device_eval_batch_size=4, beta=0.1)
        results.append(trainer.evaluate(Dataset.from_dict({"prompt": ["w1 w2", "w3"]})))
    assert set(results[0]) == set(results[1])
    for name, value in results[0].items():
        if not name.startswith("eval_") or any(part in name for part in ("runtime", "per_second")):
            continue
        assert results[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    model = trainer.model
    assert "input_ids" in inspect.signature(model.forward).parameters
    ids = torch.tensor([[3, 4, 5]])
    assert model(input_ids=ids).logits.shape == (1, 3, 16)
    assert type(model).forward is not model.forward.__func__, "the class's own forward must stay as it is"


def test_the_readmes_snippet_trains(strop_trainer, llama_folder, tokenizer, tmp_path, readme_examples):
    usual = build(strop_trainer, llama_folder, tokenizer, str(tmp_path))
    given = {"model": usual.model, "reward": some_words, "config": usual.args, "dataset": usual.train_dataset}
    exec(readme_examples[1], names := given | {"tokenizer": tokenizer})
    assert names["trainer"].state.global_step == 1


FAMILIES = {  # name: (config class, what changes the logits)
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 5.0, "head_dim": 8}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "qwen3 in bf16": ("Qwen3Config", {"head_dim": 8, "dtype": torch.bfloat16}),
    "phi (a bias)": ("PhiConfig", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_model_families_equal_trls(strop_trainer, family):
    import transformers
    from trl.trainer.utils import add_fused_lm_head

    from strop.kernels.integrations.trl import score_completions

    name, settings = FAMILIES[family]
    settings = dict(settings)
    dtype = settings.pop("dtype", torch.float32)
    config = getattr(transformers, name)(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=0, initializer_range=0.5, **settings,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    ids = torch.randint(1, 40, (3, 9))
    attention = torch.ones_like(ids)
    attention[0, :2] = attention[1, -1] = 0
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :-4] = -100
    upstream = torch.randn(2, 3, 4)
    results = []
    for add, temperature in ((add_fused_lm_head, 0.8), (score_completions, 0.8)):
        if add is add_fused_lm_head:
            add(model, temperature, outputs=("log_probs", "entropy"))
            scored = model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
            pair = scored.log_probs[:, -4:], scored.entropy[:, -4:]
        else:
            add(model, temperature, cast_lm_head_to_fp32=False)
            scored = model(input_ids=ids, attention_mask=attention, completion_targets=labels[:, -4:])
            assert isinstance(scored, LogprobResult)
            pair = scored.logprob, scored.entropy
        model.zero_grad()
        (pair[0] * upstream[0] + pair[1] * upstream[1]).sum().backward()
        results.append((*pair, *(p.grad.float().clone() for p in model.parameters() if p.grad is not None)))
    assert results[0][0].std() > 0.5
    for expected, got in zip(*results, strict=True):
        # bf16: TRL rounds the logits to bf16 (8 bits: 2^-8 of logits around 5), strop multiplies with fp32 results
        bound = 1e-5 if dtype == torch.float32 else 3e-2
        assert (got - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("fp32_head, bound", [(False, 3e-2), (True, 1e-5)])
def test_mixed_precision_rounds_the_head_as_autocast_does(strop_trainer, llama_folder, fp32_head, bound):
    """fp32 parameters under bf16 autocast: a bf16 product with fp32 results, or all of it in fp32 for cast_lm_head_to_fp32."""
    from transformers import AutoModelForCausalLM

    from strop.kernels.integrations.trl import score_completions

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    score_completions(model, temperature=1.0, cast_lm_head_to_fp32=fp32_head)
    ids = torch.randint(2, 16, (4, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored = model(input_ids=ids, completion_targets=ids[:, -5:])
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, -6:-1]
    logits = hidden.float() @ model.lm_head.weight.T
    expected = logits.log_softmax(-1).gather(-1, ids[:, -5:, None]).squeeze(-1)
    assert scored.logprob.dtype == torch.float32
    difference = (scored.logprob - expected).norm() / expected.norm()
    print(f"differs from fp32 by {difference:.1e}")
    assert difference <= bound
    assert fp32_head or difference > 1e-5  # else nothing was rounded
    scored.logprob.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_missing_or_other_trl_says_what_to_install(monkeypatch, strop_trainer):
    code = ("import sys; sys.modules['trl'] = None\nimport strop.kernels.integrations.trl_options\n"
            "try: import strop.kernels.integrations.trl\nexcept ModuleNotFoundError as e: print(e)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'trl==1.16.*'" in done.stdout
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    monkeypatch.delitem(sys.modules, "strop.kernels.integrations.trl")
    with pytest.raises(ImportError, match=r"needs TRL 1\.16.*1\.17\.0 is installed"):
        import strop.kernels.integrations.trl  # noqa: F401


def test_trls_classes_are_untouched(strop_trainer):
    assert trl.GRPOTrainer._compute_loss.__module__ == trl.GRPOTrainer.__module__ == "trl.trainer.grpo_trainer"
    assert set(vars(strop_trainer)) & set(vars(trl.GRPOTrainer)) >= {"_compute_loss", "_get_per_token_logps_and_entropies"}
