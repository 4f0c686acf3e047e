"""Bytes and seconds of the collectives of a layout, over NVLink inside a node and one network card a GPU between nodes."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ..config import Layout
from .devices import DeviceFacts
from .run import Dispatcher
from .shape import MoeShape

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "broadcast"]
Axis = Literal["tp", "cp", "dp", "pp", "ep", "etp", "edp", "zero"]
RankOrder = Literal["tp-cp-dp-pp", "tp-cp-pp-dp"]
"""Axes of the rank grid, fastest first. tp-cp-dp-pp: pipeline stages are whole nodes apart, so that the members of a data- or
expert-parallel group are neighbours (Megatron's order, which the published rows were run with). tp-cp-pp-dp:
engine.parallel.mesh's grid, in which a group of experts is spread over pp times as many nodes."""

NVLINK_FRACTION = 0.82
"""Bus bandwidth of rings over the stated NVLink bandwidth: about 370 of 450 GB/s on 8 H100 (nccl-tests issues)."""
NVLS_FRACTION = 1.05
"""The same of all-reduces that the switch sums: 475 of 450 GB/s (NCCL's bus bandwidth counts bytes that NVLS doesn't send)."""
NIC_FRACTION = 0.94
"""Achieved of a network card's stated bandwidth: 46-48 of 50 GB/s (nccl-tests issues)."""
NODE_LATENCY_SECONDS = 10e-6
"""Of a collective inside a node: launch and synchronisation (NCCL 2.29 on 8 H100: 7-16 us)."""
HOP_SECONDS = 6e-6
"""Of one more node in a ring, or one more level in a tree."""
ALLTOALL_HOST_SECONDS = 60e-6
"""The host waits for the counts of tokens before it can start an NCCL all-to-all of uneven parts."""
DEEPEP_NOTIFY_SECONDS = 40e-6
"""DeepEP's exchange of counts."""
DEEPEP_NIC_FRACTION = 0.88
"""44 of 50 GB/s: DeepEP README, EP32 and EP64, less the tokens that stay in the node."""
DEEPEP_NVLINK_FRACTION = 0.78
"""153-158 of 200 GB/s on H800: DeepEP README, EP8."""


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in one step, seen from one rank."""

    axis: Axis
    kind: str
    """A CollectiveKind, or dispatch / combine of experts."""
    bytes_per_rank: float
    """Sent by one rank, all `count` together."""
    count: int
    seconds: float
    """Duration of all of them."""
    exposed_seconds: float
    """What of it no computation hides."""


def wire_bytes(kind: CollectiveKind, payload_bytes: float, group_size: int) -> float:
    """Bytes that each rank sends (the mean over ranks) in a bandwidth-optimal algorithm.

    `payload_bytes`: all_reduce, broadcast: the tensor; all_gather: the gathered result; reduce_scatter: the whole input;
    all_to_all: what one rank holds before (its own share stays); send_recv: the message.
    """
    share = (group_size - 1) / group_size
    return payload_bytes * {"all_reduce": 2 * share, "send_recv": 1.0}.get(kind, share)


def collective_seconds(
    device: DeviceFacts, kind: CollectiveKind, payload_bytes: float, group_size: int, ranks_per_node_in_group: int
) -> float:
    """Seconds of one collective; payload as in `wire_bytes`; 0 for a group of one.

    Rings and trees over several nodes enter and leave a node by the card of each member, so that g members share a node's
    traffic; an all-to-all's remote part leaves by each rank's own card. send_recv is between nodes unless the group fits one.
    """
    if group_size == 1:
        return 0.0
    nodes = math.ceil(group_size / ranks_per_node_in_group)
    sent_bytes = wire_bytes(kind, payload_bytes, group_size)
    nvlink = device.nvlink_bytes_per_second * NVLINK_FRACTION
    nic = device.nic_bytes_per_second * NIC_FRACTION
    if nodes == 1:
        summed = kind == "all_reduce" and device.in_network_reduction and group_size > 2
        bandwidth = device.nvlink_bytes_per_second * NVLS_FRACTION if summed else nvlink
        return NODE_LATENCY_SECONDS + sent_bytes / bandwidth
    if kind == "send_recv":
        return NODE_LATENCY_SECONDS + HOP_SECONDS + sent_bytes / nic
    if kind == "all_to_all":
        remote = payload_bytes * (group_size - ranks_per_node_in_group) / group_size
        local = payload_bytes * (ranks_per_node_in_group - 1) / group_size
        return NODE_LATENCY_SECONDS + HOP_SECONDS * math.log2(nodes) + max(remote / nic, local / nvlink)
    hops = 2 * math.log2(nodes) if kind == "all_reduce" else nodes - 1
    return NODE_LATENCY_SECONDS + HOP_SECONDS * hops + sent_bytes / min(nvlink, ranks_per_node_in_group * nic)


def members_per_node(layout: Layout, axis: Axis, gpus_per_node: int, order: RankOrder = "tp-cp-dp-pp") -> int:
    """How many members of one group of this axis share a node (the fullest node, where they don't divide evenly).

    The experts of one pipeline stage fold over its dp x cp x tp ranks: etp fastest, then ep, then edp. zero: the ranks over
    which dense optimizer states are sharded, dp x cp.
    """
    inner = layout.cp * layout.tp
    stage = max(layout.dp, 1) * inner
    size, stride = {
        "tp": (layout.tp, 1),
        "cp": (layout.cp, layout.tp),
        "dp": (max(layout.dp, 1), inner),
        "zero": (stage // layout.tp, layout.tp),
        "pp": (layout.pp, inner if order == "tp-cp-pp-dp" else stage),
        "etp": (layout.etp, 1),
        "ep": (layout.ep, layout.etp),
        "edp": (stage // (layout.ep * layout.etp), layout.ep * layout.etp),
    }[axis]
    members = range(0, size * stride, stride)
    if order == "tp-cp-pp-dp" and axis != "pp":  # a stage's ranks are not consecutive: inner of every pp * inner
        members = [index // inner * layout.pp * inner + index % inner for index in members]
    return max(Counter(rank // gpus_per_node for rank in members).values())


def expected_places(moe: MoeShape, places: int) -> float:
    """Mean number of distinct places (GPUs or nodes, each holding an equal share of the experts) that a token visits.

    Exact for uniform routing: top_k of num_experts without replacement, out of top_groups of num_groups groups.
    """
    chosen = moe.num_experts * moe.top_groups // moe.num_groups  # experts in the groups that a token may use
    per_place = moe.num_experts // places
    group_size = moe.num_experts // moe.num_groups
    ways = math.comb(chosen, moe.top_k)
    if per_place <= group_size:
        missed = math.comb(chosen - per_place, moe.top_k) / ways
        return places * moe.top_groups / moe.num_groups * (1 - missed)
    groups = per_place // group_size  # whole groups a place
    missed = sum(
        math.comb(groups, j)
        * math.comb(moe.num_groups - groups, moe.top_groups - j)
        / math.comb(moe.num_groups, moe.top_groups)
        * math.comb(chosen - j * group_size, moe.top_k)
        / ways
        for j in range(min(groups, moe.top_groups) + 1)
    )
    return places * (1 - missed)


def dispatch_seconds(
    device: DeviceFacts,
    tokens: float,
    hidden: int,
    moe: MoeShape,
    ep: int,
    ranks_per_node_in_group: int,
    dtype_bytes: float,
    dispatcher: Dispatcher,
) -> float:
    """Seconds in which each of `ep` ranks sends its `tokens` (of this rank) to their experts. 0 where ep is 1.

    alltoall: NCCL moves every one of the top_k copies. deepep, hybridep: a token goes to each distinct node once, by network,
    and there to each distinct GPU by NVLink (DeepEP README; DeepSeek-V3, arXiv 2412.19437, section 3.2.2).
    """
    if ep == 1:
        return 0.0
    token_bytes = hidden * dtype_bytes
    if dispatcher == "alltoall":
        payload_bytes = tokens * moe.top_k * token_bytes
        return ALLTOALL_HOST_SECONDS + collective_seconds(device, "all_to_all", payload_bytes, ep, ranks_per_node_in_group)
    nodes = max(1, ep // ranks_per_node_in_group)
    remote_bytes = tokens * token_bytes * expected_places(moe, nodes) * (nodes - 1) / nodes
    nvlink_bytes = tokens * token_bytes * expected_places(moe, ep)
    network_seconds = remote_bytes / (device.nic_bytes_per_second * DEEPEP_NIC_FRACTION)
    nvlink_seconds = nvlink_bytes / (device.nvlink_bytes_per_second * DEEPEP_NVLINK_FRACTION)
    return DEEPEP_NOTIFY_SECONDS + max(network_seconds, nvlink_seconds)


def combine_seconds(
    device: DeviceFacts,
    tokens: float,
    hidden: int,
    moe: MoeShape,
    ep: int,
    ranks_per_node_in_group: int,
    dtype_bytes: float,
    dispatcher: Dispatcher,
) -> float:
    """Seconds of the way back: as many bytes as `dispatch_seconds` with the same arguments (dtype_bytes is 2 for bf16)."""
    return dispatch_seconds(device, tokens, hidden, moe, ep, ranks_per_node_in_group, dtype_bytes, dispatcher)
