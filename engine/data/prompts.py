"""Prompts with verified answers: deduplicated, split, and streamed in an order that a resume can repeat."""

import hashlib
import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..batch import Message, Prompt
from ..config import InputError
from ..reward.answers import equivalent
from .questions import Question, questions
from .templates import Template


@dataclass(frozen=True)
class DataConfig:
    """Where the questions come from."""

    path: tuple[str, ...] = ("reasoning-gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1",)
    """JSONL files (`questions` documents a line's fields), and reasoning-gym families with their own options, written
    reasoning-gym:NAME[,option=value...]."""
    size: int = 1000
    """Distinct questions to draw from each reasoning-gym family (all of them, where it has fewer). Files are read whole."""
    held_out_fraction: float = 0.25
    """Share of the distinct questions that training never sees, rounded to a whole number: those with the lowest hash, so the
    choice depends on the questions alone, not on the seed or their order. 0 trains on all."""
    template: Template = "chat"
    """chat: the tokenizer's chat template; r1-zero: Table 1 of the R1 paper; plain: the question as it stands."""
    system: str = ""
    """System message before each question (chat template only)."""
    instruction: str = ""
    """Sentence to append to each question, e.g. how to write the answer."""

    def __post_init__(self) -> None:
        if not self.path:
            raise InputError("--data.path is empty: name a JSONL file or a family such as reasoning-gym:chain_sum")
        if self.size < 1:
            raise InputError(f"--data.size {self.size}: needs at least 1 question")
        if not 0 <= self.held_out_fraction < 1:
            raise InputError(f"--data.held-out-fraction {self.held_out_fraction}: must lie in [0, 1)")
        if self.system and self.template != "chat":
            raise InputError(f"--data.system has no place in --data.template {self.template}: drop it or take chat")


@dataclass(frozen=True)
class PromptSets:
    """No question is in both, under `question_key`. `held_out` is in an order that depends on the questions alone."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    duplicates: int
    """Lines dropped because an earlier one asks the same question and has the same answer."""

    @property
    def digest(self) -> str:
        """SHA-256 of all questions and answers, in order: a resume needs the very same ones."""
        turns = [prompt.messages or [{"role": "user", "content": prompt.text}] for prompt in self.train + self.held_out]
        answers = [prompt.answer for prompt in self.train + self.held_out]
        content = [[question_key(turn), answer] for turn, answer in zip(turns, answers, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_prompts(config: DataConfig, seed: int) -> PromptSets:
    """All questions, deduplicated and split. Equal on every rank. `seed` decides which questions are drawn from a family.

    Raises InputError naming file, line, value and fix for whatever can't be read or contradicts itself.
    """
    kept: dict[str, Question] = {}
    by_id: dict[tuple[str, str], Question] = {}
    total = 0
    for question in questions(config.path, config.size, seed):
        total += 1
        key = question_key(question.turns)
        earlier = kept.setdefault(key, question)
        if earlier is not question and not _same_answer(earlier, question):
            raise InputError(
                f"{question.where}: answer {question.answer!r}, but {earlier.where} asks the same question and answers "
                f"{earlier.answer!r}: correct or drop one of them"
            )
        if question.id is not None:
            namesake = by_id.setdefault((question.source, question.id), question)
            if question_key(namesake.turns) != key:
                raise InputError(
                    f"{question.where}: id {question.id!r} belongs to another question ({namesake.where}): give each its own"
                )
    by_hash = sorted(kept, key=lambda key: hashlib.sha256(f"held out {key}".encode()).digest())
    held_keys = by_hash[: round(config.held_out_fraction * len(kept))]
    held_out = [_prompt(kept.pop(key), key, config) for key in held_keys]
    train = [_prompt(question, key, config) for key, question in kept.items()]
    if not train or (config.held_out_fraction and not held_out):
        raise InputError(
            f"{len(by_hash)} distinct questions of {', '.join(config.path)} split into {len(train)} to train on and "
            f"{len(held_out)} held out: give more questions or change --data.held-out-fraction {config.held_out_fraction}"
        )
    return PromptSets(tuple(train), tuple(held_out), total - len(by_hash))


def question_key(turns: Sequence[Message]) -> str:
    """What makes two questions the same: SHA-256 of their turns, Unicode-composed (NFC), with runs of space as one."""
    words = [(turn["role"], " ".join(unicodedata.normalize("NFC", turn["content"]).split())) for turn in turns]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


class PromptStream:
    """An endless stream of prompts: each epoch is a permutation keyed by (seed, epoch). `cursor` is all its state.

    The stream is the global one: who trains on which part of what was taken is the caller's business.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        assert prompts, "a stream needs at least one prompt"
        self.cursor = 0
        """Ordinal of the next prompt. Ordinals never repeat; write it back to continue where a run stopped."""
        self._prompts = prompts
        self._seed = seed
        self._epoch, self._order = -1, []

    def take(self, n: int) -> list[tuple[int, Prompt]]:
        """The next n (ordinal, prompt) pairs."""
        taken = [(ordinal, self._at(ordinal)) for ordinal in range(self.cursor, self.cursor + n)]
        self.cursor += n
        return taken

    def _at(self, ordinal: int) -> Prompt:
        epoch, place = divmod(ordinal, len(self._prompts))
        if epoch != self._epoch:
            order = list(range(len(self._prompts)))
            random.Random(f"{self._seed}:{epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._prompts[self._order[place]]


def _same_answer(first: Question, second: Question) -> bool:
    if first.answer is None or second.answer is None:
        return first.answer == second.answer
    return equivalent(first.answer, second.answer) is True


def _prompt(question: Question, key: str, config: DataConfig) -> Prompt:
    turns = question.turns
    if config.instruction:
        last = turns[-1]
        turns = (*turns[:-1], {**last, "content": f"{last['content']}\n{config.instruction}"})
    common = {"id": question.id or key[:16], "source": question.source, "answer": question.answer, "meta": question.meta}
    if config.template == "plain" and len(turns) == 1:
        return Prompt(text=turns[0]["content"], **common)
    if config.system and turns[0]["role"] == "system":
        raise InputError(f"{question.where}: has a system message of its own: drop it, or drop --data.system")
    system: Iterable[Message] = [{"role": "system", "content": config.system}] if config.system else []
    return Prompt(messages=(*system, *turns), **common)
