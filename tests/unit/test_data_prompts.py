"""Files and families read, deduplicated, split and streamed; every mistake in a file named by line, value and fix."""

import json
from collections import Counter

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.engine.batch import Prompt
from strop.engine.config import InputError
from strop.engine.data.procedural import draw
from strop.engine.data.prompts import DataConfig, PromptStream, load_prompts, question_key

ONE_DIGIT = "reasoning-gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1"


def write(folder, *rows, name="mine.jsonl"):
    path = folder / name
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return str(path)


def load(path, seed=0, **settings):
    return load_prompts(DataConfig(path=(path,), **{"held_out_fraction": 0.0} | settings), seed)


def content(prompt):
    return prompt.text or prompt.messages[-1]["content"]


def test_the_fields_a_line_may_have(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 * 3?"}]
    path = write(
        tmp_path,
        b'\xef\xbb\xbf{"question": "1 + 1?", "answer": 2}',
        {"problem": "1/2 + 1/4?", "answer": "\\frac{3}{4}", "unique_id": "a/1.json", "level": 2, "solution": "..."},
        b"",
        {"prompt": "2 + 2?", "answer": "2 + 2 is\n#### 4", "source": "school"},
        b'{"messages": %s, "answer": 9.0, "id": 12}\r' % json.dumps(turns).encode(),
        {"prompt": [{"role": "user", "content": "5?"}], "answer": "5"},
    )
    train = load(path).train
    assert [prompt.answer for prompt in train] == ["2", "\\frac{3}{4}", "4", "9.0", "5"]
    assert [prompt.source for prompt in train] == ["mine", "mine", "school", "mine", "mine"]
    assert [content(prompt) for prompt in train] == ["1 + 1?", "1/2 + 1/4?", "2 + 2?", "3 * 3?", "5?"]
    assert [prompt.id for prompt in train][1::2] == ["a/1.json", "12"]
    assert train[3].messages == tuple(turns)
    assert train[2].meta == {"file": path, "line": 4}
    assert len({prompt.id for prompt in train}) == 5


def test_what_surrounds_a_question(tmp_path):
    path = write(tmp_path, {"question": "1 + 1?", "answer": 2})
    chat = load(path, system="Be brief.", instruction="Box it.").train[0]
    assert chat.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?\nBox it."})
    with pytest.raises(InputError, match=r"own.jsonl:1: has a system message of its own: .*--data.system"):
        load(write(tmp_path, {"messages": list(chat.messages), "answer": 2}, name="own.jsonl"), system="Be brief.")
    plain = load(path, template="plain").train[0]
    assert (plain.text, plain.messages) == ("1 + 1?", None)
    assert plain.id == chat.id, "an id follows from the question alone"


GOOD = {"question": "1 + 1?", "answer": 2}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (b'{"question": "x", ', r":37: not JSON .*'\{\"question\": \"x\", '.*one object a line"),
        (b"[1, 2]", r":37: '\[1, 2\]' is not an object"),
        (b'{"question": "caf\xe9", "answer": 1}', r":37: byte 0xe9 at column 18 isn't UTF-8"),
        (b'{"question": "\\ud800", "answer": 1}', r":37: question holds half of a surrogate pair"),
        ({"question": " \n", "answer": 1}, r":37: question is empty"),
        ({"messages": [], "answer": 1}, r":37: messages '\[\]' is no list of objects"),
        ({"messages": [{"role": "user"}], "answer": 1}, r":37: messages .* is no list of objects with the strings"),
        ({"messages": [{"role": "assistant", "content": "a"}], "answer": 1}, r":37: messages ends with a turn of 'assistant'"),
        ({"prompt": 5, "answer": 1}, r":37: prompt '5' is no list"),
        ({"text": "1 + 1?", "answer": 1}, r":37: has no question \(its fields: text, answer\): give exactly one of question"),
        ({"question": "a", "problem": "b", "answer": 1}, r":37: has question and problem: give exactly one"),
        ({"question": "a"}, r":37: no answer: give the verified answer in the field 'answer'"),
        ({"question": "a", "answer": None}, r":37: no answer"),
        ({"question": "a", "answer": True}, r":37: answer 'True' is neither a string nor a number"),
        ({"question": "a", "answer": ["1"]}, r":37: answer .* is neither"),
        ({"question": "a", "answer": "so it is ####  "}, r":37: the answer is empty"),
        ({"question": "Question  0", "answer": 5}, r":37: answer '5', but .*:1 asks the same question and answers '0'"),
        ({"question": "new", "answer": 5, "id": "q0"}, r":37: id 'q0' belongs to another question \(.*:1\)"),
    ],
)
def test_a_mistake_in_a_file_names_line_value_and_fix(tmp_path, row, complaint):
    rows = [{"question": f"Question {number}", "answer": number, "id": f"q{number}"} for number in range(36)]
    path = write(tmp_path, *rows, row)
    with pytest.raises(InputError, match="mine.jsonl" + complaint):
        load(path)


def test_files_that_are_not_there_or_hold_nothing(tmp_path):
    with pytest.raises(InputError, match=r"no.jsonl: No such file or directory: name a JSONL file or reasoning-gym:FAMILY"):
        load(str(tmp_path / "no.jsonl"))
    with pytest.raises(InputError, match="Is a directory"):
        load(str(tmp_path))
    with pytest.raises(InputError, match=r"mine.jsonl: the file is empty"):
        load(write(tmp_path, b"\n \n"))
    with pytest.raises(InputError, match=r"1 distinct questions .* split into 1 to train on and 0 held out"):
        load(write(tmp_path, GOOD), held_out_fraction=0.1)


def test_the_same_question_twice_is_one_question(tmp_path):
    rows = [{"question": "1/4 +  1/4?", "answer": "0.5"}, GOOD, {"question": "1/4 + 1/4? ", "answer": "1/2"}]
    sets = load(write(tmp_path, *rows, {"question": "cafe\u0301?", "answer": 1}, {"question": "caf\u00e9?", "answer": 1}))
    assert [content(prompt) for prompt in sets.train] == ["1/4 +  1/4?", "1 + 1?", "cafe\u0301?"]
    assert sets.duplicates == 2


def test_held_out_questions_depend_on_the_questions_alone(tmp_path):
    rows = [{"question": f"What is {number} + 1?", "answer": number + 1} for number in range(400)]
    one = load(write(tmp_path, *rows), held_out_fraction=0.25)
    other = load(write(tmp_path, *reversed(rows), rows[3], name="b.jsonl"), seed=7, held_out_fraction=0.25, system="Be brief.")
    assert len(one.held_out) == 100
    assert len(one.train) == 300
    assert [content(prompt) for prompt in one.held_out] == [content(prompt) for prompt in other.held_out]
    assert not {content(prompt) for prompt in one.train} & {content(prompt) for prompt in one.held_out}
    assert abs(sum(int(prompt.answer) for prompt in one.held_out) / 100 - 200) < 40, "drawn from all of the file"
    assert not load(write(tmp_path, *rows)).held_out


@pytest.fixture(scope="module")
def one_digit():
    return load(ONE_DIGIT, seed=1, held_out_fraction=0.25)


def test_a_small_family_is_exhausted_and_split(one_digit):
    questions = {content(prompt).split(": ")[1]: prompt for prompt in one_digit.train + one_digit.held_out}
    pairs = [(a, b) for a in range(10) for b in range(10)]
    expected = {f"{a} + {b} =": str(a + b) for a, b in pairs} | {f"{a} - {b} =": str(a - b) for a, b in pairs}
    assert {question: prompt.answer for question, prompt in questions.items()} == expected
    assert (len(one_digit.train), len(one_digit.held_out)) == (150, 50)
    assert {prompt.source for prompt in one_digit.train} == {"reasoning-gym:chain_sum"}
    keys = [{question_key(prompt.messages) for prompt in prompts} for prompts in (one_digit.train, one_digit.held_out)]
    assert not keys[0] & keys[1]


def test_another_seed_draws_another_order_but_holds_out_the_same(one_digit):
    other = load(ONE_DIGIT, seed=99, held_out_fraction=0.25)
    assert [prompt.id for prompt in other.held_out] == [prompt.id for prompt in one_digit.held_out]
    assert {prompt.id for prompt in other.train} == {prompt.id for prompt in one_digit.train}
    assert [prompt.id for prompt in other.train] != [prompt.id for prompt in one_digit.train]


def test_draws_are_distinct_disjoint_between_seeds_and_blind_to_the_hash_seed(monkeypatch):
    first = draw("ransom_note", {}, 20, seed=1)  # its questions depend on PYTHONHASHSEED
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    assert draw("ransom_note", {}, 20, seed=1) == first
    assert len({item.question for item in first}) == 20
    assert not {item.question for item in first} & {item.question for item in draw("ransom_note", {}, 20, seed=2)}


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("reasoning-gym:chain_sums", r"--data.path .*chain_sums: there is no family 'chain_sums': perhaps chain_sum"),
        ("reasoning-gym:gcd,seed=2", r"gcd has no option 'seed': it takes max_numbers, max_value, min_numbers, min_value"),
        ("reasoning-gym:gcd,min_numbers=9", r"gcd refuses the options \{'min_numbers': 9\}: max_numbers must be >="),
    ],
)
def test_mistakes_in_a_family_name_the_fix(path, complaint):
    with pytest.raises(InputError, match=complaint):
        load(path)


def test_option_values_and_the_command_line():
    path = 'reasoning-gym:basic_arithmetic,operators=["+","-"],min_terms=2,max_terms=2,allow_parentheses=False'
    config = tyro.cli(DataConfig, args=["--path", path, "--size", "30", "--held-out-fraction", "0.5"])
    sets = load_prompts(config, 0)
    assert (len(sets.train), len(sets.held_out)) == (15, 15)
    assert sets.train[0].meta["options"]["operators"] == ["+", "-"]
    assert not any(set("*/()") & set(content(prompt).split("alculate")[-1]) for prompt in sets.train)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"path": ()}, "--data.path is empty"),
        ({"size": 0}, "--data.size 0"),
        ({"held_out_fraction": 1.0}, "--data.held-out-fraction 1.0"),
        ({"system": "Hi", "template": "plain"}, "--data.system has no place in --data.template plain"),
    ],
)
def test_refused_settings(wrong, complaint):
    with pytest.raises(InputError, match=complaint):
        DataConfig(**wrong)


PROMPTS = [Prompt(str(number), "s", text=str(number)) for number in range(7)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10), max_size=12), st.integers(0, 3), st.integers(0, 60))
def test_a_stream_resumes_from_its_cursor_however_it_was_taken(sizes, seed, cursor):
    whole = PromptStream(PROMPTS, seed).take(sum(sizes) + cursor)
    stream = PromptStream(PROMPTS, seed)
    assert [pair for size in sizes for pair in stream.take(size)] == whole[: sum(sizes)]
    assert stream.cursor == sum(sizes)
    resumed = PromptStream(PROMPTS, seed)
    resumed.cursor = cursor
    assert resumed.take(sum(sizes)) == whole[cursor:]


def test_every_epoch_is_another_permutation_and_ordinals_never_repeat():
    taken = PromptStream(PROMPTS, 0).take(70)
    assert [ordinal for ordinal, _ in taken] == list(range(70))
    epochs = [tuple(prompt.id for _, prompt in taken[start : start + 7]) for start in range(0, 70, 7)]
    assert all(Counter(epoch) == Counter("0123456") for epoch in epochs)
    assert len(set(epochs)) > 8
    assert [prompt for _, prompt in PromptStream(PROMPTS, 1).take(7)] != [prompt for _, prompt in taken[:7]]
