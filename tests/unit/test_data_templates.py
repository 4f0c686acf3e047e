"""What the model reads, to the character."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from strop.engine.batch import Prompt
from strop.engine.config import InputError
from strop.engine.data.templates import encode

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}<s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, and a <s> before every text, as Llama's tokenizers add it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate([*alphabet, "<s>"])}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(alphabet))])
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>")
    made.chat_template = CHAT
    return made


def asked(text):
    return Prompt("p1", "mine", messages=({"role": "user", "content": text},))


def read(tokenizer, prompt, template):
    ids = encode(prompt, tokenizer, template)
    assert all(type(token) is int for token in ids)
    return tokenizer.decode(ids)


def test_chat_is_the_tokenizers_template_with_the_assistants_turn_opened(tokenizer):
    prompt = Prompt("p1", "mine", messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 4?"}))
    assert read(tokenizer, prompt, "chat") == "<s>system:Be brief.<s><s>user:3 + 4?<s>assistant:"


def test_r1_zero_is_table_1_of_the_paper(tokenizer):
    text = read(tokenizer, asked("What is {3} + 4?"), "r1-zero")
    assert text == (
        "<s>A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
        "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
        "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
        "reasoning process here </think> <answer> answer here </answer>. User: What is {3} + 4?. Assistant:"
    )


def test_plain_is_the_text_as_it_stands(tokenizer):
    assert read(tokenizer, Prompt("p1", "mine", text="3 + 4 ="), "plain") == "<s>3 + 4 ="
    assert read(tokenizer, asked("3 + 4 ="), "plain") == "<s>3 + 4 ="


def test_what_does_not_fit_is_refused(tokenizer):
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    for template in ("plain", "r1-zero"):
        with pytest.raises(InputError, match=f"p1 has 3 chat turns and --data.template {template} takes one question"):
            encode(Prompt("p1", "mine", messages=turns), tokenizer, template)
    with pytest.raises(InputError, match=r"p1 is bare text.*take --data.template plain"):
        encode(Prompt("p1", "mine", text="a"), tokenizer, "chat")
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(InputError, match=r"no chat template: take --data.template r1-zero or plain"):
        encode(asked("a"), bare, "chat")
    with pytest.raises(InputError, match=r"p1 is empty under --data.template plain"):
        encode(asked(""), bare, "plain")
