"""Estimators against exact counting, and the protocol with made-up responses."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.engine.batch import Group, Prompt, Sample, Score, Span
from strop.engine.config import InputError
from strop.engine.evaluate.benchmark import EvalConfig, ask, summarize
from strop.engine.evaluate.passk import cons_at_k, pass_at_k


@settings(deadline=None)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(case):
    n, c, k = case
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12, abs=0)


def test_pass_at_k_counted_by_hand_and_at_the_edges():
    subsets = list(itertools.combinations([True, True, False, False, False], 2))
    assert pass_at_k(5, 2, 2) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert (pass_at_k(4, 0, 4), pass_at_k(4, 4, 1), pass_at_k(4, 1, 4)) == (0.0, 1.0, 1.0)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-12)
    for n, c, k in ((4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)):
        with pytest.raises(ValueError, match=f"n {n}, c {c}, k {k}"):
            pass_at_k(n, c, k)


def test_majority_vote():
    assert cons_at_k(["5", "7", "7"], [False, True, True]) == 1.0
    assert cons_at_k(["5", "7", "7", "5"], [False, True, True, False]) == 0.0, "the first of equals wins"
    assert cons_at_k([None, None, "7"], [False, False, True]) == 1.0, "no answer, no vote"
    assert cons_at_k([None, None], [False, False]) == 0.0


def engine(texts):
    """generate() that answers prompt i's samples with texts[i], and remembers what it was asked."""
    calls = []

    def generate(prompts, sampling, ids):
        calls.append((sampling, list(ids)))
        groups = []
        for prompt, first in zip(prompts, ids, strict=True):
            samples = []
            for number, text in enumerate(texts[prompt.id]):
                tokens = torch.zeros(len(text), dtype=torch.int64)
                span = Span(tokens, True, 0, tokens.float(), tokens.float(), sampling.temperature)
                samples.append(Sample(first + number, (span,), "length" if text.endswith("~") else "stop", text))
            groups.append(Group(prompt, torch.zeros(1), tuple(samples)))
        return groups

    return generate, calls


def score(groups):
    def one(prompt, sample):
        return Score(5.0, {"accuracy": math.nan if sample.text == "?" else float(sample.text == prompt.answer)})

    return [Group(g.prompt, g.prompt_tokens, g.samples, tuple(one(g.prompt, s) for s in g.samples)) for g in groups]


def answer(prompt, sample):
    return sample.text or None


TEXTS = {"a": ["7", "7", "8", "7.0"], "b": ["1", "2", "2", "12~"], "c": ["9", "9", "9", "9"], "d": ["?", "?", "3", "4"]}
PROMPTS = [Prompt("a", "s", text="", answer="7"), Prompt("b", "s", text="", answer="1"), Prompt("c", "s", text="", answer="9"),
           Prompt("d", "s", text="", answer="3")]  # fmt: skip
CONFIG = EvalConfig(samples=4, temperature=0.6, top_p=0.95, pass_at=(2, 4))


def test_report_of_four_questions_worked_by_hand():
    generate, calls = engine(TEXTS)
    records = ask(generate, score, PROMPTS, CONFIG, answer=answer, seed=3)
    summary = summarize(records, CONFIG)
    means = [0.5, 0.25, 1.0, 0.5]
    mean = sum(means) / 4
    assert summary["pass@1"] == pytest.approx(mean)
    assert summary["pass@1_se"] == pytest.approx(math.sqrt(sum((m - mean) ** 2 for m in means) / 3 / 4))
    assert summary["pass@2"] == pytest.approx((5 / 6 + 1 / 2 + 1 + 1) / 4)  # d: 1 of the 2 judged
    assert summary["pass@4"] == pytest.approx(1.0), "a, b, c; d has two judged samples only"
    assert summary["cons@4"] == pytest.approx((1 + 0 + 1 + 0) / 4)  # a: "7" and "7.0" vote together; d: "?" leads
    assert summary["not_judged"] == 2
    assert summary["finished"] == pytest.approx(15 / 16)
    assert summary["mean_length"] == pytest.approx((3 * 1 + 3 + 3 + 3 + 4 + 4) / 16)
    assert (summary["questions"], summary["samples"]) == (4, 16)
    (sampling, ids), = calls
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.seed, ids) == (4, 0.6, 0.95, 3, [0, 4, 8, 12])
    assert records[1].texts == ("1", "2", "2", "12~")
    assert records[1].finished == (True, True, True, False)


def test_ranks_that_share_the_questions_report_the_same():
    whole = ask(engine(TEXTS)[0], score, PROMPTS, CONFIG, answer=answer)
    generate, calls = engine(TEXTS)
    parts = [ask(generate, score, PROMPTS, CONFIG, answer=answer, rank=rank, ranks=3) for rank in range(3)]
    assert [ids for _, ids in calls] == [[0, 12], [4], [8]]
    records = sorted((record for part in parts for record in part), key=lambda record: record.ordinal)
    assert records == whole
    assert ask(generate, score, PROMPTS, CONFIG, answer=answer, rank=4, ranks=5) == []


def test_greedy_asks_once_and_few_questions_have_no_error_bar():
    greedy = EvalConfig(questions=1)
    generate, calls = engine({"a": ["7"]})
    summary = summarize(ask(generate, score, PROMPTS, greedy, answer=answer), greedy)
    assert summary == {"questions": 1, "samples": 1, "not_judged": 0, "pass@1": 1.0, "mean_length": 1.0, "finished": 1.0}
    assert calls[0][0].temperature == 0
    unjudged = summarize(ask(engine({"d": ["?"]})[0], score, PROMPTS[3:], EvalConfig(), answer=answer), EvalConfig())
    assert unjudged == {"questions": 1, "samples": 1, "not_judged": 1, "mean_length": 1.0, "finished": 1.0}


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"samples": 4}, "--eval.samples 4 .* with --eval.temperature 0: greedy gives one response"),
        ({"top_p": 0.9}, "--eval.top-p 0.9 with --eval.temperature 0"),
        ({"samples": 0}, "needs at least 1"),
        ({"samples": 4, "temperature": 1.0, "pass_at": (8,)}, "--eval.pass-at 8: must be 2 .. 4"),
        ({"samples": 4, "temperature": 1.0, "pass_at": (1,)}, "pass@1 is always there"),
        ({"questions": -1}, "--eval.questions -1"),
    ],
)
def test_refused_settings(wrong, complaint):
    with pytest.raises(InputError, match=complaint):
        EvalConfig(**wrong)
