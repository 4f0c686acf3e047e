"""What one rank sends while a micro-batch passes a layer, against bytes counted by hand."""

from collections import Counter
from dataclasses import replace

import pytest

from strop.engine.config import Layout
from strop.engine.plan.devices import device_named
from strop.engine.plan.layer_exchange import layer_exchanges
from strop.engine.plan.layer_time import Work, layer_operations
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan

DENSE, LATENT = SHAPES["llama3-70b"], SHAPES["deepseek-v3"]
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
