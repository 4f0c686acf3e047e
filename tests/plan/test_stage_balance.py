"""Divisions of layers over pipeline stages, against all that there are."""

from dataclasses import replace
from itertools import product

import pytest

from strop.engine.plan.facts import layer_forward_flops_per_token
from strop.engine.plan.models import SHAPES
from strop.engine.plan.stage_balance import balanced_stage_layers, stage_layers_within

LENGTH_TOKENS = 4096


@pytest.mark.parametrize("model", ["qwen3-0.6b", "llama3-70b"])  # whose heads are worth 6.5 layers and 1.2
@pytest.mark.parametrize("most", [(9, 9, 9), (2, 9, 9), (3, 4, 2), (0, 9, 9), (9, 9, 1), (2, 2, 5)])
def test_no_division_within_the_limits_has_a_faster_slowest_stage(model: str, most: tuple[int, ...]) -> None:
    shape = replace(SHAPES[model], num_layers=9)
    head = 2 * shape.vocab_size * shape.hidden_size / layer_forward_flops_per_token(shape, 0, LENGTH_TOKENS)
    slowest = {
        stages: max(stages[0], stages[1], stages[2] + head)
        for stages in product(*(range(limit + 1) for limit in most)) if sum(stages) == 9
    }  # fmt: skip
    found = stage_layers_within(shape, most, LENGTH_TOKENS)
    assert slowest[found] == pytest.approx(min(slowest.values()))


def test_limits_that_leave_layers_over() -> None:
    shape = SHAPES["llama3-8b"]
    assert stage_layers_within(shape, (8, 8, 8, 7), LENGTH_TOKENS) == ()
    assert stage_layers_within(shape, (40, -1), LENGTH_TOKENS) == ()
    assert stage_layers_within(shape, (8, 8, 8, 8), LENGTH_TOKENS) == (8, 8, 8, 8)


def test_of_equal_stages_the_last_has_more() -> None:
    """The first ones keep more micro-batches. A head of Llama 3 8B is worth 2.2 of its layers: 32 + 2.2 are 8.6 a stage."""
    assert stage_layers_within(SHAPES["llama3-8b"], (32,) * 4, LENGTH_TOKENS) == (8, 9, 9, 6)
    assert balanced_stage_layers(SHAPES["llama3-8b"], 4, LENGTH_TOKENS) == (8, 9, 9, 6)
