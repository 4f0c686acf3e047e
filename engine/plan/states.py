"""What a rank holds of the model's state: parameters by kind, and bytes of weights, gradients and optimizer."""

from dataclasses import dataclass

from .facts import layer_matrix_parameters, layer_parameters
from .run import PlannedRun, Stage, TrainingPlan
from .shape import ModelShape

MASTER_BYTES = 4
"""fp32 master weights; weights of 4 bytes are their own master (fp32 training, FSDP with fp32 shards)."""
FP8_COPY_BYTES = 1


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters on one rank, before any sharding over data-parallel ranks."""

    matrices: float
    """Of layers outside the routed experts: what FP8 products read."""
    experts: float
    """Of routed experts (matrices, but for gpt-oss's biases)."""
    rest: float
    """Embedding, head, router, norms, sinks, biases: never in FP8."""

    @property
    def dense(self) -> float:
        """What is replicated over the data- and context-parallel ranks: all but routed experts."""
        return self.matrices + self.rest

    @property
    def total(self) -> float:
        return self.dense + self.experts

    def plus(self, other: "RankParameters", count: int) -> "RankParameters":
        """With `count` times the other's."""
        matrices, experts = self.matrices + count * other.matrices, self.experts + count * other.experts
        return RankParameters(matrices, experts, self.rest + count * other.rest)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank, or of one parameter of it."""

    weights: float
    gradients: float
    optimizer: float
    host: float
    """In the host's memory, pinned: of an optimizer that was offloaded."""

    @property
    def on_device(self) -> float:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class AlikeLayers:
    """Layers of one pipeline rank that differ in nothing that costs memory."""

    example: int
    """One of them."""
    count: int
    recomputed: bool
    """TrainingPlan.recompute holds for them (`PlannedRun.recomputed_layers`)."""


def alike_layers(run: PlannedRun, stage: Stage) -> list[AlikeLayers]:
    """What a pipeline rank holds, by sort: dense, with experts, MTP module; recomputed or not."""
    recomputed = run.recomputed_layers() if run.training.recompute_layers else None  # None: all alike
    sorts: dict[tuple[str, bool, bool], list[int]] = {}
    for layer in stage.layers:
        again = bool(run.training.recompute) if recomputed is None else layer in recomputed
        sorts.setdefault((run.shape.kind(layer), layer >= run.shape.num_layers, again), []).append(layer)
    return [AlikeLayers(layers[0], len(layers), recomputed) for (_, _, recomputed), layers in sorts.items()]


def layer_rank_parameters(run: PlannedRun, layer: int) -> RankParameters:
    """Of one layer (or MTP module) on a rank that holds it.

    Tensor parallelism splits the projections of heads, the MLP's and the shared experts' columns and an MTP module's
    projection; norms, router and MLA's down-projections are on every rank, and so is a KV head where tp exceeds their number.
    """
    shape, layout = run.shape, run.layout
    counts, matrices = layer_parameters(shape, layer), layer_matrix_parameters(shape, layer)
    attention = attention_rank_matrices(shape, layout.tp)
    split = (matrices.get("dense_mlp", 0) + matrices.get("shared_experts", 0) + matrices.get("mtp", 0)) / layout.tp
    vectors = counts["attention"] - matrices["attention"]  # biases and sinks: few, and most of them split like the heads
    return RankParameters(
        matrices=attention + split,
        experts=counts["experts"] / (layout.ep * layout.etp),
        rest=counts["router"] + counts["norms"] + vectors / layout.tp,
    )


def attention_rank_matrices(shape: ModelShape, tp: int) -> float:
    """Parameters of one layer's attention projections on each of tp ranks."""
    hidden, mla = shape.hidden_size, shape.mla
    if mla is None:
        return hidden * shape.head_dim * (2 * shape.num_heads / tp + 2 * max(shape.num_kv_heads / tp, 1))
    down = hidden * (mla.q_rank + mla.kv_rank + mla.rope_dim)
    query_up = (mla.q_rank or hidden) * shape.num_heads * (mla.nope_dim + mla.rope_dim)
    key_value_up = mla.kv_rank * shape.num_heads * (mla.nope_dim + mla.value_dim)
    output = shape.num_heads * mla.value_dim * hidden
    return down + (query_up + key_value_up + output) / tp


def rank_parameters(run: PlannedRun, stage: Stage) -> RankParameters:
    """Of all that a pipeline rank holds. With DualPipe that is two stages, every layer being on two ranks."""
    shape, tp = run.shape, run.layout.tp
    vocabulary_matrix = shape.vocab_size * shape.hidden_size / tp
    matrices = stage.has_embedding + (stage.has_head and not (shape.tie_embeddings and stage.has_embedding))
    rest = matrices * vocabulary_matrix + (shape.hidden_size if stage.has_head else 0)
    total = RankParameters(0.0, 0.0, rest)
    for layers in alike_layers(run, stage):
        total = total.plus(layer_rank_parameters(run, layers.example), layers.count)
    return total


def replicas(run: PlannedRun) -> tuple[int, int]:
    """Ranks over which optimizer states (with FSDP: all states) are sharded: of dense and of expert parameters."""
    directions = 2 if run.layout.schedule == "dualpipe" and run.layout.pp > 1 else 1
    return run.layout.dp * run.layout.cp * directions, run.edp * directions


def master_bytes(training: TrainingPlan) -> int:
    """Of the optimizer's own copy of a weight; 0 where it updates the weight itself."""
    return MASTER_BYTES if training.master_weights and training.weights_dtype_bytes < MASTER_BYTES else 0


def state_bytes_per_parameter(run: PlannedRun) -> tuple[StateBytes, StateBytes]:
    """Of a dense and of an expert parameter on the rank that holds it, without copies in FP8 (`fp8_copy_bytes`).

    ZeRO-1 (Megatron's distributed optimizer): weights and gradients whole, master weights and Adam's moments sharded:
    2 + 4 + 12 / replicas by default; with bf16 gradients and moments 2 + 2 + 8 / replicas. FSDP shards all of it.
    An offloaded optimizer keeps its states and an fp32 copy of its shard's gradients in the host's memory.
    """
    training = run.training
    states = master_bytes(training) + 2 * training.moment_dtype_bytes
    found = []
    for shards in replicas(run):
        held = shards if training.fsdp else 1
        on_device = 0.0 if training.offload_optimizer else states / shards
        host = (states + 4) / shards if training.offload_optimizer else 0.0
        found.append(StateBytes(training.weights_dtype_bytes / held, training.gradient_dtype_bytes / held, on_device, host))
    return found[0], found[1]


def fp8_copy_bytes(run: PlannedRun) -> int:
    """Bytes that each parameter of a layer's matrices takes beyond its weight, for FP8 products.

    Hopper's FP8 tensor cores read both operands along the summed dimension, so the forward and the input-gradient product need
    the weight and its transpose. Transformer Engine casts both once an optimizer step and keeps them beside 16-bit weights;
    where the weights themselves are FP8 (fp8_param_gather, weights_dtype_bytes=1) only the transpose is added
    (NVIDIA/TransformerEngine, transformer_engine/pytorch/module/base.py, get_weight_workspace). FSDP gathers, casts and drops.
    """
    training = run.training
    if not training.precision.startswith("fp8") or training.fsdp:
        return 0
    return FP8_COPY_BYTES if training.weights_dtype_bytes == 1 else 2 * FP8_COPY_BYTES


def rank_state_bytes(run: PlannedRun, stage: Stage) -> StateBytes:
    """Bytes of a pipeline rank's weights, gradients and optimizer states."""
    parameters = rank_parameters(run, stage)
    dense, expert = state_bytes_per_parameter(run)
    copies = fp8_copy_bytes(run) * (parameters.matrices + parameters.experts)
    if run.training.weights_dtype_bytes == 1:  # of what stays in 16 bits
        copies += parameters.rest * dense.weights
    return StateBytes(
        weights=dense.weights * parameters.dense + expert.weights * parameters.experts + copies,
        gradients=dense.gradients * parameters.dense + expert.gradients * parameters.experts,
        optimizer=dense.optimizer * parameters.dense + expert.optimizer * parameters.experts,
        host=dense.host * parameters.dense + expert.host * parameters.experts,
    )


def gradient_placeholder_bytes(run: PlannedRun, stage: Stage) -> float:
    """Where products add weights' gradients to the main gradients themselves, autograd still wants a tensor for each weight:
    one of 16 bits for each shape of weight, kept for good (Transformer Engine's get_dummy_wgrad; Megatron's own head makes one
    too). Not with FSDP, whose gradients go through autograd.
    """
    if run.training.fsdp:
        return 0.0
    shape, layout = run.shape, run.layout
    sizes = set()
    for layers in alike_layers(run, stage):
        if shape.kind(layers.example) == "dense":
            width = shape.dense_intermediate_size / layout.tp
        else:
            width = shape.moe.expert_intermediate_size / layout.etp
            sizes.add(3 * shape.hidden_size * shape.moe.shared_intermediate_size / layout.tp)
        sizes.add(3 * shape.hidden_size * width)
        sizes.add(attention_rank_matrices(shape, layout.tp))
    head = shape.vocab_size * shape.hidden_size / layout.tp if stage.has_head else 0
    return 2 * (sum(sizes) + head)
