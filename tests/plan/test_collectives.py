"""Collectives and the exchange of experts' tokens against published measurements, and their arithmetic against counting."""

import itertools
import math

import numpy as np
import pytest

from strop.engine.config import Layout
from strop.engine.plan.collectives import (
    BESIDE_COMPUTE_FRACTION,
    collective_seconds,
    expected_places,
    expert_exchange_seconds,
    low_latency_seconds,
    members_per_node,
    wire_bytes,
)
from strop.engine.plan.devices import DEVICES
from strop.engine.plan.shape import MoeShape

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
FP8 = 1 + 4 / 128  # an element and its share of a scale
FREE = MoeShape(256, 8, 2048)
GROUPED = MoeShape(256, 8, 2048, num_groups=8, top_groups=4)  # DeepSeek-V3: one group a node of EP64

# (device, kind, GPUs, payload bytes, microseconds): nccl 2.29.2 (A100: 2.27.3) of aiconfigurator-core 0.12.0, systems/data.
# H100 was fitted (with many more points), the others weren't.
NCCL = [
    ("h100", "all_reduce", 8, 2**29, 2111.1), ("h100", "all_gather", 8, 2**29, 1401.5),
    ("h100", "reduce_scatter", 8, 2**29, 1399.4), ("h100", "all_to_all", 8, 2**29, 1490.4),
    ("h100", "all_gather", 2, 2**29, 1038.6), ("h100", "all_reduce", 4, 2**27, 613.2),
    ("h100", "all_gather", 8, 2**24, 68.9), ("h100", "all_reduce", 8, 2**24, 121.9), ("h100", "all_reduce", 8, 2**9, 15.6),
    ("h200", "all_reduce", 8, 2**29, 2040.3), ("h200", "all_gather", 4, 2**29, 1271.7),
    ("h200", "reduce_scatter", 8, 2**24, 69.4), ("h200", "all_reduce", 2, 2**12, 6.7),
    ("a100", "all_reduce", 8, 2**29, 4225.9), ("a100", "reduce_scatter", 8, 2**29, 2207.1),
    ("a100", "all_gather", 8, 2**29, 2288.0), ("a100", "all_to_all", 8, 2**27, 640.5), ("a100", "all_reduce", 8, 2**9, 22.6),
    ("b200", "all_gather", 8, 2**29, 761.4), ("b200", "reduce_scatter", 8, 2**29, 766.5),
    ("b200", "all_to_all", 8, 2**29, 834.2), ("b200", "all_reduce", 8, 2**29, 1334.6),
]  # fmt: skip


@pytest.mark.parametrize("device, kind, size, payload, microseconds", NCCL)
def test_nccl_inside_a_node(device, kind, size, payload, microseconds):
    """25%: one set of fractions for four devices; large messages on H100 are within 10%."""
    seconds = collective_seconds(DEVICES[device], kind, payload, size, size)
    assert seconds * 1e6 == pytest.approx(microseconds, rel=0.10 if device == "h100" and payload > 2**25 else 0.25)


@pytest.mark.parametrize(
    "device, kind, nodes, payload, gigabytes_per_second",
    [
        ("h100", "reduce_scatter", 4, 2**33, 360),  # nccl issue #1229 (its sizes are not said; the largest are assumed)
        ("h100", "reduce_scatter", 32, 2**33, 300),
        ("h100", "reduce_scatter", 128, 2**33, 260),
        ("h100", "all_reduce", 32, 2**31, 340),  # nccl issue #1218
        ("h100", "all_reduce", 1, 2**33, 476),  # nccl-tests issue #290
        ("h100", "all_reduce", 2, 2**33, 470),  # nccl issue #2409, what a sound network gives
        ("h800", "all_reduce", 1, 2**33, 215),  # nccl issue #1374
    ],
)
def test_nccl_bus_bandwidth(device, kind, nodes, payload, gigabytes_per_second):
    seconds = collective_seconds(DEVICES[device], kind, payload, 8 * nodes, 8)
    assert wire_bytes(kind, payload, 8 * nodes) / seconds / 1e9 == pytest.approx(gigabytes_per_second, rel=0.12)


def test_nccl_between_nodes_when_latency_decides():
    a100, h800 = DEVICES["a100"], DEVICES["h800"]
    assert collective_seconds(a100, "all_reduce", 8, 256, 8) == pytest.approx(63e-6, rel=0.15)  # nccl issue #652, 32 nodes
    assert collective_seconds(h800, "all_to_all", 2**23, 64, 8) == pytest.approx(317e-6, rel=0.15)  # nccl issue #1531, 8 nodes


def test_members_of_a_node_share_its_traffic():
    """nccl issue #1250: an all-reduce of 1 GB over 2 nodes takes 0.27, 0.13 and 0.067 s with 1, 2 and 4 GPUs in each."""
    one, two, four = (collective_seconds(DEVICES["h100"], "all_reduce", 1e9, 2 * near, near) for near in (1, 2, 4))
    assert one / two == pytest.approx(0.27 / 0.13, rel=0.1) and one / four == pytest.approx(0.27 / 0.067, rel=0.1)


@pytest.mark.parametrize(
    "ep, moe, dispatch_gigabytes_per_second, combine_gigabytes_per_second, places",
    [(8, FREE, 153, 158, 8), (16, FREE, 43, 43, 2), (32, FREE, 58, 57, 4), (64, GROUPED, 51, 50, 8)],
)
def test_deepep_on_h800(ep, moe, dispatch_gigabytes_per_second, combine_gigabytes_per_second, places):
    """DeepEP docs/legacy.md, normal kernels: 4096 tokens of 7168, top 8, at most 4 nodes. It counts one copy a distinct place
    (GPUs at EP8, else nodes) with those that stay. 8%: NVLink's fraction is one for H800 and H100, and NVLink bounds EP16."""
    for dtype_bytes, gigabytes_per_second in ((FP8, dispatch_gigabytes_per_second), (2, combine_gigabytes_per_second)):
        seconds = expert_exchange_seconds(DEVICES["h800"], 4096, 7168, moe, ep, 8, dtype_bytes, "deepep")
        counted = 4096 * 7168 * dtype_bytes * expected_places(moe, places)
        assert counted / seconds / 1e9 == pytest.approx(gigabytes_per_second, rel=0.08)


@pytest.mark.parametrize("ep, gigabytes_per_second", [(16, 90), (32, 61)])
def test_deepep_v2_on_h100(ep, gigabytes_per_second):
    """DeepEP README, 8 x 2 and 8 x 4 GPUs, 8192 tokens; not used for the constants."""
    seconds = expert_exchange_seconds(DEVICES["h100"], 8192, 7168, FREE, ep, 8, FP8, "deepep")
    assert 8192 * 7168 * FP8 * expected_places(FREE, ep // 8) / seconds / 1e9 == pytest.approx(gigabytes_per_second, rel=0.08)


@pytest.mark.parametrize(
    "tokens, dispatch_microseconds, combine_microseconds", [(1024, 158, 307), (4096, 492, 983), (16384, 1960, 3565)]
)
def test_deepep_on_h100(tokens, dispatch_microseconds, combine_microseconds):
    """aiconfigurator-core 0.12.0, h100_sxm wideep_deepep_normal, 20 multiprocessors."""
    for microseconds, dtype_bytes in ((dispatch_microseconds, FP8), (combine_microseconds, 2)):
        seconds = expert_exchange_seconds(DEVICES["h100"], tokens, 7168, FREE, 8, 8, dtype_bytes, "deepep")
        assert seconds * 1e6 == pytest.approx(microseconds, rel=0.12)


@pytest.mark.parametrize(
    "ep, dispatch_microseconds, combine_microseconds",
    [(8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360)],
)
def test_low_latency_kernels_on_h800(ep, dispatch_microseconds, combine_microseconds):
    """DeepEP docs/legacy.md, 128 tokens of 7168, top 8. 25% inside a node: one NVLink fraction for dispatch and combine."""
    for microseconds, dtype_bytes in ((dispatch_microseconds, FP8), (combine_microseconds, 2)):
        seconds = low_latency_seconds(DEVICES["h800"], 128, 7168, FREE, ep, 8, dtype_bytes)
        assert seconds * 1e6 == pytest.approx(microseconds, rel=0.25 if ep == 8 else 0.12)


def test_exchange_of_the_dualpipe_trace():
    """deepseek-ai/profile-data, H800, EP64, beside computation: a cached dispatch 3.4 ms, a combine 6.18 ms."""
    arguments = (DEVICES["h800"], 4096, 7168, GROUPED, 64, 8)
    for dtype_bytes, seconds in ((FP8, 3.4e-3), (2, 6.18e-3)):
        alone_seconds = expert_exchange_seconds(*arguments, dtype_bytes, "deepep")
        assert alone_seconds / BESIDE_COMPUTE_FRACTION == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_wire_bytes_are_what_a_ring_sends(size):
    """Counted step by step: a ring passes one of `size` equal parts in each of its steps."""
    parts = [1.0] * size
    passing = sum(parts[: size - 1])  # size - 1 steps, one part each
    assert wire_bytes("all_gather", size, size) == pytest.approx(passing)
    assert wire_bytes("reduce_scatter", size, size) == pytest.approx(passing)
    assert wire_bytes("all_reduce", size, size) == pytest.approx(2 * passing)
    assert wire_bytes("all_to_all", size, size) == pytest.approx(passing)
    assert wire_bytes("send_recv", size, size) == (size if size > 1 else 0)


@pytest.mark.parametrize("places", [1, 2, 4, 8])
@pytest.mark.parametrize("groups, top_groups", [(1, 1), (4, 2), (2, 1), (4, 4)])
def test_expected_places_is_the_mean_over_all_choices(places, groups, top_groups):
    moe = MoeShape(8, 2, 64, num_groups=groups, top_groups=top_groups)
    visited = [
        len({expert // (8 // places) for expert in experts})
        for allowed in itertools.combinations(range(groups), top_groups)
        for experts in itertools.combinations([e for e in range(8) if e // (8 // groups) in allowed], 2)
    ]
    assert expected_places(moe, places) == pytest.approx(np.mean(visited))


def grid_groups(layout: Layout) -> dict[str, list[list[int]]]:
    """The groups of every axis, from an array of ranks: the definition that `members_per_node` computes in closed form."""
    dp, pp, cp, tp, ep, etp = layout.dp, layout.pp, layout.cp, layout.tp, layout.ep, layout.etp
    ranks = np.arange(dp * pp * cp * tp)
    dense = ranks.reshape(pp, dp, cp, tp)
    experts = dense.reshape(pp, -1, ep, etp)
    last = {"tp": (dense, 3), "cp": (dense, 2), "dp": (dense, 1), "pp": (dense, 0)}
    last |= {"etp": (experts, 3), "ep": (experts, 2), "edp": (experts, 1)}
    groups = {axis: np.moveaxis(grid, at, -1).reshape(-1, grid.shape[at]) for axis, (grid, at) in last.items()}
    groups["zero"] = np.moveaxis(dense, 3, 0).reshape(tp, pp, dp * cp).reshape(-1, dp * cp)
    return {axis: found.tolist() for axis, found in groups.items()}


@pytest.mark.parametrize(
    "layout, gpus",
    [
        (Layout(tp=2, pp=8, ep=64), 1024),
        (Layout(tp=1, pp=16, ep=64), 2048),
        (Layout(tp=8, pp=8, cp=2), 256),
        (Layout(tp=4, cp=4, ep=8, etp=2), 64),
        (Layout(ep=8), 8),
        (Layout(tp=2, pp=3, ep=6), 36),
        (Layout(), 1),
    ],
)
def test_members_per_node(layout, gpus):
    layout = layout.resolve(gpus)
    for axis, groups in grid_groups(layout).items():
        fullest = max(np.bincount(np.array(group) // 8).max() for group in groups)
        assert members_per_node(layout, axis, 8) == fullest, axis


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_more_bytes_are_never_faster(device):
    sizes = [0, 1, 1e3, 1e5, 1e6, 1e8, 1e10]
    for kind in KINDS:
        for size, near in [(2, 1), (2, 2), (4, 4), (8, 8), (16, 8), (16, 1), (64, 2), (4096, 8), (6, 4)]:
            seconds = [collective_seconds(device, kind, payload, size, near) for payload in sizes]
            assert seconds == sorted(seconds) and seconds[0] > 0 and math.isfinite(seconds[-1]), (kind, size, near)
        assert collective_seconds(device, kind, 1e9, 1, 1) == 0
    for ep in (2, 8, 16, 64, 256):
        for dispatcher in ("alltoall", "deepep", "hybridep"):
            seconds = [
                expert_exchange_seconds(device, tokens, 7168, FREE, ep, 8, 2, dispatcher) for tokens in (0, 1, 100, 4096, 10**6)
            ]
            assert seconds == sorted(seconds) and seconds[0] > 0, (ep, dispatcher)
        seconds = [low_latency_seconds(device, tokens, 7168, FREE, ep, 8, 2) for tokens in (0, 1, 128, 1024)]
        assert seconds == sorted(seconds) and seconds[0] > 0


def test_more_nodes_are_never_faster():
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        seconds = [collective_seconds(DEVICES["h100"], kind, 1e8, 8 * nodes, 8) for nodes in (1, 2, 4, 16, 64, 512)]
        assert seconds == sorted(seconds), (kind, seconds)


def test_deepep_sends_less_than_all_copies():
    """Eight copies of a token share nodes and GPUs; one copy has nothing to share."""
    arguments = (DEVICES["h100"], 4096, 7168)
    for ep in (16, 32, 64):
        assert expert_exchange_seconds(*arguments, FREE, ep, 8, 2, "deepep") < expert_exchange_seconds(
            *arguments, FREE, ep, 8, 2, "alltoall"
        )
    assert expert_exchange_seconds(*arguments, FREE, 1, 1, 2, "deepep") == 0
    assert low_latency_seconds(*arguments, FREE, 1, 1, 2) == 0
