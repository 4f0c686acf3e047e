"""Micro-batches in flight: the papers' tables where chunks are equal, counted by hand and pass by pass where they are not."""

from dataclasses import replace

import numpy as np
import pytest

from strop.engine.config import Layout
from strop.engine.plan.activations import kept_bytes, rank_kept_bytes
from strop.engine.plan.in_flight import held_chunks, most_held_bytes
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.schedules import rank_orders

LLAMA_8B, QWEN_30B = SHAPES["llama3-8b"], SHAPES["qwen3-30b-a3b"]
CHUNKS = {"interleaved": 3, "dualpipe": 2, "dualpipev": 2}
"""Of a rank."""


def planned(shape, gpus: int, layout: Layout, stage_layers=(), **training) -> PlannedRun:
    training.setdefault("global_batch_sequences", 64 * gpus)
    return PlannedRun.of(shape, gpus, layout=layout, stage_layers=stage_layers, training=TrainingPlan(**training))


def most(schedule: str, pp: int, chunks: int = 1, microbatches: int = 64, paired: bool = False) -> list[float]:
    """Chunks that each rank holds at most."""
    return held_chunks(schedule, pp, chunks, microbatches, paired).sum(axis=2).max(axis=1).tolist()


@pytest.mark.parametrize("pp", [2, 4, 16])
def test_equal_chunks_are_the_papers_tables(pp):
    assert most("1f1b", pp) == [pp - rank for rank in range(pp)]
    assert most("1f1b", pp, paired=True) == [2 * (pp - 1 - rank) + 1 for rank in range(pp)]
    for vpp in (2, 4):  # on the first rank 1 + (pp - 1) / (pp vpp) times 1F1B's (arXiv 2104.04473)
        for paired in (False, True):
            counts = most("interleaved", pp, vpp, paired=paired)
            assert counts[0] / vpp == pytest.approx(pp * (1 + (pp - 1) / (pp * vpp)))
            assert counts == [2 * (pp - 1 - rank) + (vpp - 1) * pp + 1 for rank in range(pp)]
    assert most("zero-bubble", pp) == [pp] * pp
    assert most("dualpipe", pp, 2) == [pp + 1] * pp  # arXiv 2412.19437, Table 2
    assert most("dualpipev", pp, 2) == [2 * pp + 1] * pp


def test_never_more_than_there_are():
    assert most("1f1b", 8, microbatches=3) == [3, 3, 3, 3, 3, 3, 2, 1]
    assert most("zero-bubble", 8, microbatches=3) == [3] * 8
    assert most("interleaved", 4, 2, microbatches=4) == [8, 8, 7, 5]
    assert most("1f1b", 1, microbatches=5) == [1]


def test_chunks_of_different_size_by_hand():
    """Rank 0 of pp 2, vpp 2 passes A and B forwards as AABB AABB ..., backwards as BBAA ..., after 4 forwards one of each in
    turn. So it holds (A, B) = (2, 2), then with each further forward (3, 2), (4, 1), (4, 1), (3, 2), and so on; rank 1 after 2
    forwards (2, 1), (2, 1), (3, 0), (3, 0)."""
    moments = held_chunks("interleaved", 2, 2, 6, False)
    assert {tuple(row) for row in moments[0].tolist()} == {(3, 2), (4, 1)}
    assert {tuple(row) for row in moments[1].tolist()} == {(2, 1), (3, 0)}
    shape = replace(LLAMA_8B, num_layers=10)
    layout = Layout(pp=2, vpp=2, schedule="interleaved")
    run = planned(shape, 2, layout)
    assert [len(chunk) for chunk in run.chunks()] == [2, 3, 3, 2]  # embedding and head count as a layer
    layer, last_norm = kept_bytes(run, 0), 2 * 4096 * shape.hidden_size * 2
    first, second = rank_kept_bytes(run)
    assert first == max(3 * 2 + 2 * 3, 4 * 2 + 3) * layer
    assert second == max(2 * 3 + 2, 3 * 3) * layer + last_norm
    # recomputing the first chunk alone: it is what the first rank holds most of
    run = planned(replace(LLAMA_8B, num_layers=8), 2, layout, recompute=("layer",), recompute_layers=2)
    little, whole = 2 * kept_bytes(run, 0), 2 * kept_bytes(run, 0, recompute=False)
    assert rank_kept_bytes(run)[0] == max(3 * little + 2 * whole, 4 * little + whole)


def test_a_division_that_fits_only_on_average():
    """A rank's first four chunks have 2 layers, the others 1. After 34 forwards rank 0 holds 6 micro-batches of chunk 0, 4 of
    each other one, 52 layers. The next 14 forwards, 2 of chunk 0 and 4 of each of 1, 2 and 3, take 2 layers, the backwards
    between them, of chunks 7 to 4, free 1: 52 + 14 x 2 - 13 = 67. (Of equal chunks it would hold 35 / 8 of its 12 layers.)"""
    layout = Layout(pp=4, vpp=8, schedule="interleaved", ep=16)
    run = planned(QWEN_30B, 256, layout, micro_batch_sequences=2, global_batch_sequences=2048)
    assert [len(chunk) for chunk in run.chunks()][::4] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert rank_kept_bytes(run)[0] == pytest.approx(67 * kept_bytes(run, 0))


def test_dualpipev_holds_more_of_the_outward_leg():
    """pp 2. Rank 0: three forwards of its first leg and one of its last, then in turn a forward of the first, (4, 1), a
    backward of the last, ... Rank 1: two of each, then one more forward of the first, (3, 2)."""
    moments = held_chunks("dualpipev", 2, 2, 8, False)
    assert {tuple(row) for row in moments[0].tolist()} == {(4, 1)}
    assert {tuple(row) for row in moments[1].tolist()} == {(3, 2)}


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("paired", [False, True])
def test_many_micro_batches_pass_by_pass(schedule, paired):
    """Of random chunks. A forward beside a backward takes what that one frees, or (DualPipe) comes first."""
    paired, chunks, pp = paired and schedule != "zero-bubble", CHUNKS.get(schedule, 1), 4
    in_step = paired and not schedule.startswith("dualpipe")
    layout = Layout(pp=pp, vpp=chunks if schedule == "interleaved" else 1, schedule=schedule, ep=8)
    run = planned(QWEN_30B, 64, layout, overlap_expert=paired, global_batch_sequences=16 * 40)
    assert run.microbatches == 40
    sizes = np.random.default_rng(3).uniform(0.0, 4.0, (pp, chunks))
    expected = []
    for rank, order in enumerate(rank_orders(schedule, pp, chunks, 40, paired)):
        stages = sorted({one.stage for slot in order for one in slot})
        held = peak = 0.0
        for slot in order:
            made = sum(sizes[rank, stages.index(one.stage)] for one in slot if one.work == "forward")
            freed = sum(sizes[rank, stages.index(one.stage)] for one in slot if one.work in ("backward", "backward_weight"))
            peak = max(peak, held + (made - freed if in_step else made))
            held += made - freed
        expected.append(peak)
    assert most_held_bytes(run, sizes) == pytest.approx(np.array(expected))
