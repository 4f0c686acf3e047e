"""The rollout engine on a GPU: weights in place, log-probs of a trainer forward, the same samples under any schedule."""

import pytest
import torch
from transformers import AutoTokenizer

from strop.engine.batch import Prompt
from strop.engine.model.checkpoint import load_hf_folder
from strop.engine.model.context import ForwardContext
from strop.engine.model.sources import make_tiny
from strop.engine.model.weights import ModelWeights
from strop.engine.protocols import Sampling
from strop.engine.rollout.engine import EngineConfig, InProcessEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [Prompt(id=f"p{i}", source="test", text=f"question {i}: " + "how many? " * (i % 4)) for i in range(8)]


@pytest.fixture
def start(tmp_path):
    """start(dtype, **settings) -> (engine on the GPU, the trainer's log-probs of a sequence)."""
    make_tiny(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def start(dtype, **settings):
        model = load_hf_folder(tmp_path, dtype, "cuda")

        @torch.no_grad()
        def logprobs(tokens):
            hidden = model(tokens, ForwardContext.one_sequence(len(tokens), "cuda"))
            logits = torch.nn.functional.linear(hidden[:-1], model.lm_head_weight).float()
            return logits.log_softmax(1).gather(1, tokens[1:, None]).squeeze(1)

        def encode(prompt):
            return tokenizer.encode(prompt.text, add_special_tokens=False)

        engine = InProcessEngine(model.config, tokenizer, encode, EngineConfig(**settings), "cuda", dtype, logprobs)
        engine.bind_weights(ModelWeights(model))
        engine.sync_weights(0)
        return engine, logprobs

    return start


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
def test_rollout_logprobs_equal_a_trainer_forward(start, dtype, limit):
    engine, logprobs = start(dtype)
    for group in engine.generate(PROMPTS, Sampling(n=4, max_new_tokens=40, temperature=0.8, top_k=50, seed=1)):
        for sample in group.samples:
            whole = torch.cat([group.prompt_tokens, sample.tokens]).cuda()
            expected = logprobs(whole)[len(group.prompt_tokens) - 1 :].cpu()
            assert (sample.spans[0].raw_logprobs - expected).abs().max() < limit
            assert not sample.tokens.is_cuda and not sample.spans[0].keep_mask.is_cuda


def test_samples_do_not_depend_on_the_schedule(start):
    """Few rows, chunked prompts, preemption: fp32 logits move by 1e-6, so equal tokens are all but certain."""
    sampling, ids = Sampling(n=3, max_new_tokens=24, seed=11), range(0, 24, 3)
    roomy, _ = start(torch.float32)
    tight, _ = start(torch.float32, max_batch=5, block_size=4, fill_tokens=9, kv_cache_gib=40 * 4 * 5 * 2 * 24 * 2 * 4 / 2**30)
    expected, got = roomy.generate(PROMPTS, sampling, ids), tight.generate(PROMPTS, sampling, ids)
    assert [[s.tokens.tolist() for s in group.samples] for group in got] == [
        [s.tokens.tolist() for s in group.samples] for group in expected
    ]


def test_sleep_gives_memory_back(start):
    engine, _ = start(torch.float32)
    sampling = Sampling(max_new_tokens=4, temperature=0)
    before = [group.samples[0].text for group in engine.generate(PROMPTS, sampling)]
    in_use = torch.cuda.memory_allocated()
    engine.sleep("kv_cache")
    assert in_use - torch.cuda.memory_allocated() > 2 * 5 * 64 * 1024 * 2 * 24 * 4 * 0.9  # 64 contexts of 1024 positions
    engine.wake("kv_cache")
    assert [group.samples[0].text for group in engine.generate(PROMPTS, sampling)] == before
