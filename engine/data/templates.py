"""From a question to the tokens the model reads."""

from collections.abc import Sequence
from typing import Literal

from ..batch import Prompt
from ..config import InputError

Template = Literal["chat", "r1-zero", "plain"]
"""chat: the tokenizer's chat template; r1-zero: Table 1 of the R1 paper, for base models; plain: the text as it stands."""

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
    "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and "
    "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)
"""DeepSeek-R1 (arXiv 2501.12948), Table 1, verbatim; {question} stands for the paper's "prompt"."""


def encode(prompt: Prompt, tokenizer, template: Template) -> list[int]:
    """Token ids of `prompt` up to where the response begins, for a transformers tokenizer.

    Raises InputError where the template doesn't fit the prompt or the tokenizer, and where nothing is left to read.
    """
    if template == "chat":
        tokens = _chat(prompt, tokenizer)
    else:
        question = _question(prompt, template)
        text = question if template == "plain" else R1_ZERO.replace("{question}", question)
        tokens = tokenizer(text)["input_ids"]
    if not tokens:
        raise InputError(f"{prompt.source} prompt {prompt.id} is empty under --data.template {template}: drop it, or take chat")
    return list(tokens)


def _chat(prompt: Prompt, tokenizer) -> Sequence[int]:
    if prompt.messages is None:
        raise InputError(f"{prompt.source} prompt {prompt.id} is bare text without chat turns: take --data.template plain")
    if not tokenizer.chat_template:
        raise InputError("this tokenizer has no chat template: take --data.template r1-zero or plain, or a chat model")
    messages = [dict(message) for message in prompt.messages]
    # The template writes the special tokens itself; as text first, because what the tokenising form returns differs by version.
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _question(prompt: Prompt, template: Template) -> str:
    if prompt.text is not None:
        return prompt.text
    if len(prompt.messages) != 1 or prompt.messages[0]["role"] != "user":
        raise InputError(
            f"{prompt.source} prompt {prompt.id} has {len(prompt.messages)} chat turns and --data.template {template} takes "
            "one question: take --data.template chat"
        )
    return prompt.messages[0]["content"]
