"""What one pipeline rank says to others while a micro-batch passes a layer, and how much of it computation hides."""

from dataclasses import dataclass, replace
from typing import Literal

from .collectives import (
    Axis,
    CollectiveKind,
    collective_seconds,
    expected_places,
    expert_exchange_seconds,
    members_per_node,
    wire_bytes,
)
from .layer_time import Operation, Work, is_recomputed
from .run import Dispatcher, RecomputePart
from .shape import MoeShape
from .states import RankParameters, replicas

DISPATCHER_MULTIPROCESSORS: dict[Dispatcher, int] = {"alltoall": 16, "deepep": 20, "hybridep": 32}
"""Held while tokens travel: NCCL's channels; DeepEP's default (DeepSeek-V3, arXiv 2412.19437, section 3.2.2: 20 of 132); those
given to HybridEP in Megatron Bridge's H100 recipes."""
NCCL_MULTIPROCESSORS = 16
"""Held by the channels of other collectives."""


@dataclass(frozen=True)
class Exchange:
    """A collective of one layer and micro-batch."""

    axis: Axis
    kind: str
    """A CollectiveKind, or dispatch / combine."""
    direction: Literal["forward", "backward"]
    sent_bytes: float
    """By this rank."""
    seconds: float
    exposed_seconds: float
    """What nothing inside the layer hides."""
    count: int = 1


def contention_share(work: Work, multiprocessors: int) -> float:
    """By how much computation slows down beside a transfer that holds this many multiprocessors."""
    return multiprocessors / (work.device.streaming_multiprocessors - multiprocessors)


def layer_exchanges(
    work: Work, layer: int, operations: dict[str, Operation], recompute: tuple[RecomputePart, ...] = ()
) -> list[Exchange]:
    """Forward and backward exchanges of a layer, those of what is recomputed among the backward ones."""
    shape, layout = work.run.shape, work.run.layout
    whole = "layer" in recompute
    exchanges: list[Exchange] = []
    if layout.tp > 1:
        exchanges += _tensor_parallel(work, layer, operations, recompute)
    if layout.cp > 1:
        exchanges += _repeated(_context_parallel(work, operations), whole or "core_attention" in recompute)
    if shape.kind(layer) == "moe":
        exchanges += _repeated(_expert_parallel(work, shape.moe, operations), whole or "experts" in recompute)
    return exchanges


def _repeated(exchanges: list[Exchange], recomputed: bool) -> list[Exchange]:
    again = [one for one in exchanges if one.direction == "forward"] if recomputed else []
    return exchanges + [replace(one, direction="backward") for one in again]


def collective(work: Work, axis: Axis, kind: CollectiveKind, payload_bytes: float) -> tuple[float, float]:
    """(bytes sent, seconds) of one collective over all ranks of an axis; payload as in `collectives.wire_bytes`."""
    size = axis_size(work, axis)
    near = members_per_node(work.run.layout, axis, work.device.gpus_per_node)
    return wire_bytes(kind, payload_bytes, size), collective_seconds(work.device, kind, payload_bytes, size, near)


def axis_size(work: Work, axis: Axis) -> int:
    """Ranks of one group of this axis."""
    dense_replicas, expert_replicas = replicas(work.run)  # twice as many with DualPipe, which holds every layer twice
    return {"zero": dense_replicas, "edp": expert_replicas}.get(axis) or getattr(work.run.layout, axis)


def _tensor_parallel(
    work: Work, layer: int, operations: dict[str, Operation], recompute: tuple[RecomputePart, ...]
) -> list[Exchange]:
    """Megatron's f and g (arXiv 1909.08053; with sequence parallel all-gather and reduce-scatter, arXiv 2205.05198).

    Those of a product that is recomputed are repeated with it. "every_second_product" repeats none: torchtitan's policy saves
    what a reduce-scatter returns, and its second gathering of an input is the one that `column` has in the backward pass.
    """
    shape = work.run.shape
    wide = work.element_bytes * work.tokens * shape.hidden_size
    columns, rows = {}, {"attention_output": wide}  # bytes by product
    if shape.mla is None:
        columns["qkv"] = wide
    else:
        latent = work.element_bytes * work.tokens
        if shape.mla.q_rank:
            columns["q_up"] = latent * shape.mla.q_rank
        else:
            columns["q"] = wide
        columns["kv_up"] = latent * (shape.mla.kv_rank + shape.mla.rope_dim)
    name = "dense" if shape.kind(layer) == "dense" else "shared"
    if f"{name}_down" in operations:
        columns[f"{name}_gate_up"] = rows[f"{name}_down"] = wide
    exchanges: list[Exchange] = []
    for cut, payloads in ((column, columns), (row, rows)):
        for product, payload_bytes in payloads.items():
            operation = operations[product]
            exchanges += _repeated(cut(work, payload_bytes, operation), is_recomputed(operation, recompute))
    return exchanges


def column(work: Work, payload_bytes: float, product: Operation) -> list[Exchange]:
    """Of a product whose output columns are divided over tp: its input is gathered, its input's gradient summed.

    Backward, the sum runs beside the weight gradient and the second gathering of the input beside the input gradient.
    """
    if not work.run.layout.sp:
        return [_beside(work, "all_reduce", "backward", payload_bytes, product.backward_weight_seconds)]
    return [
        _in_pieces(work, "all_gather", "forward", payload_bytes, product.forward_seconds),
        _beside(work, "all_gather", "backward", payload_bytes, product.backward_input_seconds),
        _beside(work, "reduce_scatter", "backward", payload_bytes, product.backward_weight_seconds),
    ]


def row(work: Work, payload_bytes: float, product: Operation) -> list[Exchange]:
    """Of a product whose input columns are divided over tp: its output is summed, its output's gradient gathered."""
    if not work.run.layout.sp:
        return [_beside(work, "all_reduce", "forward", payload_bytes, 0.0)]
    return [
        _in_pieces(work, "reduce_scatter", "forward", payload_bytes, product.forward_seconds),
        _in_pieces(work, "all_gather", "backward", payload_bytes, product.backward_input_seconds),
    ]


def _in_pieces(
    work: Work, kind: CollectiveKind, direction: Literal["forward", "backward"], payload_bytes: float, product_seconds: float
) -> Exchange:
    """overlap_tensor: product and collective in tp pieces; the first (last) piece of the collective has nothing beside it."""
    tp = work.run.layout.tp
    sent, seconds = collective(work, "tp", kind, payload_bytes)
    hidden = min(seconds, product_seconds) * (1 - 1 / tp) if work.run.training.overlap_tensor else 0.0
    return Exchange("tp", kind, direction, sent, seconds, seconds - hidden)


def _beside(
    work: Work, kind: CollectiveKind, direction: Literal["forward", "backward"], payload_bytes: float, product_seconds: float
) -> Exchange:
    """A collective that runs beside a whole product and slows it down."""
    sent, seconds = collective(work, "tp", kind, payload_bytes)
    return Exchange("tp", kind, direction, sent, seconds, seconds - hidden_seconds(work, seconds, product_seconds))


def hidden_seconds(work: Work, seconds: float, compute_seconds: float) -> float:
    """Of a collective beside computation of this length, the seconds that don't prolong it: the collective's channels hold
    multiprocessors, so computation beside it is slower."""
    return min(compute_seconds, seconds / (1 + contention_share(work, NCCL_MULTIPROCESSORS)))


def _context_parallel(work: Work, operations: dict[str, Operation]) -> list[Exchange]:
    """Ring: keys and values travel to the next rank cp - 1 times beside attention (backward their gradients too).
    Ulysses: queries, keys, values and the output are exchanged between heads and tokens, one after another (arXiv 2309.14509);
    of keys and values each rank gets all tokens of at least one head, however few there are."""
    shape, layout = work.run.shape, work.run.layout
    if shape.mla is not None:
        heads = shape.num_heads // layout.tp
        query = key = heads * (shape.mla.nope_dim + shape.mla.rope_dim)
        value = output = heads * shape.mla.value_dim
    else:
        query = output = shape.num_heads // layout.tp * shape.head_dim
        key = value = work.run.attended_kv_heads * shape.head_dim
    width_bytes = work.element_bytes * work.tokens
    core = operations["core_attention"]
    exchanges = []
    for direction, beside, tensors in (("forward", core.forward_seconds, 1), ("backward", core.backward_input_seconds, 2)):
        if layout.cp_kind == "ulysses":
            each = [collective(work, "cp", "all_to_all", width_bytes * width) for width in (query, key, value, output)]
            sent, seconds = map(sum, zip(*each, strict=True))
            exchanges.append(Exchange("cp", "all_to_all", direction, sent, seconds, seconds, len(each)))
            continue
        hops = layout.cp - 1
        sent, seconds = collective(work, "cp", "send_recv", tensors * width_bytes * (key + value))
        exposed = hops * (seconds - hidden_seconds(work, seconds, beside / layout.cp))
        exchanges.append(Exchange("cp", "send_recv", direction, hops * sent, hops * seconds, exposed, hops))
    return exchanges


def _expert_parallel(work: Work, moe: MoeShape, operations: dict[str, Operation]) -> list[Exchange]:
    """Tokens to their experts and back; each tensor-parallel rank sends its share of them. Nothing in the layer hides it."""
    shape, layout, training, device = work.run.shape, work.run.layout, work.run.training, work.device
    exchanges: list[Exchange] = []
    if layout.ep > 1:
        near = members_per_node(layout, "ep", device.gpus_per_node)
        tokens = work.tokens / layout.tp
        for direction in ("forward", "backward"):
            for kind, dtype_bytes in (
                ("dispatch", 1 if training.dispatch_dtype_bytes == 1 else work.element_bytes),
                ("combine", work.element_bytes),
            ):
                seconds = training.expert_imbalance * expert_exchange_seconds(
                    device, tokens, shape.hidden_size, moe, layout.ep, near, dtype_bytes, training.dispatcher
                )
                copies = moe.top_k if training.dispatcher == "alltoall" else expected_places(moe, layout.ep)
                sent = tokens * copies * shape.hidden_size * dtype_bytes * (layout.ep - 1) / layout.ep
                exchanges.append(Exchange("ep", kind, direction, sent, seconds, seconds))
    if layout.etp > 1:
        payload = work.element_bytes * work.routed_rows * shape.hidden_size
        for direction in ("forward", "backward"):
            for kind in ("all_gather", "reduce_scatter"):
                sent, seconds = collective(work, "etp", kind, payload)
                exchanges.append(Exchange("etp", kind, direction, sent, seconds, seconds))
    return exchanges


def embedding_exchanges(work: Work) -> list[Exchange]:
    """Of an embedding whose vocabulary is divided over tp: each rank looks up its own tokens, the outputs are summed."""
    if work.run.layout.tp == 1:
        return []
    payload = work.element_bytes * work.tokens * work.run.shape.hidden_size
    if not work.run.layout.sp:
        return [_beside(work, "all_reduce", "forward", payload, 0.0)]
    return [
        _beside(work, "reduce_scatter", "forward", payload, 0.0),
        _beside(work, "all_gather", "backward", payload, 0.0),
    ]


def gathered_weights(
    work: Work, held: RankParameters, others: list[Exchange], busy_seconds: dict[Literal["forward", "backward"], float]
) -> list[Exchange]:
    """FSDP: a layer's weights are gathered before each of its passes and its gradients scattered after the backward one, with
    overlap_data beside the same pass of its neighbours.

    `busy_seconds`: of a pass without exchanges, the GPU's waits for its CPU included. `others`: the pass's other exchanges.
    While it waits for those, weights can travel too, unless they need the same link.
    """
    training = work.run.training
    of_weights = _leaves_node(work, "zero")
    sharded: tuple[tuple[Axis, float], ...] = (("zero", held.dense), ("edp", held.experts))
    transfers = [
        (axis, kind, direction, *collective(work, axis, kind, count * dtype_bytes))
        for axis, count in sharded
        if count
        for kind, direction, dtype_bytes in (
            ("all_gather", "forward", training.gathered_weight_bytes),
            ("all_gather", "backward", training.gathered_weight_bytes),
            ("reduce_scatter", "backward", training.gradient_dtype_bytes),
        )
    ]
    exchanges = []
    for direction, beside in busy_seconds.items():
        here = [one for one in transfers if one[2] == direction]
        total = sum(seconds for *_, seconds in here)
        for other in others:
            if other.direction == direction:
                hidden_by_pairs = work.run.pairs_passes and other.axis in ("ep", "etp")
                beside += 0.0 if hidden_by_pairs else other.exposed_seconds
                beside -= other.seconds if _leaves_node(work, other.axis) == of_weights else 0.0
        hidden = hidden_seconds(work, total, max(beside, 0.0)) if training.overlap_data else 0.0
        exchanges += [
            Exchange(axis, kind, direction, sent, seconds, (total - hidden) * seconds / total)
            for axis, kind, _, sent, seconds in here
            if seconds
        ]
    return exchanges


def _leaves_node(work: Work, axis: Axis) -> bool:
    """Whether the axis's groups need the network rather than NVLink alone."""
    return axis_size(work, axis) > members_per_node(work.run.layout, axis, work.device.gpus_per_node)
