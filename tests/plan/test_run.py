"""PlannedRun: what its ranks hold, its counts, and the errors of an impossible one."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.engine.config import InputError, Layout, PipelineSchedule
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.shape import ModelShape
from strop.engine.plan.stages import Stage, even_split

DEEPSEEK = SHAPES["deepseek-v3"]
WITHOUT_MTP = replace(DEEPSEEK, num_mtp_layers=0)


def stages(schedule: PipelineSchedule, pp: int, vpp: int = 1, shape: ModelShape = DEEPSEEK, layers: tuple[int, ...] = ()):
    run = PlannedRun(shape, pp, layout=Layout(pp=pp, vpp=vpp, schedule=schedule), stage_layers=layers)
    return run.stages()


def tokens_of(stage: Stage) -> tuple[tuple[int, ...], str]:
    return stage.layers, "E" * stage.has_embedding + "L" * stage.has_head


def test_one_rank_holds_everything() -> None:
    assert [tokens_of(stage) for stage in stages("1f1b", 1)] == [(tuple(range(62)), "EL")]


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_consecutive_stages(schedule: PipelineSchedule) -> None:
    shape = replace(WITHOUT_MTP, num_layers=10)
    assert [tokens_of(stage) for stage in stages(schedule, 4, shape=shape)] == [
        ((0, 1, 2), "E"), ((3, 4, 5), ""), ((6, 7), ""), ((8, 9), "L"),
    ]  # fmt: skip
    given_layers = [tokens_of(stage) for stage in stages(schedule, 4, shape=shape, layers=(1, 4, 4, 1))]
    assert given_layers == [((0,), "E"), ((1, 2, 3, 4), ""), ((5, 6, 7, 8), ""), ((9,), "L")]


def test_the_rank_of_mtp_modules_has_the_embedding_too() -> None:
    last = stages("1f1b", 16)[-1]
    assert last.layers == (58, 59, 60, 61) and last.has_embedding and last.has_head
    assert not stages("1f1b", 16, shape=WITHOUT_MTP)[-1].has_embedding


def test_interleaved_chunks_go_round() -> None:
    shape = replace(WITHOUT_MTP, num_layers=12)
    assert [tokens_of(stage) for stage in stages("interleaved", 2, 3, shape)] == [
        ((0, 1, 4, 5, 8, 9), "E"), ((2, 3, 6, 7, 10, 11), "L"),
    ]  # fmt: skip


def test_megatron_bridges_division_of_deepseek_v3() -> None:
    """Its recipe says "Et|(tt|)*30mL": embedding and a layer, 30 times two layers, the MTP module with the loss."""
    layout = Layout(pp=8, vpp=4, schedule="interleaved")
    run = PlannedRun(DEEPSEEK, 8, layout=layout, stage_layers=(7, 8, 8, 8, 8, 8, 8, 6))
    assert [len(chunk) for chunk in run.chunks()] == [1, *[2] * 30, 1]
    assert run.chunks()[-1] == (61,)


def test_a_layers_place_for_embedding_and_head() -> None:
    layout = Layout(pp=8, vpp=4, schedule="interleaved")
    run = PlannedRun(SHAPES["qwen3-235b-a22b"], 8, layout=layout, stage_layers=(11, *[12] * 6, 11))
    assert [len(chunk) for chunk in run.chunks()] == [2, *[3] * 30, 2]


def test_dualpipe_holds_two_stages() -> None:
    shape = replace(DEEPSEEK, num_layers=8)
    assert [tokens_of(stage) for stage in stages("dualpipe", 4, shape=shape)] == [
        ((0, 1, 6, 7, 8), "EL"), ((2, 3, 4, 5), ""), ((2, 3, 4, 5), ""), ((0, 1, 6, 7, 8), "EL"),
    ]  # fmt: skip


def test_dualpipev_folds_the_model() -> None:
    shape = replace(DEEPSEEK, num_layers=8)
    assert [tokens_of(stage) for stage in stages("dualpipev", 2, shape=shape)] == [
        ((0, 1, 6, 7, 8), "EL"), ((2, 3, 4, 5), ""),
    ]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    schedule=st.sampled_from(["1f1b", "interleaved", "zero-bubble", "dualpipe", "dualpipev"]),
    half_pp=st.integers(1, 8), vpp=st.integers(2, 5), mtp=st.integers(0, 2), data=st.data(),
)  # fmt: skip
def test_stages_partition_the_layers(schedule: PipelineSchedule, half_pp: int, vpp: int, mtp: int, data: st.DataObject) -> None:
    """Every layer is on one rank (DualPipe: two, mirrored), and each rank has as many as it was given."""
    pp, chunks = 2 * half_pp, vpp if schedule == "interleaved" else 2 if schedule == "dualpipev" else 1
    given_layers = tuple(data.draw(st.lists(st.integers(chunks, 20), min_size=pp, max_size=pp)))
    uneven = data.draw(st.booleans())
    shape = replace(DEEPSEEK, num_layers=sum(given_layers), num_mtp_layers=mtp)
    layout = Layout(pp=pp, vpp=vpp if schedule == "interleaved" else 1, schedule=schedule)
    run = PlannedRun(shape, pp, layout=layout, stage_layers=given_layers if uneven else ())
    ranks = run.stages()

    copies = 2 if schedule == "dualpipe" else 1
    assert sorted(layer for rank in ranks for layer in rank.layers) == sorted(copies * [*range(shape.num_layers + mtp)])
    assert [layer for chunk in run.chunks() for layer in chunk] == [*range(shape.num_layers + mtp)]
    assert sum(rank.has_head for rank in ranks) == copies
    assert all(rank.has_head == (shape.num_layers + mtp - 1 in rank.layers) for rank in ranks)
    assert all(rank.has_embedding for rank in ranks if 0 in rank.layers or (mtp and rank.has_head))
    if schedule == "dualpipe":
        assert [set(rank.layers) for rank in ranks] == [set(rank.layers) for rank in reversed(ranks)]
    else:
        expected = given_layers if uneven else even_split(shape.num_layers, pp)
        assert tuple(sum(layer < shape.num_layers for layer in rank.layers) for rank in ranks) == expected
    sizes = [len(chunk) - mtp * (index == len(run.chunks()) - 1) for index, chunk in enumerate(run.chunks())]
    if not uneven and schedule != "dualpipe":
        assert max(sizes[1:-1], default=0) - min(sizes[1:-1], default=0) <= 2


def test_even_split() -> None:
    assert even_split(10, 4) == (3, 3, 2, 2)
    assert even_split(2, 3) == (1, 1, 0)


def test_counts_of_a_run() -> None:
    run = PlannedRun.of(
        DEEPSEEK, 1024, layout=Layout(tp=2, sp=True, pp=8, vpp=4, schedule="interleaved", ep=64),
        training=TrainingPlan(global_batch_sequences=8192),
    )  # fmt: skip
    assert (run.layout.dp, run.edp, run.microbatches, run.microbatch_tokens) == (64, 2, 128, 4096)
    assert run.step_tokens == 8192 * 4096
    assert (run.training_gpus, run.rollout_gpus) == (1024, 0)
    split = PlannedRun.of(
        SHAPES["qwen3-32b"], 64, placement="split", rollout=RolloutPlan(gpus=16, tp=4, pp=2), layout=Layout(tp=4),
        training=TrainingPlan(global_batch_sequences=240),
    )  # fmt: skip
    assert (split.training_gpus, split.rollout_gpus, split.layout.dp, split.rollout.engine_gpus) == (48, 16, 12, 8)
    colocated = PlannedRun.of(SHAPES["qwen3-32b"], 64, rollout=RolloutPlan(tp=4))
    assert (colocated.training_gpus, colocated.rollout_gpus) == (64, 64)


def test_of_names_every_mistake() -> None:
    with pytest.raises(InputError) as caught:
        PlannedRun.of(SHAPES["qwen3-30b-a3b"], 24, layout=Layout(tp=3, ep=6), training=TrainingPlan(global_batch_sequences=100))
    assert str(caught.value).splitlines() == [
        "--layout.tp 3: doesn't divide 32 heads, doesn't divide 151936 tokens of the vocabulary, 4 key/value heads neither "
        "divide by it nor can all be copied equally often; nearest allowed: 2 or 4",
        "--layout.no-sp: with experts, tensor-parallel ranks divide the tokens between them (as Megatron-LM requires); "
        "nearest allowed: --layout.sp",
        "--layout.ep 6: doesn't divide 128 experts; nearest allowed: 4 or 8",
        "--training.global-batch-sequences 100: doesn't divide into micro-batches of 1 on 8 replicas; "
        "nearest allowed: 96 or 104",
    ]
