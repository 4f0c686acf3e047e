"""What ends a response besides its length: end tokens, and stop strings in the text as it grows."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..model.config import ModelConfig

_UNFINISHED = "�"
"""What a decoder gives for the first bytes of a character whose last bytes are still to come."""
_ANSWER = "<answer-text>"


def end_token_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a response: the model's and the tokenizer's end of text, those of generation_config.json in the
    tokenizer's folder, and the special token that the chat template puts after an assistant's turn."""
    ids = {*config.eos_ids, tokenizer.eos_token_id}
    if (Path(tokenizer.name_or_path) / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
        ids |= set(listed) if isinstance(listed, list) else {listed}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        after_answer = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_ANSWER)[2]
        first = tokenizer.encode(after_answer, add_special_tokens=False)[:1]
        ids |= set(first) & set(tokenizer.all_special_ids)
    return frozenset(ids - {None})


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text without special tokens, spaces untouched."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Decodes one response token by token and looks for stop strings, also across token borders.

    Only the tokens since the last character border but one are decoded again, so the cost of a token doesn't grow with the
    response; the window starts one border early because some tokenizers treat the first token of a text differently.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._longest = max(map(len, stop))
        self._window: list[int] = []
        self._num_decoded = 0
        self._text = ""

    def find(self, token: int) -> str | None:
        """Append a token. The text before the earliest stop string if there is one now, else None."""
        self._window.append(token)
        before = decode(self._tokenizer, self._window[: self._num_decoded])
        new_text = decode(self._tokenizer, self._window)[len(before) :]
        searched_from = max(0, len(self._text) - self._longest + 1)
        text = self._text + new_text.rstrip(_UNFINISHED)
        ends = [place for stop in self._stop if (place := text.find(stop, searched_from)) >= 0]
        if not new_text.endswith(_UNFINISHED):
            self._text = text
            self._window = self._window[self._num_decoded :]
            self._num_decoded = len(self._window)
        return text[: min(ends)] if ends else None
