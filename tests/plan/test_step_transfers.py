"""What an optimizer step sends: bytes and counts of every collective, and which rank sends them."""

from dataclasses import replace

import pytest

from strop.engine.config import Layout
from strop.engine.plan.collectives import wire_bytes
from strop.engine.plan.devices import DEVICES, device_named
from strop.engine.plan.layer_time import Work, head_operations, layer_operations
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.states import rank_parameters
from strop.engine.plan.training import layer_pass, pipeline_messages, train_step
from strop.engine.plan.update_time import data_parallel_transfers, optimizer_seconds

DENSE, MOE, LATENT = (SHAPES[name] for name in ("llama3-8b", "qwen3-30b-a3b", "deepseek-v3"))


def planned(shape=MOE, gpus=16, layout=None, **training) -> PlannedRun:
    return PlannedRun.of(shape, gpus, layout=layout or Layout(ep=8), training=TrainingPlan(**training))


def test_one_microbatch_hides_no_hop_and_a_rank_counts_its_own():
    """The step waits for all 2 (pp - 1) hops, of which a rank in the middle sends two."""
    run = planned(SHAPES["qwen3-0.6b"], 8, layout=Layout(pp=8), global_batch_sequences=1)
    step = train_step(run)
    (hops,) = (one for one in step.transfers if one.kind == "send_recv")
    assert hops.count <= 2
    assert hops.exposed_seconds == hops.seconds
    assert step.parts_seconds["exposed_pipeline"] == pytest.approx(14 * hops.seconds / hops.count)


@pytest.mark.parametrize(
    "layout, messages",
    [
        (Layout(pp=4), (1, 2, 2, 1)),
        (Layout(pp=4, schedule="zero-bubble"), (1, 2, 2, 1)),
        (Layout(pp=4, vpp=2, schedule="interleaved"), (3, 4, 4, 3)),
        (Layout(pp=4, schedule="dualpipe"), (1, 2, 2, 1)),
        (Layout(pp=4, schedule="dualpipev"), (2, 4, 4, 2)),
    ],
)
def test_messages_that_a_rank_sends_along_the_pipeline(layout, messages):
    """Activations on and gradients back, for each micro-batch and chunk: none from the model's ends, none to itself at
    DualPipeV's turn. A DualPipe rank sees half of the micro-batches on each of its two chunks."""
    run = planned(DENSE, 32, layout=layout, global_batch_sequences=512)
    assert [pipeline_messages(run, rank) for rank in range(4)] == [64 * count for count in messages]
    (hops,) = (one for one in train_step(run).transfers if one.axis == "pp")
    assert hops.bytes_per_rank == hops.count * 2 * 4096 * DENSE.hidden_size
    assert hops.count // 64 in messages


def test_gradients_and_weights_are_exchanged_once_a_step():
    """ZeRO-1: fp32 gradients are scattered and bf16 weights gathered over all data-parallel ranks, experts' over edp."""
    run = planned(gpus=32, layout=Layout(tp=2, sp=True, ep=4))
    held = rank_parameters(run, run.stages()[0])
    sent = {(one.axis, one.kind): one for one in train_step(run).transfers if one.axis in ("zero", "edp")}
    assert {key: one.count for key, one in sent.items()} == dict.fromkeys(sent, 1)
    for axis, parameters, ranks in (("zero", held.dense, 16), ("edp", held.experts, 8)):
        for kind, dtype_bytes in (("reduce_scatter", 4), ("all_gather", 2)):
            assert sent[axis, kind].bytes_per_rank == wire_bytes(kind, dtype_bytes * parameters, ranks)


def test_fsdp_gathers_all_weights_twice_and_scatters_all_gradients_once_a_microbatch():
    run = planned(DENSE, 8, layout=Layout(), fsdp=True, global_batch_sequences=24, recompute=("layer",))
    held = rank_parameters(run, run.stages()[0]).total - DENSE.hidden_size  # the last norm's few parameters are left out
    sent = {one.kind: one.bytes_per_rank for one in train_step(run).transfers}
    assert sent["all_gather"] == pytest.approx(3 * 2 * wire_bytes("all_gather", 2 * held, 8))
    assert sent["reduce_scatter"] == pytest.approx(3 * wire_bytes("reduce_scatter", 4 * held, 8))


@pytest.mark.parametrize(
    "shape, layout, summed",
    [
        (SHAPES["qwen3-4b"], Layout(pp=2), True),
        (SHAPES["qwen3-4b"], Layout(), False),
        (SHAPES["qwen3-4b"], Layout(pp=2, schedule="dualpipev"), False),
        (DENSE, Layout(pp=2), False),
        (LATENT, Layout(pp=4, ep=8), True),
        (LATENT, Layout(pp=4, ep=8, schedule="dualpipe"), False),
    ],
)
def test_gradients_of_an_embedding_on_two_pipeline_ranks_are_summed(shape, layout, summed):
    """Tied head or input of MTP modules; DualPipe's ranks of both ends hold both, and sum them as data-parallel ranks do."""
    run = planned(shape, 32, layout=layout)
    work = Work(run, device_named("h100"))
    for stage in run.stages():
        sums = [one for one in data_parallel_transfers(work, stage, 1.0, 1.0) if (one.axis, one.kind) == ("pp", "all_reduce")]
        assert len(sums) == (summed and stage.index in (0, layout.pp - 1))
        assert all(one.bytes_per_rank == 4 * shape.vocab_size * shape.hidden_size for one in sums)


FP32_LAYOUTS = {
    "pp": Layout(pp=4), "tp": Layout(tp=4, sp=True), "ring": Layout(cp=2), "ulysses": Layout(cp=2, cp_kind="ulysses"),
    "ep": Layout(ep=8), "etp": Layout(tp=2, sp=True, ep=4, etp=2),
}  # fmt: skip


@pytest.mark.parametrize("layout", FP32_LAYOUTS.values(), ids=FP32_LAYOUTS.keys())
def test_fp32_sends_twice_the_bytes_and_multiplies_at_the_rate_of_fp32(layout):
    single, half = (planned(gpus=32, layout=layout, precision=name, weights_dtype_bytes=4) for name in ("fp32", "bf16"))
    sent = [
        {(one.axis, one.kind): one.bytes_per_rank for one in train_step(run).transfers if one.axis not in ("zero", "edp")}
        for run in (single, half)
    ]
    assert sent[0] and sent[0] == {key: pytest.approx(2 * count) for key, count in sent[1].items()}
    slower = DEVICES["h100"].bf16_flops_per_second / DEVICES["h100"].fp32_flops_per_second
    for operations in (lambda work: layer_operations(work, 0), head_operations):
        of_single, of_half = (operations(Work(run, device_named("h100"))) for run in (single, half))
        for one, other in zip(of_single, of_half, strict=True):
            if one.name in ("core_attention", "head", "qkv"):
                assert one.forward_seconds > slower / 3 * other.forward_seconds


@pytest.mark.parametrize("pp", [1, 2])
def test_fsdp_gathers_fp32_shards_in_the_type_of_the_products(pp):
    """FSDP2's MixedPrecisionPolicy casts a shard before it is gathered; ZeRO-1 gathers the weights as they are kept."""

    def gathered_bytes(**training) -> float:
        run = planned(DENSE, 8, layout=Layout(pp=pp), **training)
        return sum(one.bytes_per_rank for one in train_step(run).transfers if one.kind == "all_gather")

    half = gathered_bytes(fsdp=True, weights_dtype_bytes=2)
    assert gathered_bytes(fsdp=True, weights_dtype_bytes=4) == half
    assert gathered_bytes(fsdp=True, weights_dtype_bytes=4, precision="fp32") == 2 * half
    assert gathered_bytes(weights_dtype_bytes=4) == 2 * gathered_bytes(weights_dtype_bytes=2)


def test_tensor_parallel_collectives_of_a_step_are_counted():
    """With sequence parallel a dense layer gathers its input and scatters its output twice; backward the same and the inputs
    again. The head gathers once forward, and backward gathers and scatters; the embedding scatters, and backward gathers."""
    run = planned(DENSE, 8, layout=Layout(tp=4, sp=True), global_batch_sequences=6)
    (tokens, tp, microbatches) = (4096, 4, 3)
    counts = {one.kind: one for one in train_step(run).transfers if one.axis == "tp"}
    assert counts["all_gather"].count == microbatches * (DENSE.num_layers * (2 + 4) + 2 + 1)
    assert counts["reduce_scatter"].count == microbatches * (DENSE.num_layers * (2 + 2) + 1 + 1)
    one = wire_bytes("reduce_scatter", 2 * tokens * DENSE.hidden_size, tp)
    assert counts["reduce_scatter"].bytes_per_rank == pytest.approx(one * counts["reduce_scatter"].count)


def test_a_recomputed_layer_exchanges_its_forward_collectives_again():
    run = planned(layout=Layout(ep=8))
    work = Work(run, device_named("h100"))
    again = Work(replace(run, training=replace(run.training, recompute=("layer",))), device_named("h100"))
    kinds = [one.kind for one in layer_pass(work, 0).exchanges if one.direction == "backward"]
    assert kinds == ["dispatch", "combine"]
    assert [one.kind for one in layer_pass(again, 0).exchanges if one.direction == "backward"] == ["dispatch", "combine"] * 2
    seconds = layer_pass(again, 0).seconds
    assert seconds["recompute", "backward_input"] == pytest.approx(seconds["forward", "forward"])


def test_a_step_waits_for_the_rank_whose_update_takes_longest():
    """Adam of the second stage has most to do, but the gradients of a tied embedding, which the ends exchange, take longer."""
    run = PlannedRun.of(
        SHAPES["qwen3-4b"], 32, layout=Layout(pp=4), stage_layers=(6, 15, 9, 6), training=TrainingPlan(overlap_data=False)
    )
    work = Work(run, device_named("h100"))
    exchange = [sum(one.seconds for one in data_parallel_transfers(work, stage, 0.0, 0.0)) for stage in run.stages()]
    adam = [optimizer_seconds(work, stage) for stage in run.stages()]
    slowest = max(range(4), key=lambda rank: exchange[rank] + adam[rank])
    assert slowest != max(range(4), key=adam.__getitem__)
    parts = train_step(run).parts_seconds
    assert (parts["exposed_data"], parts["optimizer"]) == (exchange[slowest], adam[slowest])
