"""What a response earns: exact answer and format, each part logged by name, composed for each data source.

The rule of the default run pays 1 for a response whose last number equals the verified answer and that ended by itself,
and nothing for anything less: partial credit is known to fail (the policy locks onto restating the question).
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..batch import Group, Prompt, Sample, Score
from ..config import InputError
from .answers import Extraction, ends_with_number, equivalent, extract, is_plain, parse_number
from .pool import Job, Outcome, WorkerPool

Format = Literal["finished", "number-end", "think-answer"]

THINK_ANSWER = re.compile(r"\s*<think>(?P<think>.+?)</think>\s*<answer>(?P<answer>.+?)</answer>\s*", re.DOTALL)
ITEM_KEYS = {"family", "options", "item"}
"""What a reasoning-gym prompt carries in its meta for the family's own scorer (`verifiers`)."""
TAG = re.compile(r"</?(?:think|answer)>")


@dataclass(frozen=True)
class Rule:
    """How the responses to one data source are judged."""

    extract: Extraction = "last-number"
    """Where the answer is looked for: last-number (anywhere in the text, compared as a number), box (the last \\boxed{}), tag
    (the last <answer>...</answer>, or the last box in it), text (the whole response)."""
    finished: bool = True
    """A right answer counts only in a response that ended by itself (an end token or stop string), not at the token limit."""
    format: Format = "number-end"
    """The form asked for: finished (ended by itself), number-end (and its last thing is a number), think-answer (and it is
    <think>...</think> <answer>...</answer>, as R1-Zero's template asks)."""
    accuracy_weight: float = 1.0
    """What a right answer adds to the reward."""
    format_weight: float = 0.0
    """What the form adds to the reward (R1-Zero: accuracy and format are summed, arXiv 2501.12948 section 2.2.2)."""

    def __post_init__(self) -> None:
        for name in ("accuracy_weight", "format_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--reward.rule.{name.replace('_', '-')} {getattr(self, name)}: must be 0 or above")
        if self.accuracy_weight == self.format_weight == 0:
            raise InputError("--reward.rule.accuracy-weight and --reward.rule.format-weight are both 0: nothing would be paid")


@dataclass(frozen=True)
class RewardConfig:
    """The reward of a run."""

    kind: Literal["exact", "format"] = "exact"
    """exact: the rule's weighted sum. format: 1 for the rule's form, right answer or not (a control: what brevity earns)."""
    shuffle: bool = False
    """Permute the true rewards over the samples of the step on each rank, by (seed, step) (a control: no signal is left)."""
    rule: Rule = Rule()
    """For every data source that `sources` doesn't name."""
    sources: Mapping[str, Rule] = field(default_factory=dict)
    """Rules of single data sources, by name; set in a preset."""
    workers: int = 2
    """Worker processes a rank for symbolic equality and reasoning-gym's scorers; started only when one is needed."""
    limit_s: float = 5.0
    """Seconds a worker may take over one answer; then it is killed and the answer earns 0. (`1000000!` would take forever.)"""
    memory_mib: int = 2048
    """Address space of a worker in MiB (measured: 200 with both verifiers loaded)."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.limit_s <= 0:
            raise InputError(f"--reward.workers {self.workers} and --reward.limit-s {self.limit_s}: must be above 0")
        if self.memory_mib < 512:
            raise InputError(f"--reward.memory-mib {self.memory_mib}: the verifiers need 512 to load")


def lenient(config: RewardConfig) -> RewardConfig:
    """The same limits with the most forgiving judgement: the last number anywhere, finished or not. For evaluation."""
    return replace(config, kind="exact", shuffle=False, rule=Rule(finished=False), sources={})


@dataclass(frozen=True)
class _Verdict:
    """Whether an answer is right: 1.0, 0.0, or NaN where the scorer gave no number; `trouble` names the part that counts it."""

    accuracy: float
    why: str
    trouble: Literal["", "timeout", "crash", "error"] = ""


class Rewards:
    """Scores groups. Holds worker processes once an answer needed one, so it must be closed (`with` does).

    seed: of `shuffle`. beat: called after each answer that a worker judged, the only ones that take long.
    """

    def __init__(self, config: RewardConfig, *, seed: int = 0, beat: Callable[[], None] = lambda: None):
        self.config = config
        self._seed = seed
        self._pool = WorkerPool(config.workers, config.limit_s, config.memory_mib, beat=beat)

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def rule(self, prompt: Prompt) -> Rule:
        """The rule that judges the responses to `prompt`."""
        return self.config.sources.get(prompt.source, self.config.rule)

    def answer(self, prompt: Prompt, sample: Sample) -> str | None:
        """The answer that `score` judges; None where the response gives none."""
        return extract(sample.text, self.rule(prompt).extract)

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raise InputError for a verified answer that no response could match under its rule. Meant for load time."""
        symbolic: list[Prompt] = []
        for prompt in prompts:
            is_number = prompt.answer is not None and parse_number(prompt.answer) is not None
            if self.rule(prompt).extract == "last-number" and not is_number:
                raise InputError(
                    f"{_where(prompt)}: answer {prompt.answer!r} is not a number, and --reward.rule.extract last-number "
                    "compares numbers: correct the answer, or take --reward.rule.extract box, tag or text"
                )
            if _has_scorer(prompt) or is_number:
                continue  # a reasoning-gym item comes with its scorer
            if prompt.answer is None:
                raise InputError(f"{_where(prompt)}: there is no answer to compare responses with: add one, or drop the line")
            if not is_plain(prompt.answer):
                symbolic.append(prompt)
        outcomes = self._pool.run([Job("math-reads", {"gold": prompt.answer}) for prompt in symbolic])
        for prompt, outcome in zip(symbolic, outcomes, strict=True):
            if outcome.value != 1.0:
                raise InputError(
                    f"{_where(prompt)}: math-verify can't read the answer {prompt.answer!r} "
                    f"({outcome.detail or 'it finds no expression'}): write it as a number, words or LaTeX, or drop the line"
                )

    def score(self, groups: Sequence[Group], *, step: int = 0) -> list[Group]:
        """The groups with one Score a sample.

        `parts`, each 0 or 1: accuracy (right, under the rule), format, finished, and timeout / crash / error where a worker
        gave no verdict (the answer then counts as wrong). A scorer that returns NaN makes accuracy and value NaN: the
        advantage leaves such a sample out. With `shuffle`, `value` is another sample's while the parts stay the sample's own;
        the permutation is over the groups given (a rank permutes among its own) and depends on (seed, step) alone.
        """
        verdicts = iter(self._judge([(group.prompt, sample) for group in groups for sample in group.samples]))
        scores = []
        for group in groups:
            rule = self.rule(group.prompt)
            scores += [self._compose(rule, sample, next(verdicts)) for sample in group.samples]
        if self.config.shuffle:
            scores = self._shuffled(scores, step)
        remaining = iter(scores)
        return [replace(group, scores=tuple(next(remaining) for _ in group.samples)) for group in groups]

    def _judge(self, responses: Sequence[tuple[Prompt, Sample]]) -> list[_Verdict]:
        """A verdict for each response; answers that need a worker are sent together, equal ones once."""
        verdicts: list[_Verdict | None] = []
        jobs: dict[tuple[str, str], Job] = {}
        keys: list[tuple[str, str] | None] = []
        for prompt, sample in responses:
            answer = self.answer(prompt, sample)
            verdict = self._judge_here(prompt, sample, answer)
            key = None if verdict else (f"{prompt.source}/{prompt.id}", answer)
            if key and key not in jobs:
                jobs[key] = _job(prompt, answer)
            verdicts.append(verdict)
            keys.append(key)
        outcomes = dict(zip(jobs, self._pool.run(list(jobs.values())), strict=True))
        return [verdict or _from_worker(key[1], outcomes[key]) for verdict, key in zip(verdicts, keys, strict=True)]

    def _judge_here(self, prompt: Prompt, sample: Sample, answer: str | None) -> _Verdict | None:
        """The verdict, where it needs no worker."""
        rule = self.rule(prompt)
        if rule.finished and sample.finish_reason != "stop":
            return _Verdict(0.0, f"unfinished ({sample.finish_reason})")
        if answer is None:
            return _Verdict(0.0, f"no answer ({rule.extract})")
        equal = None
        if rule.extract == "last-number":
            equal = prompt.answer is not None and equivalent(answer, prompt.answer) is True
        elif _has_scorer(prompt):
            equal = True if answer == prompt.answer else None
        elif prompt.answer is not None:
            equal = equivalent(answer, prompt.answer)
        if equal is None:
            return None
        return _Verdict(float(equal), f"{_short(answer)} {'is right' if equal else f'is not {_short(prompt.answer)}'}")

    def _compose(self, rule: Rule, sample: Sample, verdict: _Verdict) -> Score:
        well_formed = float(has_format(sample, rule.format))
        if self.config.kind == "format":
            value = well_formed
        else:
            value = rule.format_weight * well_formed
            value += rule.accuracy_weight * verdict.accuracy if rule.accuracy_weight else 0.0  # 0 * NaN is NaN
        parts = {"accuracy": verdict.accuracy, "format": well_formed, "finished": float(sample.finish_reason == "stop")}
        parts |= {trouble: float(verdict.trouble == trouble) for trouble in ("timeout", "crash", "error")}
        return Score(value, parts, verdict.why)

    def _shuffled(self, scores: Sequence[Score], step: int) -> list[Score]:
        payer = list(range(len(scores)))
        random.Random(f"{self._seed}:{step}").shuffle(payer)
        paid = [scores[other].value for other in payer]
        return [
            replace(score, value=value, why=f"{score.why}; shuffled: paid {value:g} for {score.value:g}")
            for score, value in zip(scores, paid, strict=True)
        ]


def has_format(sample: Sample, form: Format) -> bool:
    """Whether a response ended by itself and has the form asked for (see `Rule.format`)."""
    if sample.finish_reason != "stop":
        return False
    if form == "number-end":
        return ends_with_number(sample.text)
    if form == "think-answer":
        match = THINK_ANSWER.fullmatch(sample.text)
        return match is not None and all(part.strip() for part in match.groups()) and len(TAG.findall(sample.text)) == 4
    return True


def _has_scorer(prompt: Prompt) -> bool:
    return prompt.meta.keys() >= ITEM_KEYS


def _job(prompt: Prompt, answer: str) -> Job:
    if _has_scorer(prompt):
        return Job("reasoning-gym", {"answer": answer} | {key: prompt.meta[key] for key in ITEM_KEYS})
    return Job("math", {"answer": answer, "gold": prompt.answer})


def _from_worker(answer: str, outcome: Outcome) -> _Verdict:
    if outcome.status != "ok":
        return _Verdict(0.0, f"{_short(answer)}: {outcome.status}: {outcome.detail}", outcome.status)
    if math.isnan(outcome.value):
        return _Verdict(math.nan, f"{_short(answer)}: the scorer returned no number")
    return _Verdict(outcome.value, f"{_short(answer)} is {'right' if outcome.value else 'wrong'} (by its verifier)")


def _where(prompt: Prompt) -> str:
    return f"{prompt.meta['file']}:{prompt.meta['line']}" if "file" in prompt.meta else f"{prompt.source} question {prompt.id}"


def _short(text: str | None) -> str:
    return repr(text) if text is None or len(text) <= 60 else repr(text[:57] + "...")
