"""What a step's metrics say of its rewards, over all samples and by data source."""

import math

import pytest
import torch

from strop.engine.batch import Group, Prompt, Sample, Score, Span
from strop.engine.parallel.mesh import Mesh
from strop.engine.train.census import Census
from strop.kernels import AdvantageSpec


def group(source: str, first_id: int, *scores: Score) -> Group:
    logprobs = torch.zeros(2)
    span = Span(torch.tensor([1, 2]), True, 0, logprobs, logprobs, 1.0)
    samples = tuple(Sample(first_id + index, (span,), "stop", "") for index in range(len(scores)))
    return Group(Prompt(f"{source}-{first_id}", source, text="?"), torch.tensor([1]), samples, scores)


def metrics(*groups: Group) -> dict[str, float]:
    census = Census.take(groups, Mesh.single().dp)
    return census.advantages(AdvantageSpec())[1] | census.metrics()


def test_rewards_are_averaged_over_all_and_by_source():
    got = metrics(
        group("roots", 0, Score(0.0, {"accuracy": 0.0, "crash": 1.0}), Score(1.0, {"accuracy": 1.0, "crash": 0.0})),
        group("sums", 10, Score(1.0, {"accuracy": 1.0, "format": 0.0}), Score(0.5, {"accuracy": 0.0, "format": 1.0})),
        group("roots", 20, Score(0.0, {"accuracy": 0.0, "crash": 0.0}), Score(0.0, {"accuracy": 0.0, "crash": 0.0})),
    )
    rewards = {key: value for key, value in got.items() if key.startswith("reward/")}
    std = rewards.pop("reward/std")
    assert rewards == pytest.approx({
        "reward/nonfinite": 0,
        "reward/mean": 2.5 / 6,
        "reward/accuracy": 2 / 6,
        "reward/crash": 1 / 4,
        "reward/format": 1 / 2,
        "reward/roots/mean": 1 / 4,
        "reward/roots/accuracy": 1 / 4,
        "reward/roots/crash": 1 / 4,
        "reward/sums/mean": 0.75,
        "reward/sums/accuracy": 1 / 2,
        "reward/sums/format": 1 / 2,
    })
    assert std == pytest.approx(math.sqrt(2.25 / 6 - (2.5 / 6) ** 2))


def test_one_source_has_no_breakdown():
    got = metrics(group("sums", 0, Score(1.0, {"accuracy": 1.0}), Score(0.0, {"accuracy": 0.0})))
    assert got["reward/mean"] == got["reward/accuracy"] == 0.5
    assert not any(key.startswith("reward/sums") for key in got)


def test_what_no_scorer_could_judge_is_counted_and_left_out_of_the_means():
    unknown = Score(math.nan, {"accuracy": math.nan, "format": 1.0})
    got = metrics(group("roots", 0, unknown, unknown), group("sums", 10, Score(1.5, {"accuracy": 1.0, "format": 0.0}), unknown))
    assert got["reward/nonfinite"] == 3
    assert got["reward/mean"] == got["reward/sums/mean"] == 1.5
    assert got["reward/accuracy"] == got["reward/sums/accuracy"] == 1.0
    assert got["reward/format"] == 0.75
    assert got["reward/roots/format"] == 1.0
    assert not {"reward/roots/mean", "reward/roots/accuracy"} & got.keys(), "a mean over nothing is left out"
    assert metrics() == {}
