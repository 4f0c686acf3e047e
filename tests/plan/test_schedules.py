"""Pipeline schedules: the compiled prediction against an event simulation, both against the published bubble formulas."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.engine.config import InputError
from strop.engine.plan.schedules import StageSeconds, forward_only_seconds, pair_seconds, pipeline_time, slot_seconds
from strop.engine.plan.timeline import (
    Pass,
    dualpipe,
    dualpipev,
    interleaved,
    one_forward_one_backward,
    simulate,
    zero_bubble,
)

F, B_INPUT, W = 1.0, 1.25, 0.75
B = B_INPUT + W
EVEN = StageSeconds(F, B_INPUT, W)
CASES = [
    ("1f1b", 2, 1, 2, False),
    ("1f1b", 4, 1, 3, False),
    ("1f1b", 4, 1, 23, False),
    ("1f1b", 4, 1, 23, True),
    ("1f1b", 1, 1, 5, True),
    ("interleaved", 4, 2, 8, False),
    ("interleaved", 4, 3, 24, True),
    ("zero-bubble", 4, 1, 9, False),
    ("zero-bubble", 8, 1, 40, False),
    ("dualpipe", 4, 1, 8, True),
    ("dualpipe", 8, 1, 30, True),
    ("dualpipev", 4, 2, 11, True),
]


def orders_of(schedule, pp, vpp, microbatches, paired):
    if schedule == "dualpipe":
        return dualpipe(pp, microbatches)
    if schedule == "dualpipev":
        return dualpipev(pp, microbatches)
    if schedule == "zero-bubble":
        return zero_bubble(pp, microbatches)
    return interleaved(pp, vpp, microbatches, paired) if vpp > 1 else one_forward_one_backward(pp, microbatches, paired)


def uneven_stages(count, seed):
    rng = random.Random(seed)
    return [
        StageSeconds(*(rng.uniform(0.5, 1.5) for _ in range(3)), *(rng.uniform(0.0, 0.6) for _ in range(2)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("pp, microbatches", [(2, 4), (4, 8), (4, 40), (8, 64), (16, 128)])
def test_bubbles_of_even_stages_are_the_published_formulas(pp, microbatches):
    """scale.md section 5; DeepSeek-V3, arXiv 2412.19437, Table 2."""
    busy = microbatches * (F + B)
    formulas = {"1f1b": (pp - 1) * (F + B), "zero-bubble": (pp - 1) * (F + B - 2 * W)}
    for schedule, bubble in formulas.items():
        time = pipeline_time(schedule, [EVEN] * pp, pp, microbatches)
        assert time.bubble_seconds == pytest.approx(bubble)
        assert time.total_seconds == pytest.approx(busy + bubble)
    for vpp in (2, 4):
        chunk = StageSeconds(F / vpp, B_INPUT / vpp, W / vpp)
        time = pipeline_time("interleaved", [chunk] * (pp * vpp), pp, microbatches)
        assert time.bubble_seconds == pytest.approx((pp - 1) * (F + B) / vpp)


@pytest.mark.parametrize("pp", [4, 8, 16])
@pytest.mark.parametrize("pair", [F + B, 0.9 * (F + B)])
def test_bubble_of_dualpipe_is_within_a_chunk_of_the_published_formula(pp, pair):
    """(PP/2 - 1)(F&B + B - 3W), for the rank with most pairs: in the real order of the eight phases it waits a little less."""
    hidden = (F + B - pair) / 2
    stages = [StageSeconds(F - hidden, B_INPUT - hidden, W, hidden, hidden)] * pp
    time = pipeline_time("dualpipe", stages, pp, 4 * pp, paired=True)
    overlapped = pair_seconds(stages[0], stages[0], 0.0)
    waiting = time.total_seconds - min(time.busy_seconds)
    assert 0 <= (pp / 2 - 1) * (overlapped + B - 3 * W) - waiting <= (F + B) / 2


@pytest.mark.parametrize("schedule, pp, vpp, microbatches, paired", CASES)
def test_orders_run_every_pass_once_on_the_rank_that_holds_it(schedule, pp, vpp, microbatches, paired):
    counts: Counter[tuple[str, int, int]] = Counter()
    for rank, order in enumerate(orders_of(schedule, pp, vpp, microbatches, paired)):
        for one in (one for slot in order for one in slot):
            holders = {
                "dualpipe": (one.stage, pp - 1 - one.stage),
                "dualpipev": (min(one.stage, 2 * pp - 1 - one.stage),),
            }.get(schedule, (one.stage % pp,))
            assert rank in holders
            counts["forward" if one.work == "forward" else "backward", one.stage, one.microbatch] += (
                one.work != "backward_weight"
            )
            counts["weights", one.stage, one.microbatch] += one.work in ("backward", "backward_weight")
    virtual_stages = pp * (2 if schedule == "dualpipev" else vpp)
    assert len(counts) == 3 * virtual_stages * microbatches
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("schedule, pp, vpp, microbatches, paired", CASES)
@pytest.mark.parametrize("hop_seconds", [0.0, 0.05])
def test_prediction_is_the_event_simulation(schedule, pp, vpp, microbatches, paired, hop_seconds):
    stages = uneven_stages(pp * (2 if schedule == "dualpipev" else vpp), seed=pp + microbatches)
    contention = 0.15
    intervals = simulate(
        orders_of(schedule, pp, vpp, microbatches, paired),
        lambda rank, slot: slot_seconds(
            stages, [one.work for one in slot], [one.stage for one in slot], contention if paired else None
        ),
        hop_seconds,
    )
    time = pipeline_time(schedule, stages, pp, microbatches, hop_seconds, paired, contention)
    exact = microbatches <= 4 * pp
    assert time.total_seconds == pytest.approx(max(one.end_seconds for one in intervals), rel=1e-9 if exact else 0.01)
    for rank in range(pp):
        busy = sum(one.end_seconds - one.start_seconds for one in intervals if one.rank == rank)
        assert time.busy_seconds[rank] == pytest.approx(busy)
    assert time.bubble_seconds >= -1e-9
    assert time.hop_seconds >= -1e-9


@pytest.mark.parametrize("schedule, paired", [
    ("1f1b", False), ("1f1b", True), ("interleaved", False), ("interleaved", True), ("zero-bubble", False),
    ("dualpipe", True), ("dualpipev", False), ("dualpipev", True),
])  # fmt: skip
def test_hundreds_of_microbatches_on_uneven_stages_are_the_event_simulation_too(schedule, paired):
    """The pace of a prediction's last micro-batches is extended, wherever that pace settles."""
    rng = random.Random(f"{schedule} {paired}")
    for _ in range(12):
        pp, spread, hop_seconds = rng.choice([2, 4, 8]), rng.choice([0.0, 0.02, 0.1, 0.5]), rng.choice([0.0, 0.05])
        per_rank = {"interleaved": rng.choice([2, 3]), "dualpipev": 2}.get(schedule, 1)
        microbatches = pp * rng.choice([6, 12, 20])
        sizes = [1 + spread * rng.random() for _ in range(pp * per_rank)]
        exchange = rng.choice([0.0, 0.5, 1.0])
        stages = [StageSeconds(size, 1.1 * size, 0.9 * size, exchange * size, exchange * size) for size in sizes]
        intervals = simulate(
            orders_of(schedule, pp, per_rank, microbatches, paired),
            lambda rank, slot, stages=stages: slot_seconds(
                stages, [one.work for one in slot], [one.stage for one in slot], 0.15 if paired else None
            ),
            hop_seconds,
        )
        time = pipeline_time(schedule, stages, pp, microbatches, hop_seconds, paired, 0.15)
        assert time.total_seconds == pytest.approx(max(one.end_seconds for one in intervals), rel=0.005)
        assert time.bubble_seconds >= 0 and time.hop_seconds >= 0


@pytest.mark.parametrize(
    "schedule, pp, vpp, microbatches, passes",
    [
        ("1f1b", 4, 1, 9, 9 + 3),
        ("zero-bubble", 4, 1, 9, 9 + 3),
        ("interleaved", 4, 3, 8, 8 * 3 + 3),  # filled and drained by the chunks of one way through the ranks
        ("interleaved", 8, 4, 512, 512 * 4 + 7),
        ("dualpipev", 4, 2, 8, 8 * 2 + 3 + 3),  # the last rank holds the middle: the way there and back
    ],
)
def test_forward_passes_alone_fill_the_pipeline_once(schedule, pp, vpp, microbatches, passes):
    assert forward_only_seconds(schedule, [EVEN] * (pp * vpp), pp, microbatches) == pytest.approx(passes * F)


@pytest.mark.parametrize("schedule, pp, vpp, microbatches, paired", CASES)
def test_forward_passes_alone_are_the_event_simulation_without_the_others(schedule, pp, vpp, microbatches, paired):
    stages = uneven_stages(pp * (2 if schedule == "dualpipev" else vpp), seed=pp + microbatches)
    forwards = [
        [(one,) for slot in order for one in slot if one.work == "forward"]
        for order in orders_of(schedule, pp, vpp, microbatches, paired)
    ]
    intervals = simulate(forwards, lambda rank, slot: slot_seconds(stages, ["forward"], [slot[0].stage], None), 0.05)
    seconds = forward_only_seconds(schedule, stages, pp, microbatches, 0.05)
    assert seconds == pytest.approx(max(one.end_seconds for one in intervals), rel=0.002)


def test_orders_that_wait_for_each_other_are_an_error():
    backward_first = [[(Pass("backward", 0, 0),), (Pass("forward", 0, 0),)]]
    with pytest.raises(RuntimeError, match=r"pipeline ranks \[0\] wait"):
        simulate(backward_first, lambda rank, slot: 1.0)


@pytest.mark.parametrize(
    "schedule, microbatches, paired, message",
    [
        ("dualpipe", 7, False, "at least 8 micro-batches"),
        ("dualpipe", 9, False, "even number of micro-batches"),
        ("dualpipev", 7, False, "at least 8 micro-batches"),
        ("zero-bubble", 8, True, "overlap_expert doesn't go with schedule zero-bubble"),
    ],
)
def test_what_a_schedule_cannot_do_is_an_input_error(schedule, microbatches, paired, message):
    with pytest.raises(InputError, match=message):
        pipeline_time(schedule, [EVEN] * 8 if schedule == "dualpipev" else [EVEN] * 4, 4, microbatches, paired=paired)


def test_interleaving_needs_whole_groups_of_microbatches():
    with pytest.raises(InputError, match="multiple of 4 micro-batches, not 6"):
        pipeline_time("interleaved", [EVEN] * 8, 4, 6)


seconds = st.floats(0.0, 10.0)


@given(seconds, seconds, seconds, seconds, st.floats(0.0, 0.5))
def test_a_pair_takes_no_less_than_its_longer_half_and_no_more_than_both(compute, exchange, more, backward, contention):
    def pair(exchange_seconds):
        return pair_seconds(StageSeconds(compute, 0, 0, exchange_seconds, 0), StageSeconds(0, backward, 0), contention)

    total = compute + backward
    assert pair(exchange) >= max(total, exchange) - 1e-9
    assert pair(0.0) == pytest.approx(total)
    assert pair(exchange) <= (1 + contention) * total + exchange + 1e-9
    assert pair(exchange + more) >= pair(exchange) - 1e-9


def test_the_pace_is_the_busiest_ranks_in_the_end():
    """The last rank, 7.71 a micro-batch, sets the pace until the first one, 7.98, has no gaps left to fill."""
    sizes = [(3.19, 4.79), (1.34, 2.01), (1.24, 2.48), (1.01, 1.01), (1.08, 1.08), (1.1, 1.65), (1.06, 1.59), (2.57, 5.14)]
    stages = [StageSeconds(*size, 0.0) for size in sizes]
    intervals = simulate(
        one_forward_one_backward(8, 640), lambda rank, slot: sum(sizes[rank][one.work == "backward"] for one in slot)
    )
    seconds = pipeline_time("1f1b", stages, 8, 640).total_seconds
    assert seconds >= 640 * 7.98
    assert seconds == pytest.approx(max(one.end_seconds for one in intervals), rel=0.002)
