"""What responses earn under each rule, the two control rewards, and what is refused at load time."""

import math
from collections import Counter

import pytest
import torch
import tyro

from strop.engine.batch import Group, Prompt, Sample, Span
from strop.engine.config import InputError
from strop.engine.reward.pool import Outcome, WorkerPool
from strop.engine.reward.rules import RewardConfig, Rewards, Rule, lenient


def sample(text, finish="stop", number=0):
    logprobs = torch.zeros(2)
    span = Span(torch.tensor([1, 2]), True, 0, logprobs, logprobs, 1.0)
    return Sample(number, (span,), finish, text)


def group(*texts, answer="7", source="sums", meta=None, finish="stop"):
    prompt = Prompt(f"{source}-{answer}", source, text="3 + 4 =", answer=answer, meta=meta or {})
    return Group(prompt, torch.tensor([1]), tuple(sample(text, finish) for text in texts))


def scores(config, *groups, step=0):
    with Rewards(config) as rewards:
        return [score for scored in rewards.score(groups, step=step) for score in scored.scores]


def test_default_rule_pays_the_exact_last_number_of_a_finished_response_and_nothing_less():
    texts = ["7", "3 + 4 = 7", "The answer is 7.", "7.0", "3 + 4", "7 = 3 + 4", "8", "seven", "", "14/2", "77", "-7"]
    got = scores(RewardConfig(), group(*texts))
    assert [score.value for score in got] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert [score.parts["format"] for score in got] == [1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    assert got[0].why == "'7' is right"
    assert got[6].why == "'8' is not '7'"
    assert got[7].why == "no answer (last-number)"
    unfinished = scores(RewardConfig(), group("7", finish="length"))[0]
    assert (unfinished.value, unfinished.parts["finished"], unfinished.parts["format"]) == (0, 0, 0)
    assert unfinished.why == "unfinished (length)"


def test_lenient_judgement_takes_the_last_number_anywhere_unfinished_too():
    config = lenient(RewardConfig(kind="format", shuffle=True, rule=Rule(extract="box"), limit_s=3.0))
    got = scores(config, group("I get 7, as you see", "7 and so 8"), group("so 7 then", finish="length"))
    assert [score.value for score in got] == [1, 0, 1]
    assert config.limit_s == 3.0


def test_groups_come_back_whole_and_in_order():
    groups = [group("7", "8"), group("1", "2", "3", answer="2")]
    with Rewards(RewardConfig()) as rewards:
        scored = rewards.score(groups)
    assert [[score.value for score in g.scores] for g in scored] == [[1, 0], [0, 1, 0]]
    assert [g.samples for g in scored] == [g.samples for g in groups]


def test_r1_zero_reward_is_accuracy_plus_format():
    rule = Rule(extract="tag", format="think-answer", format_weight=0.5)
    texts = [
        "<think>3 and 4</think> <answer>7</answer>",
        "<think>3 and 4</think>\n<answer>8</answer>\n",
        "<answer>7</answer>",
        "<think> </think> <answer>7</answer>",
        "<think>a</think><think>b</think> <answer>7</answer>",
        "so <think>a</think> <answer>7</answer>",
    ]
    got = scores(RewardConfig(rule=rule), group(*texts))
    assert [score.value for score in got] == [1.5, 0.5, 1, 1, 1, 1]
    assert scores(RewardConfig(rule=Rule(extract="tag", format="finished", format_weight=0.5)), group(texts[2]))[0].value == 1.5


def test_each_source_has_its_own_rule():
    config = RewardConfig(sources={"boxes": Rule(extract="box", accuracy_weight=2.0)})
    got = scores(config, group("\\boxed{7} or 8", source="boxes"), group("\\boxed{7} or 8"))
    assert [score.value for score in got] == [2, 0]


def test_format_control_pays_a_number_at_the_end_right_or_wrong_and_still_logs_accuracy():
    got = scores(RewardConfig(kind="format"), group("8", "7", "so 9.", "nine", "7 it is"), group("7", finish="length"))
    assert [score.value for score in got] == [1, 1, 1, 0, 0, 0]
    assert [score.parts["accuracy"] for score in got] == [0, 1, 0, 0, 1, 0]


def test_shuffle_control_permutes_the_true_rewards_over_the_batch():
    groups = [group(*(["7"] * 8 + ["8"] * 8)) for _ in range(4)]
    true = scores(RewardConfig(), *groups)
    shuffled = scores(RewardConfig(shuffle=True), *groups, step=3)
    assert Counter(score.value for score in shuffled) == Counter(score.value for score in true)
    assert [score.parts for score in shuffled] == [score.parts for score in true], "the parts stay the sample's own"
    assert [score.value for score in scores(RewardConfig(shuffle=True), *groups, step=3)] == [s.value for s in shuffled]
    assert [score.value for score in scores(RewardConfig(shuffle=True), *groups, step=4)] != [s.value for s in shuffled]
    paid_right = sum(s.value for s in shuffled if s.parts["accuracy"])
    assert 8 <= paid_right <= 24, "32 of 64 are right: about half of the rewards should go to them"
    by_group = [sum(score.value for score in shuffled[start : start + 16]) for start in range(0, 64, 16)]
    assert by_group != [8] * 4, "the permutation must cross groups"
    assert "shuffled: paid" in shuffled[0].why


def test_symbolic_answers_go_to_a_worker_and_equal_ones_only_once(monkeypatch):
    asked = []
    original = WorkerPool.run
    monkeypatch.setattr(WorkerPool, "run", lambda pool, jobs: asked.extend(jobs) or original(pool, jobs))
    config = RewardConfig(rule=Rule(extract="box"), limit_s=1.0)
    answers = ["2\\sqrt{2}", "\\sqrt{8}", "2\\sqrt{2}", "3", "9^{9^{9^9}}", "9^{9^{9^9}}"]
    got = scores(config, group(*(f"\\boxed{{{answer}}}" for answer in answers), answer="\\sqrt{8}"))
    assert [job.arguments["answer"] for job in asked] == ["2\\sqrt{2}", "3", "9^{9^{9^9}}"]
    assert [score.value for score in got] == [1, 1, 1, 0, 0, 0]
    assert [score.parts["timeout"] for score in got] == [0, 0, 0, 0, 1, 1]
    assert got[4].why == "'9^{9^{9^9}}': timeout: no verdict within 1 s"


def test_a_scorer_that_returns_nan_is_excluded_and_counted(monkeypatch):
    monkeypatch.setattr(WorkerPool, "run", lambda pool, jobs: [Outcome("ok", math.nan) for _ in jobs])
    rule = Rule(extract="text", format="finished", format_weight=0.5)
    got = scores(RewardConfig(rule=rule), group("x^2", "y", answer="x*x"), group("7"))
    assert math.isnan(got[0].value)
    assert math.isnan(got[0].parts["accuracy"])
    assert [score.parts["format"] for score in got] == [1, 1, 1]
    assert (got[2].value, got[2].parts["accuracy"]) == (1.5, 1)


def test_each_failure_of_a_worker_earns_nothing_and_is_a_part_of_its_own(monkeypatch):
    outcomes = [Outcome("crash"), Outcome("error"), Outcome("timeout"), Outcome("ok", 1.0)]
    monkeypatch.setattr(WorkerPool, "run", lambda pool, jobs: outcomes[: len(jobs)])
    config = RewardConfig(sources={"roots": Rule(extract="text")})
    got = scores(config, group("7", "8"), group("a+b", "c+d", "e+f", "g+h", answer="x", source="roots"))
    assert [score.value for score in got] == [1, 0, 0, 0, 0, 1]
    troubles = [[name for name in ("crash", "error", "timeout") if score.parts[name]] for score in got]
    assert troubles == [[], [], ["crash"], ["error"], ["timeout"], []]


def test_every_answer_that_a_worker_judges_is_a_sign_of_life():
    beats = []
    with Rewards(RewardConfig(rule=Rule(extract="box")), beat=lambda: beats.append(1)) as rewards:
        rewards.check([bad("\\frac{\\pi}{2}"), bad("7")])
        assert len(beats) == 1
        rewards.score([group("\\boxed{x}", "\\boxed{2y}", "\\boxed{x}", "none", answer="y+y")])
        assert len(beats) == 1 + 2, "equal answers are asked once"


def test_reasoning_gym_items_are_judged_by_their_own_scorer(monkeypatch):
    asked = []
    monkeypatch.setattr(WorkerPool, "run", lambda pool, jobs: asked.extend(jobs) or [Outcome("ok", 1.0) for _ in jobs])
    meta = {"family": "word_sorting", "options": {}, "item": "cGlja2xl"}
    got = scores(RewardConfig(rule=Rule(extract="tag")), group("<answer>a, b</answer>", answer="a,b", meta=meta))
    assert got[0].value == 1.0
    assert asked[0].verifier == "reasoning-gym"
    assert asked[0].arguments == meta | {"answer": "a, b"}
    scores(RewardConfig(), group("7", "8", meta=meta))
    assert len(asked) == 1, "a last number is compared as a number, without a worker"


def bad(answer, **meta):
    return Prompt("p", "mine", text="?", answer=answer, meta={"file": "mine.jsonl", "line": 37} | meta)


def test_answers_that_nothing_could_match_are_refused_at_load_time():
    good = bad("7")
    with Rewards(RewardConfig()) as rewards:
        rewards.check([good])
        with pytest.raises(InputError, match=r"mine.jsonl:37: answer 'banana' is not a number.*--reward.rule.extract"):
            rewards.check([good, bad("banana")])
        with pytest.raises(InputError, match=r"mine.jsonl:37: answer None"):
            rewards.check([bad(None)])
    with Rewards(RewardConfig(rule=Rule(extract="box"))) as rewards:
        rewards.check([good, bad("banana"), bad("\\frac{\\pi}{2}"), bad("(3, \\infty)")])
        rewards.check([bad(None, family="f", options={}, item="")])
        with pytest.raises(InputError, match=r"mine.jsonl:37: math-verify can't read the answer '\\\\frac\{1\}\{'"):
            rewards.check([good, bad("\\frac{1}{")])
        with pytest.raises(InputError, match=r"mine.jsonl:37: there is no answer"):
            rewards.check([bad(None)])


def test_command_line_and_refused_settings():
    config = tyro.cli(RewardConfig, args=["--kind", "format", "--shuffle", "--rule.extract", "box", "--rule.no-finished"])
    assert config == RewardConfig(kind="format", shuffle=True, rule=Rule(extract="box", finished=False))
    for wrong in ({"workers": 0}, {"limit_s": 0.0}, {"memory_mib": 10}):
        with pytest.raises(InputError, match=next(iter(wrong)).replace("_", "-")):
            RewardConfig(**wrong)
    with pytest.raises(InputError, match="format-weight -1"):
        Rule(format_weight=-1)
    with pytest.raises(InputError, match="both 0"):
        Rule(accuracy_weight=0)
