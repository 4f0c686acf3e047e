"""Memory beside training: while engines on the same GPUs get the trainer's weights, and of GPUs that only generate."""

from dataclasses import replace

import pytest

from strop.engine.config import GIB, Layout
from strop.engine.plan.candidates import SearchSpace
from strop.engine.plan.check import check
from strop.engine.plan.devices import device_named
from strop.engine.plan.memory import (
    COMMUNICATOR_BYTES,
    CONTEXT_BYTES,
    KERNELS_BYTES,
    fits,
    generating_gpu_bytes,
    memory_phases,
    weight_sync_memory,
)
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.search import search
from strop.engine.plan.states import rank_state_bytes

LLAMA_70B, QWEN_32B = SHAPES["llama3-70b"], SHAPES["qwen3-32b"]
TRAINING = TrainingPlan(offload_optimizer=True, recompute=("layer",), gradient_dtype_bytes=2)
ROLLOUT = RolloutPlan(tp=2, memory_fraction=0.9, offload_training=True)


def colocated(training: TrainingPlan = TRAINING, **rollout) -> PlannedRun:
    """Llama 3 70B, which 8 GPUs train and generate with."""
    return PlannedRun.of(
        LLAMA_70B, 8, layout=Layout(tp=8, sp=True), training=training, rollout=replace(ROLLOUT, **rollout)
    )  # fmt: skip


def phases(run: PlannedRun) -> list[str]:
    return [ranks[0].phase for ranks in memory_phases(run)]


def test_both_weights_are_there_while_one_is_written_from_the_other():
    """70.55e9 parameters of 2 bytes: an eighth in the trainer, half in the engine, and what isn't PyTorch's (8 GPUs: the world
    and tp)."""
    run = colocated()
    [memory] = weight_sync_memory(run)
    by_hand = 2 * 70.55e9 * (1 / 8 + 1 / 2) + CONTEXT_BYTES + KERNELS_BYTES + 2 * COMMUNICATOR_BYTES
    assert memory.total_bytes == pytest.approx(by_hand, rel=1e-3) and memory.total_bytes / GIB == pytest.approx(86.5, abs=0.1)
    assert all(ranks[0].total_bytes < device_named("h100").hbm_bytes for ranks in memory_phases(run) if ranks[0] != memory)
    [problem] = check(run)
    assert "86.5 GiB of 79.2 GiB while engines get the trainer's weights" in problem.reason
    assert "rollout.tp" in "".join(problem.nearest)
    assert fits(colocated(tp=4))


def test_which_tiers_hold_weights_twice():
    assert phases(colocated()) == ["training", "weight_sync", "rollout"]
    for tier in ("local_copy", "alias"):
        same = colocated(tp=8, weight_sync=tier)
        assert ("weight_sync" in phases(same)) == (tier == "local_copy"), "aliased weights stay where they are"
    assert phases(colocated(offload_training=False)) == ["training", "rollout"], "generating holds them all, and the cache"
    sizes = {tier: weight_sync_memory(colocated(weight_sync=tier))[0] for tier in ("reshard", "stream", "broadcast")}
    embedding_bytes = 128256 * 8192 * 2  # the largest tensor, whole
    for tier in ("stream", "broadcast"):
        assert sizes[tier].parts_bytes["communication"] == embedding_bytes
        assert sizes[tier].total_bytes - sizes["reshard"].total_bytes == pytest.approx(embedding_bytes)


def test_what_else_stays_while_weights_are_sent():
    """Gradients where they live as long as the trainer; optimizer and reference are on the host. FSDP's weights are shards."""
    resident = replace(TRAINING, resident_gradients=True, offload_optimizer=False)
    [memory], [gone] = weight_sync_memory(colocated(resident)), weight_sync_memory(colocated(reference=False))
    states = rank_state_bytes(colocated(resident), colocated(resident).stages()[0])
    assert memory.total_bytes - gone.total_bytes == pytest.approx(states.gradients)
    assert memory.parts_bytes["optimizer"] == memory.parts_bytes["kv_cache"] == memory.parts_bytes["reference_weights"] == 0
    assert memory.host_bytes == pytest.approx(states.optimizer + states.weights)
    run = PlannedRun.of(
        QWEN_32B, 8, layout=Layout(), training=replace(TRAINING, fsdp=True), rollout=replace(ROLLOUT, weight_sync="stream")
    )  # fmt: skip
    [sharded] = weight_sync_memory(run)
    assert sharded.parts_bytes["weights"] == pytest.approx(2 * 32.76e9 / 8, rel=1e-3)


def test_a_search_proposes_no_engines_that_only_fit_without_the_trainer():
    space = SearchSpace(
        tp=(8,), pp=(1,), cp=(1,), rollout_tp=(2, 4), offload_training=(True,), offload_optimizer=(True,), fsdp=(False,)
    )  # fmt: skip
    hbm_bytes = device_named("h100").hbm_bytes
    result = search(LLAMA_70B, 8, training=TRAINING, rollout=ROLLOUT, space=space, memory_bytes=hbm_bytes)
    assert result.ranked and all(fits(run) for run, _ in result.ranked)
    assert {run.rollout.tp for run, _ in result.ranked} == {4}


def split(memory_fraction: float) -> PlannedRun:
    return PlannedRun.of(
        QWEN_32B, 16, layout=Layout(tp=8, sp=True), placement="split", training=TrainingPlan(offload_optimizer=True),
        rollout=RolloutPlan(tp=2, gpus=8, memory_fraction=memory_fraction),
    )  # fmt: skip


def test_engines_share_their_gpus_with_what_is_not_pytorchs():
    """Context and kernels 3.5 GiB, NCCL's buffers of the world and of tp 0.8: 79.2 GiB leave 74.8, so 94%."""
    full, most, hbm_bytes = split(1.0), split(0.94), device_named("h100").hbm_bytes
    parts = generating_gpu_bytes(full)
    assert parts["rollout_weights"] + parts["kv_cache"] == pytest.approx(hbm_bytes)
    assert parts["margin"] == CONTEXT_BYTES + KERNELS_BYTES + 2 * COMMUNICATOR_BYTES
    assert not fits(full) and not fits(split(0.95)) and fits(most)
    assert not fits(most, 0.97 * hbm_bytes), "a budget holds for them too"
    [problem] = check(full)
    assert problem.setting == "rollout.memory_fraction" and "83.5 GiB of 79.2 GiB" in problem.reason
    assert any("rollout.memory-fraction" in way for way in problem.nearest)


def test_a_search_leaves_that_room_on_gpus_that_generate():
    space = SearchSpace(placements=("split",), split_shares=(0.5,), tp=(8,), pp=(1,), cp=(1,), rollout_tp=(2,))
    training, rollout = split(1.0).training, replace(split(1.0).rollout, gpus=0)
    tight = search(QWEN_32B, 16, training=training, rollout=rollout, space=space)
    assert not tight.ranked and all("beside the engine's share" in one.reason for one in tight.rejected if not one.problem)
    loose = search(QWEN_32B, 16, training=training, rollout=replace(rollout, memory_fraction=0.9), space=space)
    assert loose.ranked and all(fits(run) for run, _ in loose.ranked)
