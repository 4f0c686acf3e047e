"""Device memory of each pipeline rank, by part: while it trains, and where engines generate on the same GPUs, while they get
the trainer's weights and while they generate; and that of a GPU that only generates.

Bytes are those of the moment that holds most. The parts of a phase add up to its total.
"""

from dataclasses import dataclass
from typing import Literal

from ..config import GIB
from .activations import head_working_bytes, layer_working_bytes, rank_kept_bytes
from .devices import device_named
from .host_memory import fullest_node
from .rollout_memory import holds_a_sequence, rollout_kv_cache_bytes, rollout_weight_bytes
from .run import PlannedRun, Stage
from .states import (
    alike_layers,
    gradient_placeholder_bytes,
    layer_rank_parameters,
    rank_parameters,
    rank_state_bytes,
    replicas,
    state_bytes_per_parameter,
)
from .weight_sync import TRAINER_BYTES

Phase = Literal["training", "weight_sync", "rollout"]
PARTS = (
    "weights", "gradients", "optimizer", "activations", "logits", "communication", "reference_weights", "rollout_weights",
    "kv_cache", "margin",
)  # fmt: skip
FRAGMENTATION = 0.05
"""Memory that PyTorch's allocator holds beyond the peak of what is allocated, as a fraction of that: median of the 19 layouts
of MooreThreads/SimuMax, docs/b200/b200_release_v1.2_summary.json (0.03 to 0.09). Expandable segments need less."""
CONTEXT_BYTES = 0.52 * GIB
"""A CUDA context and its libraries' handles."""
COMMUNICATOR_BYTES = 0.4 * GIB
"""NCCL's channel buffers of one process group."""
KERNELS_BYTES = 3.0 * GIB
"""Loaded kernels, cuBLAS and attention workspaces, and the buffers of the first all-to-all. All three constants: measured on
H100 (pp 4, ep 8) by mlc-ai/pith-train, tools/memory_estimator/__main__.py: 5.84 GiB in all with FSDP's 0.96. Megatron-LM pull
request 6429 has 68,973 MB used on a device of which the allocator reserved 62,570 (pp 4, ep 16): 6.3 GiB, here 5.1."""
SYNC_BUCKET_BYTES = 0.5 * GIB
"""Of whole tensors on their way to the engines, where one alone isn't larger: slime's --update-weight-buffer-size by default
(verl's update_weights_bucket_megabytes is 512 or 2,048 by its version; NeMo-RL takes what is free)."""
GATHERED_UNITS = 2
"""Layers whose FSDP-sharded weights are whole at once: the one that computes and the one that is being gathered."""


@dataclass(frozen=True)
class StageMemory:
    """One pipeline rank in one phase."""

    stage: Stage
    phase: Phase
    parts_bytes: dict[str, float]
    """By name of PARTS, on the device. logits: 0 where the peak is in a layer's backward pass, when they are gone."""
    host_parts_bytes: dict[str, float]
    """Tensors in the host's memory for each of the ranks of this stage: weights, optimizer, reference_weights."""

    @property
    def host_bytes(self) -> float:
        return sum(self.host_parts_bytes.values())

    @property
    def total_bytes(self) -> float:
        return sum(self.parts_bytes.values())

    @property
    def allocated_bytes(self) -> float:
        """What torch.cuda.max_memory_allocated() would say: without fragmentation, CUDA context and NCCL."""
        return self.total_bytes - self.parts_bytes["margin"]

    @property
    def reserved_bytes(self) -> float:
        """What torch.cuda.max_memory_reserved() would say."""
        return self.allocated_bytes * (1 + FRAGMENTATION)


def memory_per_rank(run: PlannedRun) -> tuple[StageMemory, ...]:
    """Each pipeline rank of training in the phase that needs more of its device."""
    return tuple(max(stage, key=lambda memory: memory.total_bytes) for stage in zip(*memory_phases(run), strict=True))


def memory_phases(run: PlannedRun) -> list[tuple[StageMemory, ...]]:
    """Each pipeline rank of training, one phase after another."""
    phases = [training_memory(run)]
    if run.rollout is not None and run.placement == "colocated":
        if offloads_weights(run):  # else they stay, and the KV cache joins them
            phases.append(weight_sync_memory(run))
        phases.append(colocated_rollout_memory(run))
    return phases


def generating_gpu_bytes(run: PlannedRun) -> dict[str, float]:
    """Of a GPU that only generates, by name of PARTS. RolloutPlan.memory_fraction is for weights and KV cache; vLLM's
    gpu_memory_utilization has the margin in it."""
    plan = run.rollout
    margin = _outside_bytes(run, (plan.tp, plan.pp, plan.ep))
    return {"rollout_weights": rollout_weight_bytes(run), "kv_cache": rollout_kv_cache_bytes(run), "margin": margin}


def worst_stage(memories: tuple[StageMemory, ...]) -> StageMemory:
    """The rank that needs most; of equals the first."""
    return max(memories, key=lambda memory: memory.total_bytes)


def fits(run: PlannedRun, budget_bytes: float | None = None) -> bool:
    """Whether every rank fits into budget_bytes in all phases, what lies on the host into its node, and with split placement
    the generating GPUs too.

    A rollout engine fits where its KV cache holds the longest sequence. budget_bytes unset: all memory of the run's device.
    Raises InputError for an unknown device.
    """
    most_bytes = device_named(run.device).hbm_bytes if budget_bytes is None else budget_bytes
    if run.rollout is not None:
        if not holds_a_sequence(run):
            return False
        if run.placement == "split" and sum(generating_gpu_bytes(run).values()) > most_bytes:
            return False
    phases = memory_phases(run)
    if fullest_node(run, phases).shortage_bytes:
        return False
    return all(worst_stage(phase).total_bytes <= most_bytes for phase in phases)


def training_memory(run: PlannedRun) -> tuple[StageMemory, ...]:
    """Every pipeline rank while it trains. Own weights and KV cache of colocated rollout engines have been given back.

    With RolloutPlan.reference the reference policy, in the trainer's layout and dtype, is always there. offload_training keeps
    it in the host's memory but for the pass that needs it, which needs no gradients and no optimizer.
    """
    memories = []
    for stage, kept in zip(run.stages(), rank_kept_bytes(run), strict=True):
        states, layer = rank_state_bytes(run, stage), layer_working_bytes(run, stage)
        logits, head = head_working_bytes(run, stage)
        at_head = logits + head > layer
        offloaded = run.rollout is not None and run.rollout.offload_training
        reference = _reference_bytes(run, stage)
        parts = _parts(
            weights=states.weights,
            gradients=states.gradients + gradient_placeholder_bytes(run, stage),
            optimizer=states.optimizer,
            activations=kept + (head if at_head else layer),
            logits=logits if at_head else 0.0,
            communication=communication_bytes(run, stage),
            reference_weights=0.0 if offloaded else reference,
        )
        margin = outside_bytes(run) + FRAGMENTATION * sum(parts.values())
        host = {"optimizer": states.host, "reference_weights": reference if offloaded else 0.0}
        memories.append(StageMemory(stage, "training", parts | {"margin": margin}, host))
    return tuple(memories)


def weight_sync_memory(run: PlannedRun) -> tuple[StageMemory, ...]:
    """Every pipeline rank while engines on the same GPUs get the weights of a trainer that then leaves the device.

    In the order of NeMo-RL (offload_before_refit, wake_up of the weights, refit, offload_after_refit, wake_up of the KV cache)
    and verl: optimizer, gradients (unless TrainingPlan.resident_gradients) and reference are off the device already, the
    trainer's weights, as it shards them, are on it until the engine's, allocated as a whole, are written; the KV cache comes
    last. Tensors that every GPU gets whole (stream, broadcast) are gathered a bucket at a time. A trainer that streams from a
    copy in the host's memory, as slime's, needs less: its own weights are off the device by then.
    """
    whole, memories = run.rollout.weight_sync in ("stream", "broadcast"), []
    bucket_bytes = max(SYNC_BUCKET_BYTES, TRAINER_BYTES * run.shape.vocab_size * run.shape.hidden_size) if whole else 0.0
    for stage in run.stages():
        states, reference = rank_state_bytes(run, stage), _reference_bytes(run, stage)
        parts = _parts(
            weights=states.weights,
            gradients=states.gradients if run.training.resident_gradients else 0.0,
            communication=bucket_bytes,
            rollout_weights=rollout_weight_bytes(run),
        )
        host = {"optimizer": states.host + states.optimizer, "reference_weights": reference}
        memories.append(StageMemory(stage, "weight_sync", parts | {"margin": outside_bytes(run)}, host))
    return tuple(memories)


def offloads_weights(run: PlannedRun) -> bool:
    """Whether RolloutPlan.offload_training takes the trainer's weights off the device too: engines that share them (alias)
    keep them there."""
    return run.rollout.offload_training and run.rollout.weight_sync != "alias"


def colocated_rollout_memory(run: PlannedRun) -> tuple[StageMemory, ...]:
    """Every pipeline rank of training while the engines on the same GPUs generate.

    Of training, weights and optimizer states stay, unless RolloutPlan.offload_training moves them to the host; activations are
    gone, and gradients unless TrainingPlan.resident_gradients. The KV cache takes what RolloutPlan.memory_fraction of the
    device leaves beside the weights it generates with: the trainer's own (weight_sync alias) or a copy in the rollout's layout
    and dtype. It is allocated once and doesn't fragment.
    """
    alias, away = run.rollout.weight_sync == "alias", offloads_weights(run)
    memories = []
    for stage in run.stages():
        states, offloaded = rank_state_bytes(run, stage), run.rollout.offload_training
        reference = _reference_bytes(run, stage)
        parts = _parts(
            weights=0.0 if away else states.weights,
            gradients=states.gradients if run.training.resident_gradients else 0.0,
            optimizer=0.0 if offloaded else states.optimizer,
            reference_weights=0.0 if offloaded else reference,
            rollout_weights=0.0 if alias else rollout_weight_bytes(run),
            kv_cache=rollout_kv_cache_bytes(run),
        )
        host = {
            "weights": states.weights if away else 0.0,
            "optimizer": states.host + (states.optimizer if offloaded else 0.0),
            "reference_weights": reference if offloaded else 0.0,
        }
        memories.append(StageMemory(stage, "rollout", parts | {"margin": outside_bytes(run)}, host))
    return tuple(memories)


def communication_bytes(run: PlannedRun, stage: Stage) -> float:
    """Buffers of collectives in PyTorch's allocator: FSDP's gathered weights and whole gradients, the two keys and values in
    flight of ring attention, tensors between pipeline ranks. Dispatched tokens are with the activations; ZeRO-1 reduces and
    gathers in the buffers that hold gradients and weights."""
    training, layout, shape = run.training, run.layout, run.shape
    element = training.element_bytes
    total = _fsdp_bytes(run, stage, element) if training.fsdp else 0.0
    if layout.cp > 1 and layout.cp_kind == "ring":
        mla = shape.mla  # its keys and values travel up-projected
        widths = 2 * shape.head_dim if mla is None else mla.nope_dim + mla.rope_dim + mla.value_dim
        total += 2 * run.microbatch_tokens * run.attended_kv_heads * widths * element
    if layout.pp > 1:
        total += 2 * run.tokens_outside * shape.hidden_size * element
    return total


def _fsdp_bytes(run: PlannedRun, stage: Stage, element: int) -> float:
    """Without a pipeline, layers are gathered one by one, and again in the backward pass. With one, every micro-batch would do
    that, so gathered weights stay and gradients add up whole (torchtitan, parallelize_llama.py: reshard_after_forward). Weights
    of another dtype than their products are copied even where nothing is sharded."""
    cast = run.training.weights_dtype_bytes != element
    dense, experts = (cast or shards > 1 for shards in replicas(run))
    gradient = run.training.gradient_dtype_bytes
    if not run.gathers_in_every_pass:
        whole = rank_parameters(run, stage)
        return (whole.dense * dense + whole.experts * experts) * (element + gradient)
    layers = [layer_rank_parameters(run, alike.example) for alike in alike_layers(run, stage)]
    vocabulary = run.shape.vocab_size * run.shape.hidden_size / run.layout.tp * dense
    largest = max(vocabulary, *(layer.dense * dense + layer.experts * experts for layer in layers))
    return GATHERED_UNITS * largest * element + largest * (element + gradient)


def outside_bytes(run: PlannedRun) -> float:
    """Of a GPU that trains: on the device, but not PyTorch's to give."""
    layout = run.layout
    return _outside_bytes(run, (layout.tp, layout.cp, layout.pp, layout.dp, layout.ep))


def _outside_bytes(run: PlannedRun, axes: tuple[int, ...]) -> float:
    """CUDA context, kernels, NCCL's buffers for the world and each axis of more than one rank."""
    groups = 1 + sum(ranks > 1 for ranks in axes)
    return CONTEXT_BYTES + KERNELS_BYTES + (COMMUNICATOR_BYTES * groups if run.gpus > 1 else 0.0)


def _reference_bytes(run: PlannedRun, stage: Stage) -> float:
    """No FP8 copies: one forward pass a step casts as it goes."""
    if run.rollout is None or not run.rollout.reference:
        return 0.0
    held, (dense, expert) = rank_parameters(run, stage), state_bytes_per_parameter(run)
    return dense.weights * held.dense + expert.weights * held.experts


def _parts(**known: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, 0.0) | known
