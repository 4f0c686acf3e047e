"""The R1 paper's evaluation protocol: k samples a question at T 0.6 and top-p 0.95, pass@1 as the mean of their correctness.

Greedy decoding makes long reasoning repeat itself and its score vary between checkpoints (arXiv 2501.12948, section 3), so
it is for short answers. Generating and scoring are callables: nothing here knows an engine or a reward.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..batch import Group, Prompt, Sample
from ..config import InputError
from ..protocols import Sampling
from ..reward.answers import normalized
from .passk import cons_at_k, pass_at_k

Generate = Callable[[Sequence[Prompt], Sampling, Sequence[int]], Sequence[Group]]
"""(prompts, sampling, id of each prompt's first sample) -> groups in the same order: `RolloutEngine.generate`."""
Score = Callable[[Sequence[Group]], Sequence[Group]]
"""Fills the scores; `parts["accuracy"]` is 1 (right), 0 (wrong) or NaN (not judged)."""
Answer = Callable[[Prompt, Sample], str | None]
"""The answer that was scored, for the majority vote."""


@dataclass(frozen=True)
class EvalConfig:
    """How held-out questions are sampled. Samples are keyed by question, so the result doesn't depend on the rank count."""

    samples: int = 1
    """Responses a question (R1: 4 to 64 by the size of the set)."""
    temperature: float = 0.0
    """0 is greedy, for one sample a question; R1's protocol is 0.6."""
    top_p: float = 1.0
    """R1's protocol is 0.95."""
    max_new_tokens: int = 16
    """Token limit of a response."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the model's end tokens: those of the training that it is compared with."""
    pass_at: tuple[int, ...] = ()
    """The k of each pass@k to report besides pass@1, none above `samples`."""
    questions: int = 0
    """Ask only the first so many questions; 0 asks all."""

    def __post_init__(self) -> None:
        self.sampling(seed=0)
        if self.temperature == 0 and (self.samples > 1 or self.top_p < 1):
            raise InputError(
                f"--eval.samples {self.samples} --eval.top-p {self.top_p} with --eval.temperature 0: greedy gives one response "
                "a question: set a temperature (R1: 0.6), or samples 1 and top-p 1"
            )
        if self.questions < 0:
            raise InputError(f"--eval.questions {self.questions}: must be 0 (all) or above")
        for k in self.pass_at:
            if not 1 < k <= self.samples:
                raise InputError(f"--eval.pass-at {k}: must be 2 .. {self.samples}, --eval.samples (pass@1 is always there)")

    def sampling(self, seed: int) -> Sampling:
        """What the rollout engine is asked for."""
        return Sampling(
            n=self.samples, temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens,
            stop=self.stop, seed=seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One question's responses, in the order sampled."""

    ordinal: int
    id: str
    source: str
    answer: str | None
    """The verified one."""
    given: tuple[str | None, ...]
    accuracy: tuple[float, ...]
    """1, 0, or NaN where the scorer gave no number."""
    finished: tuple[bool, ...]
    lengths: tuple[int, ...]
    """Tokens."""
    texts: tuple[str, ...]


def ask(
    generate: Generate,
    score: Score,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    *,
    answer: Answer,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> list[Record]:
    """A record for each of the first `config.questions` prompts; `rank` of `ranks` asks every ranks-th (maybe none)."""
    numbered = list(enumerate(prompts))[: config.questions or None][rank::ranks]
    if not numbered:
        return []
    ids = [ordinal * config.samples for ordinal, _ in numbered]
    groups = score(generate([prompt for _, prompt in numbered], config.sampling(seed), ids))
    return [_record(ordinal, group, answer) for (ordinal, _), group in zip(numbered, groups, strict=True)]


def summarize(records: Sequence[Record], config: EvalConfig) -> dict[str, float]:
    """pass@1 (mean over questions of the mean over their samples) with its standard error, pass@k, cons@samples, mean_length
    (tokens), finished (fraction that ended by themselves), questions, samples, not_judged (samples whose scorer gave no number:
    left out of the accuracies).

    The standard error is that of the mean over questions, s / sqrt(questions): samples of one question aren't independent.
    It is left out below 2 questions, and every accuracy where nothing was judged.
    """
    judged = [[value == 1.0 for value in record.accuracy if not math.isnan(value)] for record in records]
    means = [sum(right) / len(right) for right in judged if right]
    lengths = [length for record in records for length in record.lengths]
    finished = [ended for record in records for ended in record.finished]
    summary = {"questions": len(records), "samples": len(lengths), "not_judged": len(lengths) - sum(map(len, judged))}
    if lengths:
        summary["mean_length"] = sum(lengths) / len(lengths)
        summary["finished"] = sum(finished) / len(finished)
    if not means:
        return summary
    summary["pass@1"] = sum(means) / len(means)
    if len(means) > 1:
        variance = sum((mean - summary["pass@1"]) ** 2 for mean in means) / (len(means) - 1)
        summary["pass@1_se"] = math.sqrt(variance / len(means))
    for k in config.pass_at:
        estimates = [pass_at_k(len(right), sum(right), k) for right in judged if len(right) >= k]
        if estimates:
            summary[f"pass@{k}"] = sum(estimates) / len(estimates)
    if config.samples > 1:
        consensus = [_consensus(record) for record, right in zip(records, judged, strict=True) if right]
        summary[f"cons@{config.samples}"] = sum(consensus) / len(consensus)
    return summary


def _consensus(record: Record) -> float:
    keys = [given and normalized(given) for given in record.given]
    return cons_at_k(keys, [value == 1.0 for value in record.accuracy])


def _record(ordinal: int, group: Group, answer: Answer) -> Record:
    samples = group.samples
    assert len(group.scores) == len(samples), f"question {group.prompt.id} came back unscored"
    return Record(
        ordinal=ordinal,
        id=group.prompt.id,
        source=group.prompt.source,
        answer=group.prompt.answer,
        given=tuple(answer(group.prompt, sample) for sample in samples),
        accuracy=tuple(score.parts["accuracy"] for score in group.scores),
        finished=tuple(sample.finish_reason == "stop" for sample in samples),
        lengths=tuple(len(sample) for sample in samples),
        texts=tuple(sample.text for sample in samples),
    )
