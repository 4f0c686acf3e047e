"""Where questions come from: lines of JSONL files, and reasoning-gym families.

A line is an object with exactly one of `question`, `problem`, `prompt` (a string, or a list of chat turns) and `messages` (a
list of chat turns, each with `role` and `content`); an `answer`, a string or a number (where it contains "####", as in
GSM8K, what follows the last one); and, if it likes, an `id` (or `unique_id`) and a `source`, which names its reward rule
(default: the file's name without .jsonl). Other fields are left alone.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..batch import Message
from ..config import InputError
from .procedural import PREFIX, RefusedRequest, draw

QUESTION_FIELDS = ("question", "problem", "prompt", "messages")
ID_FIELDS = ("id", "unique_id")


@dataclass(frozen=True)
class Question:
    """One question before it becomes a Prompt; `where` is file:line, or the family. `meta` goes to the scorer."""

    where: str
    turns: tuple[Message, ...]
    answer: str | None
    source: str
    id: str | None
    meta: Mapping[str, object]


def questions(paths: Sequence[str], size: int, seed: int) -> Iterator[Question]:
    """All questions of the paths in order; `size` and `seed` are those of a generated family (`procedural.draw`)."""
    for path in paths:
        if path.startswith(PREFIX):
            yield from _generated(path, size, seed)
        else:
            yield from _read(Path(path))


def _generated(path: str, size: int, seed: int) -> Iterator[Question]:
    family, *settings = re.split(r",(?=\w+=)", path.removeprefix(PREFIX))
    options = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = {"True": True, "False": False}.get(value, value)
    try:
        items = draw(family, options, size, seed)
    except RefusedRequest as error:
        raise InputError(f"--data.path {path}: {error}") from error
    for item in items:
        turns = ({"role": "user", "content": item.question},)
        meta = {"family": family, "options": options, "item": item.pickled}
        yield Question(path, turns, item.answer, PREFIX + family, None, meta)


def _read(path: Path) -> Iterator[Question]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(f"--data.path {path}: {error.strerror}: name a JSONL file or reasoning-gym:FAMILY") from error
    empty = True
    for number, line in enumerate(lines, start=1):
        if line.strip():
            empty = False
            yield _question_of(f"{path}:{number}", line, path, number)
    if empty:
        raise InputError(f"{path}: the file is empty: it needs one JSON object a line")


def _question_of(where: str, line: bytes, path: Path, number: int) -> Question:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte {line[error.start]:#04x} at column {error.start + 1}"
        raise InputError(f"{where}: {byte} isn't UTF-8: save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}): {_start(line)!r}: write one object a line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: {_start(line)!r} is not an object: write {{'question': ..., 'answer': ...}}")
    identity = next((str(row[name]) for name in ID_FIELDS if row.get(name) is not None), None)
    return Question(
        where, _turns(where, row), _answer(where, row), str(row.get("source") or path.stem), identity,
        {"file": str(path), "line": number},
    )  # fmt: skip


def _turns(where: str, row: Mapping[str, object]) -> tuple[Message, ...]:
    present = [name for name in QUESTION_FIELDS if row.get(name) is not None]
    if len(present) != 1:
        found = f"has {' and '.join(present)}" if present else f"has no question (its fields: {', '.join(row) or 'none'})"
        raise InputError(f"{where}: {found}: give exactly one of {', '.join(QUESTION_FIELDS)}")
    name, value = present[0], row[present[0]]
    turns = [{"role": "user", "content": value}] if isinstance(value, str) and name != "messages" else value
    if not isinstance(turns, list) or not turns or not all(_is_turn(turn) for turn in turns):
        raise InputError(f"{where}: {name} {str(value)[:60]!r} is no list of objects with the strings 'role' and 'content'")
    if turns[-1]["role"] != "user":
        raise InputError(f"{where}: {name} ends with a turn of {turns[-1]['role']!r}: the last one must be the user's question")
    if not turns[-1]["content"].strip():
        raise InputError(f"{where}: {name} is empty: write the question or drop the line")
    if any("\ud800" <= character <= "\udfff" for turn in turns for character in turn["content"]):
        raise InputError(f"{where}: {name} holds half of a surrogate pair: write the character whole")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _answer(where: str, row: Mapping[str, object]) -> str:
    value = row.get("answer")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        problem = "no answer" if value is None else f"answer {str(value)[:60]!r} is neither a string nor a number"
        raise InputError(f"{where}: {problem}: give the verified answer in the field 'answer'")
    answer = str(value).rpartition("####")[2].strip()
    if not answer:
        raise InputError(f"{where}: the answer is empty: write it in the field 'answer' or drop the line")
    return answer


def _start(line: bytes) -> str:
    return line[:60].decode(errors="replace")
