"""Bytes and seconds of the collectives of a layout: NVLink inside a node, one network card a GPU between nodes.

A collective takes its latency (launch, and one hop after another), its bytes over the slowest link, and what passing the bytes
on in pieces costs: with the best size of a piece, 2 sqrt(transfer x fill). Fitted on nccl 2.29 of aiconfigurator-core 0.12.0
(systems/data/h100_sxm/comm; its message_size counts elements: 2^28 of them as bytes would give half of the bus bandwidth that
everybody measures): error 6% median, 22% 90th percentile; from 32 MB on 5% / 10%. The same constants on H200 8% / 21%, and with
their own latencies A100 12% / 29%, B200 11% / 33%. Between nodes: the sources beside each constant.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ..config import Layout
from .devices import Architecture, DeviceFacts
from .run import Dispatcher
from .shape import MoeShape

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]
Axis = Literal["tp", "cp", "dp", "pp", "ep", "etp", "edp", "zero"]

START_SECONDS: dict[Architecture, float] = {"ampere": 9e-6, "hopper": 5e-6, "h20": 5e-6, "blackwell": 9e-6}
"""From a collective's launch until its first byte moves."""
NVLINK_HOP_SECONDS = 0.75e-6
"""From one GPU to the next in a ring, small messages."""
NETWORK_HOP_SECONDS = 4.5e-6
"""From one node to the next. An all-reduce of 8 bytes takes 63 us on 32 nodes of 8 A100 (nccl issue #652); 3-4 us of a hop are
the network's own (arXiv 2505.09343, table 5)."""
FILL_SECONDS = 2.5e-6
"""Of filling a pipeline of pieces inside a node, and ..."""
NETWORK_FILL_SECONDS = 0.5e-6
"""... for each rank of a group over several nodes: reduce-scatter's bus bandwidth falls from 360 GB/s on 4 nodes of 8 H100 to
260 on 128 (nccl issue #1229)."""
RING_FRACTION = 0.80
"""Bandwidth of a ring over the stated NVLink bandwidth, for large messages."""
PAIR_FRACTION = 0.64
"""The same between two GPUs, which can't use all links of the switch."""
SWITCH_FRACTION = 1.13
"""Bus bandwidth of an all-reduce of a whole node that the switch sums (NVLS), over that of NVLink: each GPU sends and receives
its tensor once, but nccl-tests counts 2 (n - 1) / n of it."""
SWITCH_FILL_SECONDS = 7.6e-6
"""Of filling that all-reduce."""
NETWORK_FRACTION = 0.93
"""Achieved of a network card: 46-48 of 50 GB/s (nccl-tests issues #272, #290)."""

DEEPEP_START_SECONDS = 45e-6
"""Of a dispatch or combine beside its bytes (wideep_deepep_normal of the tables above: 38 and 60 us), without the host's wait
for the counts of tokens."""
DEEPEP_NETWORK_FRACTION = 0.88
"""Of a card, by the tokens that leave the node. DeepEP docs/legacy.md, H800: 58 GB/s at EP32 and 51 at EP64 with those that
stay, 43.5 and 44.6 without; README (V2), H100: 45 and 46."""
DEEPEP_NVLINK_FRACTION = 0.66
"""Of NVLink, by the tokens that leave a GPU, with 20 multiprocessors. DeepEP's 153 / 158 GB/s at EP8 on H800 without the tokens
that stay are 134 / 138 of 200; the tables above have 285 of 450 GB/s on H100."""
BESIDE_COMPUTE_FRACTION = 0.66
"""Of these bandwidths while the same GPUs compute: in the DualPipe trace (deepseek-ai/profile-data, H800, EP64) a combine takes
6.18 ms and a cached dispatch 3.4 ms; alone they would take 4.3 and 2.2."""
LOW_LATENCY_START_SECONDS = 12.5e-6
LOW_LATENCY_NETWORK_START_SECONDS = 37e-6
"""DeepEP's low-latency kernels, inside a node (wideep_deepep_ll of the tables above) and between nodes (docs/legacy.md)."""
LOW_LATENCY_NVLINK_FRACTION = 0.5
"""Of NVLink in the low-latency kernels inside a node; assumed, below the normal kernels' share."""


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

    `payload_bytes`: all_reduce: the tensor; all_gather: the gathered result; reduce_scatter: the whole input;
    all_to_all: what one rank holds before (its own share stays); send_recv: the message.
    """
    share = (group_size - 1) / group_size
    return payload_bytes * {"all_reduce": 2 * share, "send_recv": min(1, group_size - 1)}.get(kind, share)


def collective_seconds(
    device: DeviceFacts, kind: CollectiveKind, payload_bytes: float, group_size: int, ranks_per_node_in_group: int
) -> float:
    """Seconds of one collective; payload as in `wire_bytes`; 0 for a group of one.

    With g members a node, rings and trees spread a node's traffic over g cards (nccl issue #1250: an all-reduce over 2 nodes is
    twice as fast with 2 GPUs in each as with 1, and four times with 4); an all-to-all sends what leaves the node by each rank's
    own card (nccl-tests issue #130). send_recv is between nodes unless the whole group fits one.
    """
    if group_size == 1:
        return 0.0
    near = min(ranks_per_node_in_group, group_size)
    nodes = math.ceil(group_size / near)
    moved_seconds = _transfer_seconds(device, kind, payload_bytes, group_size, near, nodes)
    fill_seconds = (
        FILL_SECONDS if nodes == 1 else FILL_SECONDS + NETWORK_FILL_SECONDS * (2 if kind == "send_recv" else group_size)
    )
    if nodes == 1 and _switch_sums(device, kind, near):
        fill_seconds = SWITCH_FILL_SECONDS
    if kind in ("all_to_all", "send_recv"):
        hops, network_hops = 1, min(1, nodes - 1)
    elif kind == "all_reduce":  # NCCL's trees between nodes
        hops, network_hops = 2 * (near - 1), 2 * math.log2(nodes)
    else:
        hops, network_hops = nodes * (near - 1), nodes - 1
    latency_seconds = START_SECONDS[device.architecture] + hops * NVLINK_HOP_SECONDS + network_hops * NETWORK_HOP_SECONDS
    return latency_seconds + moved_seconds + 2 * math.sqrt(moved_seconds * fill_seconds)


def _transfer_seconds(
    device: DeviceFacts, kind: CollectiveKind, payload_bytes: float, group_size: int, near: int, nodes: int
) -> float:
    """Seconds of the bytes alone, over the slower of NVLink and the cards."""
    sent_bytes = wire_bytes(kind, payload_bytes, group_size)
    card = device.nic_bytes_per_second * NETWORK_FRACTION
    fraction = SWITCH_FRACTION if _switch_sums(device, kind, near) else PAIR_FRACTION if near == 2 else RING_FRACTION
    nvlink = device.nvlink_bytes_per_second * fraction
    if nodes == 1:
        return sent_bytes / (device.nvlink_bytes_per_second * PAIR_FRACTION if kind == "send_recv" else nvlink)
    if kind == "send_recv":
        return sent_bytes / card
    if kind == "all_to_all":
        remote, local = payload_bytes * (group_size - near) / group_size, payload_bytes * (near - 1) / group_size
        return max(remote / card, local / nvlink)
    if kind == "all_reduce":  # summed inside the node first, then only between nodes
        return max(sent_bytes / nvlink if near > 1 else 0.0, wire_bytes(kind, payload_bytes, nodes) / (near * card))
    return sent_bytes / min(nvlink, near * card)


def _switch_sums(device: DeviceFacts, kind: CollectiveKind, near: int) -> bool:
    return kind == "all_reduce" and device.in_network_reduction and near == device.gpus_per_node


def members_per_node(layout: Layout, axis: Axis, gpus_per_node: int) -> int:
    """How many members of one group of this axis share a node (the fullest node, where they don't divide evenly).

    The grid is that of engine.parallel.mesh and of Megatron: pp x dp x cp x tp, tp fastest. The experts of one
    pipeline stage fold over its dp x cp x tp ranks: etp fastest, then ep, then edp. zero: the ranks over which dense
    optimizer states are sharded, dp x cp.
    """
    inner = layout.cp * layout.tp
    stage = max(layout.dp, 1) * inner
    size, stride = {
        "tp": (layout.tp, 1),
        "cp": (layout.cp, layout.tp),
        "dp": (max(layout.dp, 1), inner),
        "zero": (stage // layout.tp, layout.tp),
        "pp": (layout.pp, stage),
        "etp": (layout.etp, 1),
        "ep": (layout.ep, layout.etp),
        "edp": (stage // (layout.ep * layout.etp), layout.ep * layout.etp),
    }[axis]
    return max(Counter(rank // gpus_per_node for rank in range(0, size * stride, stride)).values())


def expected_places(moe: MoeShape, places: int) -> float:
    """Mean number of distinct places (GPUs or nodes, each holding an equal share of the experts) that a token visits.

    Exact for uniform routing: top_k of num_experts without replacement, out of top_groups of num_groups groups.
    """
    group_size = moe.num_experts // moe.num_groups
    chosen = group_size * moe.top_groups  # experts in the groups that a token may use
    per_place = moe.num_experts // places
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


def expert_exchange_seconds(
    device: DeviceFacts,
    tokens: float,
    hidden: int,
    moe: MoeShape,
    ep: int,
    ranks_per_node_in_group: int,
    dtype_bytes: float,
    dispatcher: Dispatcher,
) -> float:
    """Seconds in which each of `ep` ranks sends its own `tokens` to their experts, or gets them back; 0 where ep is 1.

    alltoall: NCCL moves every one of the top_k copies. deepep, hybridep: a token goes to each distinct node once, by network,
    and there to each distinct GPU by NVLink (DeepSeek-V3, arXiv 2412.19437, section 3.2.2). Neither contains the sorting of
    tokens by expert, nor the host's wait for their counts. Callers leave out FP8's scales (4 bytes every 128 elements, 3%
    more). On the way back copies are summed where the dispatch multiplied them, so it takes as long as one of the same bytes
    (2 an element or more: the sums need it).
    """
    if ep == 1:
        return 0.0
    near = min(ranks_per_node_in_group, ep)
    token_bytes = tokens * hidden * dtype_bytes
    if dispatcher == "alltoall":
        return collective_seconds(device, "all_to_all", moe.top_k * token_bytes, ep, near)
    nodes = math.ceil(ep / near)
    remote_bytes = token_bytes * expected_places(moe, nodes) * (nodes - 1) / nodes
    nvlink_bytes = token_bytes * expected_places(moe, ep) * (near - 1) / near
    network_seconds = remote_bytes / (device.nic_bytes_per_second * DEEPEP_NETWORK_FRACTION)
    nvlink_seconds = nvlink_bytes / (device.nvlink_bytes_per_second * DEEPEP_NVLINK_FRACTION)
    return DEEPEP_START_SECONDS + max(network_seconds, nvlink_seconds)


def low_latency_seconds(
    device: DeviceFacts, tokens: float, hidden: int, moe: MoeShape, ep: int, ranks_per_node_in_group: int, dtype_bytes: float
) -> float:
    """Seconds of one dispatch or combine of a decoding batch by DeepEP's low-latency kernels; 0 where ep is 1.

    Every one of the top_k copies goes straight to its expert's GPU, by NVLink or by network; nothing is counted before.
    """
    if ep == 1:
        return 0.0
    near = min(ranks_per_node_in_group, ep)
    copies_bytes = tokens * moe.top_k * hidden * dtype_bytes
    nvlink_seconds = copies_bytes * (near - 1) / ep / (device.nvlink_bytes_per_second * LOW_LATENCY_NVLINK_FRACTION)
    network_seconds = copies_bytes * (ep - near) / ep / (device.nic_bytes_per_second * NETWORK_FRACTION)
    start_seconds = LOW_LATENCY_NETWORK_START_SECONDS if ep > near else LOW_LATENCY_START_SECONDS
    return start_seconds + max(nvlink_seconds, network_seconds)
