"""What one rank sends while a micro-batch passes a layer, against bytes counted by hand."""

from collections import Counter
from dataclasses import replace

import pytest

from strop.engine.config import Layout
from strop.engine.plan.collectives import collective_seconds
from strop.engine.plan.devices import device_named
from strop.engine.plan.layer_exchange import Exchange, column, gathered_weights, layer_exchanges, row
from strop.engine.plan.layer_time import Operation, Work, layer_operations
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.states import layer_rank_parameters

DENSE, MOE, LATENT = (SHAPES[name] for name in ("llama3-70b", "qwen3-30b-a3b", "deepseek-v3"))
TOKENS = 4096


def planned(shape, gpus, layout, **training) -> PlannedRun:
    return PlannedRun.of(shape, gpus, layout=layout, training=TrainingPlan(sequence_length_tokens=TOKENS, **training))


def sent_bytes(run: PlannedRun, layer: int, axis: str) -> Counter:
    """By kind and direction."""
    work = Work(run, device_named("h100"))
    operations = {one.name: one for one in layer_operations(work, layer)}
    sent = Counter()
    for one in layer_exchanges(work, layer, operations, run.training.recompute):
        if one.axis == axis:
            sent[one.kind, one.direction] += one.sent_bytes
    return sent


@pytest.mark.parametrize(
    "shape, layer, recompute, gathered_width, scattered_width",
    [
        (DENSE, 5, "dense_mlp", 8192, 8192),
        (DENSE, 5, "activation", 0, 0),
        (DENSE, 5, "core_attention", 0, 0),
        (DENSE, 5, "every_second_product", 0, 0),
        (DENSE, 5, "layer", 2 * 8192, 2 * 8192),
        (LATENT, 2, "dense_mlp", 7168, 7168),
        (LATENT, 5, "experts", 7168, 7168),  # of its shared expert
        (LATENT, 5, "mla_up_projection", 1536 + 512 + 64, 0),  # compressed q and kv, the shared key
        (LATENT, 5, "layer", 7168 + 1536 + 512 + 64, 2 * 7168),
    ],
)
def test_recomputed_products_exchange_their_tensors_again(shape, layer, recompute, gathered_width, scattered_width):
    """Megatron checkpoints modules with their gathering and scattering inside."""
    run = planned(shape, 64, Layout(tp=8, sp=True, ep=8 if shape is LATENT else 1))
    before = sent_bytes(run, layer, "tp")
    after = sent_bytes(replace(run, training=replace(run.training, recompute=(recompute,))), layer, "tp")
    for kind, width in (("all_gather", gathered_width), ("reduce_scatter", scattered_width)):
        assert after[kind, "backward"] - before[kind, "backward"] == pytest.approx(7 / 8 * 2 * TOKENS * width)
        assert after[kind, "forward"] == before[kind, "forward"]


def test_a_recomputed_output_without_sequence_parallel_is_summed_again():
    """All-reduce: 7/8 of the tensor twice. An input is on every rank and needs no gathering."""
    run = planned(DENSE, 64, Layout(tp=8))
    recomputing = replace(run, training=replace(run.training, recompute=("dense_mlp",)))
    more = sent_bytes(recomputing, 5, "tp") - sent_bytes(run, 5, "tp")
    assert dict(more) == {("all_reduce", "backward"): pytest.approx(2 * 7 / 8 * 2 * TOKENS * 8192)}


@pytest.mark.parametrize(
    "name, layout, gpus, heads",
    [
        # 64 query and 4 key-value heads: 16 of q and of the output a tp rank; all 16 cp ranks get all tokens of a k and a v.
        ("qwen3-235b-a22b", Layout(tp=4, sp=True, cp=16, cp_kind="ulysses"), 64, 16 + 16 + 16 + 16),
        # 32 and 8: 16 and 4, as many as cp ranks.
        ("llama3-8b", Layout(tp=2, sp=True, cp=4, cp_kind="ulysses"), 8, 16 + 4 + 4 + 16),
        # 2 for 4 ranks, each sent to two of them.
        ("llama3-8b", Layout(tp=4, sp=True, cp=4, cp_kind="ulysses"), 16, 8 + 4 + 4 + 8),
    ],
)
def test_ulysses_gives_every_rank_all_tokens_of_a_key_value_head(name, layout, gpus, heads):
    """A rank's block, of which it keeps one part in cp; backward the same heads' gradients."""
    run = planned(SHAPES[name], gpus, layout)
    block = heads * 128 * 2 * TOKENS / layout.cp
    sent = pytest.approx(block * (layout.cp - 1) / layout.cp)
    assert dict(sent_bytes(run, 5, "cp")) == {("all_to_all", "forward"): sent, ("all_to_all", "backward"): sent}


def test_a_ring_passes_on_no_copies_of_key_value_heads():
    """4 heads for 8 tp ranks: one each, keys and values, to all but one of the ring; backward with their gradients."""
    run = planned(SHAPES["qwen3-235b-a22b"], 64, Layout(tp=8, sp=True, cp=8))
    block = 2 * 128 * 2 * TOKENS / 8
    assert dict(sent_bytes(run, 5, "cp")) == {
        ("send_recv", "forward"): 7 * block,
        ("send_recv", "backward"): 2 * 7 * block,
    }


CHANNELS = 16 / (132 - 16)  # an H100's multiprocessors that NCCL holds, over those that are left


@pytest.mark.parametrize("overlap, in_pieces", [(True, 1 / 4), (False, 1)])
def test_a_collective_in_pieces_shows_one_of_them(overlap, in_pieces):
    """Beside products that are long enough: of tp 4 pieces the first (of a gathering) or the last (of a scattering). A whole
    collective beside a whole product shows by how much it slows that product down."""
    work = Work(planned(DENSE, 8, Layout(tp=4, sp=True), overlap_tensor=overlap), device_named("h100"))
    product = Operation("a long product", 1.0, 1.0, 1.0)
    exchanges = column(work, 1e8, product) + row(work, 1e8, product)
    shown = [(one.direction, one.kind, one.exposed_seconds / one.seconds) for one in exchanges]
    whole = pytest.approx(CHANNELS / (1 + CHANNELS))
    assert shown == [
        ("forward", "all_gather", pytest.approx(in_pieces)),
        ("backward", "all_gather", whole),
        ("backward", "reduce_scatter", whole),
        ("forward", "reduce_scatter", pytest.approx(in_pieces)),
        ("backward", "all_gather", pytest.approx(in_pieces)),
    ]


def test_a_hop_of_a_ring_has_the_attention_of_one_block_beside_it():
    """With attention as long as one hop, 4 ranks have a quarter of it beside each of 3 hops."""
    work = Work(planned(DENSE, 32, Layout(cp=4)), device_named("h100"))
    operations = {one.name: one for one in layer_operations(work, 5)}
    forward, backward = (one.seconds / 3 for one in layer_exchanges(work, 5, operations))
    operations["core_attention"] = Operation("core_attention", forward, backward)
    for one, hop_seconds in zip(layer_exchanges(work, 5, operations), (forward, backward), strict=True):
        assert one.count == 3 and one.exposed_seconds == pytest.approx(3 * (1 - 1 / 4) * hop_seconds)


@pytest.mark.parametrize("dispatcher", ["alltoall", "deepep"])
def test_all_wait_for_the_busiest_rank_of_experts(dispatcher):
    """It gets 1.5 times the mean of the tokens, and so do its dispatch and its combine take."""

    def seconds(**training) -> list[float]:
        work = Work(planned(MOE, 16, Layout(ep=8), dispatcher=dispatcher, **training), device_named("h100"))
        operations = {one.name: one for one in layer_operations(work, 0)}
        return [one.seconds for one in layer_exchanges(work, 0, operations)]

    even = seconds()
    assert len(even) == 4 and seconds(expert_imbalance=1.5) == pytest.approx([1.5 * one for one in even])


@pytest.mark.parametrize(
    "ep, paired, beside",
    [
        (8, False, 0.4 + 0.2),  # inside a node, while weights of 16 GPUs need the network: they travel on while tokens do
        (8, True, 0.4),  # tokens travel beside the other pass of a pair, so that nothing waits for them
        (16, False, 0.4 + 0.2 - 0.2),  # the wait for tokens is of no use, since they hold the network themselves
        (16, True, 0.4 - 0.2),
    ],
)
def test_weights_are_gathered_beside_computation_and_waiting_for_other_links(ep, paired, beside):
    """Computation for 0.4 and tokens for 0.2 of the seconds that the weights of a layer take."""
    run = planned(MOE, 16, Layout(ep=ep), fsdp=True, overlap_expert=paired)
    work, held = Work(run, device_named("h100")), layer_rank_parameters(run, 0)
    total = sum(one.seconds for one in gathered_weights(work, held, [], {"forward": 0.0}))
    tokens = Exchange("ep", "dispatch", "forward", 0.0, 0.2 * total, 0.2 * total)
    exchanges = gathered_weights(work, held, [tokens], {"forward": 0.4 * total})
    assert sum(one.exposed_seconds for one in exchanges) == pytest.approx((1 - beside) * total)


def test_without_overlap_every_gathering_is_waited_for():
    run = planned(MOE, 16, Layout(ep=8), fsdp=True, overlap_data=False)
    work, held = Work(run, device_named("h100")), layer_rank_parameters(run, 0)
    exchanges = gathered_weights(work, held, [], {"forward": 1.0, "backward": 1.0})
    assert len(exchanges) == 6 and all(one.exposed_seconds == pytest.approx(one.seconds) for one in exchanges)


@pytest.mark.parametrize(
    "name, widths",
    [("llama3-8b", (32 * 128, 8 * 128, 8 * 128, 32 * 128)), ("deepseek-v3", (128 * 192, 128 * 192, 128 * 128, 128 * 128))],
)
def test_ulysses_starts_four_exchanges(name, widths):
    """Queries, keys, values and the output, each on its own."""
    work = Work(planned(SHAPES[name], 8, Layout(cp=8, cp_kind="ulysses")), device_named("h100"))
    operations = {one.name: one for one in layer_operations(work, 0)}
    seconds = sum(collective_seconds(work.device, "all_to_all", 2 * TOKENS / 8 * width, 8, 8) for width in widths)
    exchanges = [one for one in layer_exchanges(work, 0, operations) if one.axis == "cp"]
    for one in exchanges:
        assert one.count == 4 and one.seconds == one.exposed_seconds == pytest.approx(seconds)
    assert [one.direction for one in exchanges] == ["forward", "backward"]
