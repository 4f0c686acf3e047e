"""Which engines a search looks at, and which of them a trainer's layout gets beside it."""

from dataclasses import replace

import pytest

from strop.engine.config import Layout
from strop.engine.plan.candidates import SearchSpace
from strop.engine.plan.devices import DEVICES
from strop.engine.plan.engine_choices import Engines, beside, engine_groups
from strop.engine.plan.models import SHAPES
from strop.engine.plan.rollout import rollout_time
from strop.engine.plan.run import PlannedRun, RolloutPlan
from strop.engine.plan.weight_sync import weight_sync_time

QWEN = SHAPES["qwen3-30b-a3b"]


def test_engines_of_every_share_of_memory_have_their_own_seconds():
    """A small share holds fewer sequences at once, so that it takes longer."""
    rollout = RolloutPlan(max_response_tokens=16384, mean_response_tokens=4000, reward_seconds=5.0, offload_training=True)
    space = SearchSpace(rollout_tp=(1,), rollout_ep=(1,), memory_fractions=(0.8, 0.4), placements=("colocated",))
    (engines,), _ = engine_groups(PlannedRun(SHAPES["qwen3-8b"], 8, rollout=rollout), space)
    assert [one.run.rollout.memory_fraction for one in engines] == [0.8, 0.4]
    assert engines[0].seconds < 0.9 * engines[1].seconds
    for one in engines:
        assert one.seconds == pytest.approx(rollout_time(one.run).total_seconds + 5 + weight_sync_time(one.run).seconds)


@pytest.mark.parametrize("weight_sync", ["alias", "local_copy"])
def test_a_trainer_gets_engines_of_its_own_degrees_where_they_share_weights(weight_sync):
    own = RolloutPlan(ep=8, weight_sync=weight_sync, offload_training=True, reference=False, memory_fraction=0.5)
    run = PlannedRun.of(QWEN, 8, layout=Layout(ep=8), rollout=own)
    faster = [Engines(replace(run, rollout=replace(own, **degree)), 1.0) for degree in ({"ep": 4}, {"tp": 2}, {"pp": 2})]
    chosen = beside(run, [*faster, Engines(run, 2.0)], DEVICES["h100"].hbm_bytes)
    assert chosen is not None and chosen.rollout == own
    assert beside(run, faster, DEVICES["h100"].hbm_bytes) is None


@pytest.mark.parametrize("fractions", [(0.05, 0.1), (0.1, 0.05)])
def test_engines_that_hold_no_sequence_say_so_of_the_largest_share(fractions):
    """A tenth of 79.2 GiB, in whatever order they are given."""
    space = SearchSpace(rollout_tp=(1,), memory_fractions=fractions, placements=("colocated",))
    _, ((_, reason),) = engine_groups(PlannedRun(SHAPES["qwen3-8b"], 8, rollout=RolloutPlan(offload_training=True)), space)
    assert "leave 0.0 of the 7.9 GiB" in reason
