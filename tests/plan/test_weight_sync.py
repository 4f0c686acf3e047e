"""Seconds of a weight synchronisation by tier, against published times, those that constants were fitted on and others."""

import pytest

from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, RolloutPlan
from strop.engine.plan.weight_sync import num_tensors, weight_sync_time


def synced(model: str, gpus: int, rollout_gpus: int = 0, **plan):
    placement = "split" if rollout_gpus else "colocated"
    return weight_sync_time(
        PlannedRun(SHAPES[model], gpus, placement=placement, rollout=RolloutPlan(gpus=rollout_gpus, **plan))
    )


@pytest.mark.parametrize(
    "model, gpus, rollout_gpus, plan, slowest, fastest",
    [
        # NeMo-RL docs/design-docs/nccl-reshard-refit.md; PR #2971
        ("qwen3-4b", 16, 8, {"weight_sync": "reshard", "tp": 8}, 0.34, 0.21),
        ("qwen3-30b-a3b", 32, 16, {"weight_sync": "reshard", "tp": 8}, 1.00, 0.74),
        ("qwen3-30b-a3b", 32, 16, {"weight_sync": "reshard", "tp": 4}, 1.53, 1.13),
        ("qwen3-30b-a3b", 32, 16, {"weight_sync": "reshard", "tp": 2}, 1.52, 1.21),
        ("deepseek-v3", 512, 256, {"weight_sync": "reshard", "tp": 32}, 2.83, 2.39),
        ("qwen3-30b-a3b", 32, 16, {"weight_sync": "reshard", "tp": 8, "weights_dtype_bytes": 1}, 4.0, 2.9),
        # NeMo-RL PR #1379
        ("deepseek-v3", 512, 256, {"weight_sync": "broadcast", "tp": 32}, 14, 14),
        ("qwen3-235b-a22b", 256, 128, {"weight_sync": "broadcast", "tp": 8}, 5.5, 5.5),
        # slime (colocated buckets), NeMo-RL PR #638 with its 20 s of offloading, GPU counts of no influence here
        ("qwen3-30b-a3b", 32, 0, {"weight_sync": "stream", "tp": 2}, 7, 7),
        ("deepseek-v3", 256, 0, {"weight_sync": "stream", "tp": 32}, 55, 55),
    ],
)
def test_published_times(model, gpus, rollout_gpus, plan, slowest, fastest):
    assert 0.85 * fastest <= synced(model, gpus, rollout_gpus, **plan).seconds <= 1.15 * slowest


@pytest.mark.parametrize(
    "model, gpus, rollout_gpus, plan, seconds, off",
    [
        # NeMo-RL docs/guides/checkpoint-engine-refit.md, 256 -> 32 GPUs: few receivers, each with a large part of the model
        ("deepseek-v3", 288, 32, {"weight_sync": "reshard", "tp": 32}, 9.25, 0.28),
        # verl's checkpoint engine, 32 H100: 8 GB/s, whatever the links could
        ("qwen3-30b-a3b", 32, 16, {"weight_sync": "broadcast", "tp": 4}, 7.0, 0.12),
    ],
)
def test_known_misses(model, gpus, rollout_gpus, plan, seconds, off):
    """Held out, and far off: the constants are those of NeMo-RL and slime, and other engines' transports differ. Whoever mends
    the model moves a row up."""
    ratio = synced(model, gpus, rollout_gpus, **plan).seconds / seconds
    assert ratio == pytest.approx(off, rel=0.1), f"{ratio:.2f} of the published time"


def test_nearer_tiers_are_faster():
    tiers = [synced("qwen3-8b", 16, weight_sync=tier).seconds for tier in ("alias", "local_copy", "reshard", "stream")]
    assert tiers[0] == 0 and tiers == sorted(tiers)
    assert synced("qwen3-8b", 8).seconds < synced("qwen3-8b", 16).seconds, "NVLink inside a node"
    assert synced("qwen3-8b", 16, weight_sync="alias").received_bytes_per_gpu == 0


def test_tensors_of_published_checkpoints():
    assert num_tensors(SHAPES["llama3-8b"]) == 291  # model.safetensors.index.json of the repositories
    assert num_tensors(SHAPES["qwen3-30b-a3b"]) == 18867
    assert num_tensors(SHAPES["qwen3-0.6b"]) == 310
