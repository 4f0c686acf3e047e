"""What ends a response: end tokens, stop ids, stop strings in text that grows token by token."""

import json
import random

import pytest

from strop.engine.batch import Prompt
from strop.engine.protocols import Sampling
from strop.engine.rollout.stopping import StopStrings, decode, end_token_ids


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Byte-level BPE without merges: every byte a token, so most characters span several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def found(tokenizer, text_or_tokens, stop):
    """(index of the token at which a stop string was found, text before it), or None."""
    tokens = tokenizer.encode(text_or_tokens) if isinstance(text_or_tokens, str) else text_or_tokens
    search = StopStrings(tokenizer, stop)
    for index, token in enumerate(tokens):
        if (text := search.find(token)) is not None:
            return index, text
    return None


def test_stop_strings_across_tokens(byte_tokenizer):
    assert found(byte_tokenizer, "one\n\ntwo", ("\n\n",)) == (4, "one")
    assert found(byte_tokenizer, "aab", ("ab",)) == (2, "a")
    assert found(byte_tokenizer, "the end", ("END", "end", "nd")) == (6, "the ")
    assert found(byte_tokenizer, "nothing here", ("xyz",)) is None


def test_stop_strings_with_characters_of_several_bytes(byte_tokenizer):
    text = "α→🙂。done"
    assert found(byte_tokenizer, text, ("🙂",)) == (8, "α→")
    assert found(byte_tokenizer, text, ("。d",)) == (12, "α→🙂")
    # Found at once although the next character is half there, and not kept waiting by bytes that are no text at all.
    assert found(byte_tokenizer, byte_tokenizer.encode("ab") + byte_tokenizer.encode("é")[:1], ("ab",)) == (1, "")
    broken = [byte_tokenizer.encode("é")[1]] * 3
    index, before = found(byte_tokenizer, [*broken, *byte_tokenizer.encode("ab")], ("b",))
    assert index == 4 and before.endswith("a")


def test_found_where_a_search_in_the_whole_text_finds_it(byte_tokenizer):
    """Random strings over a small alphabet with characters of 1 to 4 bytes: first token at which the full text has one."""
    choose = random.Random(5)
    for _ in range(200):
        text = "".join(choose.choice("abé→🙂 ") for _ in range(12))
        stop = tuple("".join(choose.choice("abé→🙂 ") for _ in range(choose.randint(1, 3))) for _ in range(2))
        tokens, expected = byte_tokenizer.encode(text), None
        for index in range(len(tokens)):
            so_far = decode(byte_tokenizer, tokens[: index + 1]).rstrip("�")
            places = [so_far.find(s) for s in stop if s in so_far]
            if places:
                expected = (index, so_far[: min(places)])
                break
        assert found(byte_tokenizer, text, stop) == expected, (text, stop)


def test_end_tokens_are_the_model_s_the_tokenizer_s_and_the_chat_template_s(lab, tmp_path):
    eos = lab.tokenizer.eos_token_id
    assert end_token_ids(lab.model.config, lab.tokenizer) == {eos}
    # Another end of turn in the template, as in instruction-tuned models that keep the base model's end of text.
    lab.tokenizer.chat_template = lab.tokenizer.chat_template.replace("'<eos>'", "'<unk>\\n'")
    assert end_token_ids(lab.model.config, lab.tokenizer) == {eos, lab.tokenizer.unk_token_id}
    lab.tokenizer.chat_template = lab.tokenizer.chat_template.replace("'<unk>\\n'", "'\\n'")  # plain text ends nothing
    assert end_token_ids(lab.model.config, lab.tokenizer) == {eos}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 77]}))
    lab.tokenizer.name_or_path = str(tmp_path)
    assert end_token_ids(lab.model.config, lab.tokenizer) == {eos, 77}


def test_reasons_and_texts(sharp_lab):
    """End token, stop id and stop string end a response: kept in the tokens, cut from the text."""
    engine = sharp_lab.engine()
    prompt = Prompt(id="p0", source="t", text="say something")
    free = engine.generate([prompt], Sampling(n=8, max_new_tokens=80, seed=3))[0].samples
    for sample in free:
        tokens, eos = sample.tokens.tolist(), sharp_lab.tokenizer.eos_token_id
        assert eos not in tokens[:-1] and (sample.finish_reason == "stop") == (tokens[-1] == eos)
        assert sample.text == decode(sharp_lab.tokenizer, tokens) and (len(tokens) == 80 or tokens[-1] == eos)
    longest = max(free, key=lambda sample: len(sample.text))
    middle = len(longest.text) // 2
    stop = longest.text[middle : middle + 3]
    place = longest.text.find(stop)
    stopping = Sampling(n=8, max_new_tokens=80, seed=3, stop=(stop, "~~~~"))
    again = engine.generate([prompt], stopping, [0])[0].samples[longest.id]
    assert (again.text, again.finish_reason) == (longest.text[:place], "stop")
    assert again.tokens.tolist() == longest.tokens.tolist()[: len(again)]
    assert decode(sharp_lab.tokenizer, again.tokens.tolist()).endswith(stop)
    stop_id = longest.tokens[middle].item()
    first = longest.tokens.tolist().index(stop_id)
    stopping = Sampling(n=8, max_new_tokens=80, seed=3, stop_ids=(stop_id,))
    cut = engine.generate([prompt], stopping, [0])[0].samples[longest.id]
    assert cut.finish_reason == "stop" and cut.tokens.tolist() == longest.tokens.tolist()[: first + 1]
    assert cut.text == decode(sharp_lab.tokenizer, cut.tokens.tolist()[:-1])
