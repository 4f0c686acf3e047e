"""Seconds from new weights in the trainer to new weights in the engines, by tier (`WeightSync`).

Constants are fitted on published times of NeMo-RL and slime; tests/plan/test_weight_sync.py compares.
"""

from dataclasses import dataclass, replace

from .devices import device_named
from .efficiency import memory_bound_seconds
from .facts import total_parameters
from .rollout_memory import rollout_weight_bytes
from .run import PlannedRun, WeightSync
from .shape import ModelShape

TRAINER_BYTES = 2
"""Of a weight as the trainer sends it."""
FIXED_SECONDS = 0.2
"""Barriers and starting transfers, and ..."""
RESHARD_TENSOR_SECONDS = 2e-5
"""... host time of one tensor's block, and ..."""
RESHARD_LINK_FRACTION = 0.6
"""... achieved of the link with many pairs of ranks and unequal blocks (NeMo-RL docs/design-docs/nccl-reshard-refit.md and PR
#2971: Qwen3-4B 0.21-0.34 s, 30B-A3B on tp 8, 4, 2 0.74-1.00, 1.13-1.53, 1.21-1.52, DeepSeek-V3 2.39-2.83)."""
BROADCAST_LINK_FRACTION = 0.235
"""Achieved of a node's cards together (a broadcast enters a node once), packing and loading beside it (NeMo-RL PR #1379:
DeepSeek-V3 14 s, Qwen3-235B 5.5 s)."""
STREAM_LINK_FRACTION = 0.54
"""Achieved of a network card while every tensor is gathered whole by everyone (27 of 50 GB/s: NeMo-RL PRs #634 and #638)."""
STREAM_TENSOR_SECONDS = 2.5e-4
"""Host time of one tensor: gather, rename, hand over, load (slime: Qwen3-30B-A3B, 18,900 tensors, 7 s)."""
QUANTIZE_TENSOR_SECONDS = 1.4e-4
"""Time of one tensor more where the engines' weights are FP8: largest value, scale, cast, and loading both. Fitted on one row,
NeMo-RL docs/design-docs/nccl-reshard-refit.md: Qwen3-30B-A3B in FP8 takes 2.9-4.0 s, in bf16 0.74-1.53."""


@dataclass(frozen=True)
class WeightSyncTime:
    tier: WeightSync
    received_bytes_per_gpu: float
    seconds: float


def weight_sync_time(run: PlannedRun) -> WeightSyncTime:
    """One synchronisation of a run with a rollout."""
    time = _sync_time(run)
    if run.rollout.weights_dtype_bytes >= min(TRAINER_BYTES, run.training.weights_dtype_bytes):
        return time
    return replace(time, seconds=time.seconds + num_tensors(run.shape) * QUANTIZE_TENSOR_SECONDS)


def _sync_time(run: PlannedRun) -> WeightSyncTime:
    """Without quantisation: what is sent, or copied."""
    weight_bytes, device, tier = rollout_weight_bytes(run), device_named(run.device), run.rollout.weight_sync
    if tier == "alias":
        return WeightSyncTime(tier, 0.0, 0.0)
    if tier == "local_copy":
        read = rollout_weight_bytes(replace(run, rollout=replace(run.rollout, weights_dtype_bytes=TRAINER_BYTES)))
        return WeightSyncTime(tier, 0.0, memory_bound_seconds(device, read + weight_bytes))
    in_one_node = run.gpus <= device.gpus_per_node
    link = device.nvlink_bytes_per_second if in_one_node else device.nic_bytes_per_second
    if tier == "broadcast":
        received = total_parameters(run.shape) * TRAINER_BYTES
        node_link = link if in_one_node else link * device.gpus_per_node
        return WeightSyncTime(tier, received, FIXED_SECONDS + received / (BROADCAST_LINK_FRACTION * node_link))
    if tier == "stream":
        received = total_parameters(run.shape) * TRAINER_BYTES
        seconds = FIXED_SECONDS + num_tensors(run.shape) * STREAM_TENSOR_SECONDS + received / (STREAM_LINK_FRACTION * link)
        return WeightSyncTime(tier, received, seconds)
    received = weight_bytes
    sent = received * run.rollout_gpus / run.training_gpus  # every trainer GPU serves as many copies as its share asks for
    host_seconds = FIXED_SECONDS + num_tensors(run.shape) * RESHARD_TENSOR_SECONDS
    return WeightSyncTime(tier, received, host_seconds + max(received, sent) / (RESHARD_LINK_FRACTION * link))


def num_tensors(shape: ModelShape) -> int:
    """Weight tensors as a Hugging Face checkpoint stores them, each expert's projections apart."""
    attention = (7 if shape.mla.q_rank else 6) if shape.mla is not None else 4 + 3 * shape.qkv_bias + 2 * shape.qk_norm
    layers = 0
    for layer in range(shape.num_layers):
        layers += attention + 2
        if shape.kind(layer) == "dense":
            layers += 3
        else:
            shared = 3 if shape.moe.shared_intermediate_size else 0
            layers += 3 * shape.moe.num_experts + shared + 1 + shape.moe.router_bias
    return layers + (2 if shape.tie_embeddings else 3)
