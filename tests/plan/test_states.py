"""States of a parameter on its rank, against the arithmetic of who holds what."""

import pytest

from strop.engine.config import Layout
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.states import replicas, state_bytes_per_parameter


@pytest.mark.parametrize(
    "layout, dense_ranks, expert_ranks",
    [
        (Layout(pp=16, ep=8), 16, 2),
        (Layout(pp=16, ep=8, schedule="dualpipe"), 32, 4),  # every layer, its experts too, is on two pipeline ranks
        (Layout(pp=16, ep=8, schedule="dualpipev"), 16, 2),
        (Layout(tp=2, sp=True, cp=2, ep=32), 128, 8),
        (Layout(tp=4, sp=True, ep=16, etp=2), 64, 8),
    ],
)
def test_states_are_sharded_over_all_ranks_with_the_same_parameters(layout, dense_ranks, expert_ranks):
    run = PlannedRun.of(SHAPES["deepseek-v3"], 256, layout=layout, training=TrainingPlan(global_batch_sequences=1024))
    assert replicas(run) == (dense_ranks, expert_ranks)
    dense, expert = state_bytes_per_parameter(run)
    assert (dense.optimizer, expert.optimizer) == (12 / dense_ranks, 12 / expert_ranks)
