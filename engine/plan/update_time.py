"""The end of an optimizer step: gradients and weights between data-parallel ranks, the gradients' norm, Adam."""

from collections.abc import Iterator

from .collectives import Axis, Transfer, collective_seconds, members_per_node, wire_bytes
from .efficiency import memory_bound_seconds
from .layer_exchange import collective, hidden_seconds
from .layer_time import QUANTIZE_BYTES, Work
from .run import PlannedRun, Stage
from .states import RankParameters, master_bytes, rank_parameters, replicas

HOST_MEMORY_BYTES_PER_SECOND = 45e9
"""A GPU's share of its host's memory: eight channels of DDR5-4800 a socket, two sockets for eight GPUs (DGX H100 user guide:
614 GB/s in all), of which streaming code gets about 60%."""


def data_parallel_transfers(work: Work, stage: Stage, forward_seconds: float, backward_seconds: float) -> list[Transfer]:
    """Reduce-scatter of a rank's gradients and all-gather of its weights, once a step (ZeRO-1, or FSDP with a pipeline, which
    keeps gathered weights through the step).

    With overlap_data they run beside the passes of the last and the first micro-batch of this length; the part that can't be
    hidden is one layer's: the last gradients exist only at the end, the first weights are needed at once.
    """
    training = work.run.training
    held = rank_parameters(work.run, stage)
    gathered_bytes = training.gathered_weight_bytes if training.fsdp else training.weights_dtype_bytes
    transfers = []
    for axis, parameters in (("zero", held.dense), ("edp", held.experts)):
        if not parameters:
            continue
        for kind, dtype_bytes, beside in (
            ("reduce_scatter", training.gradient_dtype_bytes, backward_seconds),
            ("all_gather", gathered_bytes, forward_seconds),
        ):
            sent, seconds = collective(work, axis, kind, parameters * dtype_bytes)
            if not seconds:
                continue
            share = parameters / held.total  # dense and expert weights wait for the same passes
            pieces = max(1, len(stage.layers))
            hidden = hidden_seconds(work, seconds * (1 - 1 / pieces), beside * share) if training.overlap_data else 0.0
            transfers.append(Transfer(axis, kind, sent, 1, seconds, seconds - hidden))
    if holds_shared_embedding(work.run, stage):
        layout, shape = work.run.layout, work.run.shape
        gradient_bytes = training.gradient_dtype_bytes * shape.vocab_size * shape.hidden_size / layout.tp
        near = 2 if members_per_node(layout, "pp", work.device.gpus_per_node) == layout.pp else 1
        seconds = collective_seconds(work.device, "all_reduce", gradient_bytes, 2, near)
        transfers.append(Transfer("pp", "all_reduce", wire_bytes("all_reduce", gradient_bytes, 2), 1, seconds, seconds))
    return transfers


def holds_shared_embedding(run: PlannedRun, stage: Stage) -> bool:
    """Whether another pipeline rank holds the same embedding: as a tied head, or for the input of MTP modules.

    Their gradients are summed after the last backward pass (Megatron-LM: the embedding group). DualPipe's ranks of both ends
    hold both, and their sum is the data-parallel one.
    """
    if run.layout.schedule == "dualpipe" or not (stage.has_embedding or stage.has_head):
        return False
    holders = [one for one in run.stages() if one.has_embedding or (one.has_head and run.shape.tie_embeddings)]
    return len(holders) > 1 and stage in holders


def optimizer_seconds(work: Work, stage: Stage) -> float:
    """Adam on a rank's shard, by the bytes it moves: gradients are cleared and their squares summed, then gradient, weight (its
    fp32 master where there is one) and both moments are read, the last three written, and with a master the weight too.
    Offloaded, the same happens in the host's memory, with gradients and weights over PCIe."""
    return sum(seconds for _, seconds in _update_steps(work, stage))


def _update_steps(work: Work, stage: Stage) -> Iterator[tuple[str, float]]:
    training, device = work.run.training, work.device
    held = rank_parameters(work.run, stage)
    dense_shards, expert_shards = replicas(work.run)
    shard = held.dense / dense_shards + held.experts / expert_shards
    kept = shard if work.run.gathers_in_every_pass else held.total
    gradient = training.gradient_dtype_bytes
    master, weight = master_bytes(training), training.weights_dtype_bytes
    weight_moved = 2 * master + weight if master else 2 * weight
    update_bytes = shard * (gradient + weight_moved + 4 * training.moment_dtype_bytes)
    yield "clear", memory_bound_seconds(device, kept * gradient)
    yield "norm", memory_bound_seconds(device, 2 * shard * gradient) + 2 * collective(work, _widest(work), "all_reduce", 8)[1]
    if training.offload_optimizer:
        yield "copy", shard * (gradient + weight) / device.pcie_bytes_per_second
        yield "update", update_bytes / HOST_MEMORY_BYTES_PER_SECOND
    else:
        yield "update", memory_bound_seconds(device, update_bytes)
    if training.precision in QUANTIZE_BYTES and not work.run.gathers_in_every_pass:  # the weights, once a step
        quantized = held.matrices + held.experts
        yield "quantise", memory_bound_seconds(device, QUANTIZE_BYTES[training.precision].forward * quantized)


def gathered_cast_seconds(work: Work, held: RankParameters) -> float:
    """Of casting weights to FP8 that FSDP gathered for one pass in a wider type and drops after it."""
    training = work.run.training
    if training.precision not in QUANTIZE_BYTES or training.gathered_weight_bytes == 1 or not held.matrices + held.experts:
        return 0.0
    cast_bytes = QUANTIZE_BYTES[training.precision].forward * (held.matrices + held.experts)
    return memory_bound_seconds(work.device, cast_bytes)


def _widest(work: Work) -> Axis:
    """The axis with the most ranks: the norm's sum crosses all of them, and the farthest takes longest."""
    layout = work.run.layout
    return "pp" if layout.pp > layout.dp * layout.cp else "zero"
