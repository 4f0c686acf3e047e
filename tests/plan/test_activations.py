"""Activations of a planned run: what layers keep, for how many micro-batches, and what recomputation drops."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.engine.config import Layout
from strop.engine.plan.activations import kept_bytes, rank_kept_bytes, saved_tensors
from strop.engine.plan.devices import device_named
from strop.engine.plan.layer_time import Work
from strop.engine.plan.memory import training_memory
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.shape import ModelShape

DEEPSEEK, QWEN_30B, LLAMA_8B = SHAPES["deepseek-v3"], SHAPES["qwen3-30b-a3b"], SHAPES["llama3-8b"]


def planned(shape: ModelShape, gpus: int, layout: Layout | None = None, stage_layers=(), **training) -> PlannedRun:
    training.setdefault("global_batch_sequences", 64 * gpus)
    return PlannedRun.of(
        shape, gpus, layout=layout or Layout(), stage_layers=stage_layers, training=TrainingPlan(**training)
    )  # fmt: skip


def test_korthikanti_bytes_per_token():
    """arXiv 2205.05198: 34 s b h bytes a layer with flash attention, of which 2 are dropout masks. Ours: q and k once more,
    rotated (+4); SwiGLU of width 8h/3 keeps 3 x 8/3 x 2 = 16 h, as GELU of width 4h does; and the log-sum-exp."""
    hidden, heads = 3072, 24
    gpt = ModelShape("gpt", 51200, hidden, 4, heads, heads, hidden // heads, 8 * hidden // 3)
    whole = planned(gpt, 8, sequence_length_tokens=2048)
    tokens = 2048
    log_sum_exp = 4 * heads * tokens
    assert kept_bytes(whole, 0) == (34 - 2 + 4) * tokens * hidden + log_sum_exp
    # sequence parallelism divides all of it; tensor parallelism alone leaves 8 of it whole (the paper's 10, with masks)
    split = planned(gpt, 8, Layout(tp=4, sp=True), sequence_length_tokens=2048)
    assert kept_bytes(split, 0) == pytest.approx(kept_bytes(whole, 0) / 4)
    tensor_only = planned(gpt, 8, Layout(tp=4), sequence_length_tokens=2048)
    assert kept_bytes(tensor_only, 0) == pytest.approx((8 + 28 / 4) * tokens * hidden + log_sum_exp / 4)
    full = planned(gpt, 8, recompute=("layer",), sequence_length_tokens=2048)
    assert kept_bytes(full, 0) == 2 * tokens * hidden


def test_a_rank_without_layers_holds_nothing():
    run = planned(QWEN_30B, 64, Layout(pp=4, ep=16), stage_layers=(0, 24, 24, 0), overlap_expert=True)
    first, second = training_memory(run)[:2]
    assert first.parts_bytes["activations"] == 0 < second.parts_bytes["activations"]


def test_copies_of_tokens_are_the_same_in_time_and_memory():
    """Each token goes to top_k experts once, whatever divides the tokens; every etp rank of an expert gets it."""
    for layout in (Layout(ep=8), Layout(tp=4, sp=True, ep=8), Layout(tp=4, sp=True, ep=2, etp=4)):
        run = planned(QWEN_30B, 8, layout)
        assert run.expert_token_copies == Work(run, device_named("h100")).routed_rows
        assert run.expert_token_copies * layout.tp / layout.etp == 4096 * 8
        dispatched = {tensor.name: tensor.size_bytes for tensor in saved_tensors(run, 0)}["dispatched tokens"]
        assert dispatched == run.expert_token_copies * QWEN_30B.hidden_size * 2


def test_parts_name_their_tensors_and_recompute_drops_them():
    run = planned(DEEPSEEK, 256, Layout(pp=16, ep=16))
    moe = {tensor.name: tensor.size_bytes for tensor in saved_tensors(run, 5)}
    assert moe["dispatched tokens"] == 4096 * 8 * 7168 * 2
    assert moe["compressed q and kv, shared key"] == 4096 * (1536 + 512 + 64) * 2
    assert moe["experts' gate and up"] == 2 * moe["experts' SwiGLU output"] == 4096 * 8 * 2 * 2048 * 2
    part = replace(run, training=replace(run.training, recompute=("mla_up_projection",)))
    assert kept_bytes(run, 5) - kept_bytes(part, 5) == 4096 * 128 * (192 + 192 + 128) * 2
    experts = replace(run, training=replace(run.training, recompute=("experts",)))
    dense_mlp = replace(run, training=replace(run.training, recompute=("dense_mlp",)))
    assert kept_bytes(experts, 0) == kept_bytes(run, 0) and kept_bytes(dense_mlp, 5) == kept_bytes(run, 5)
    busy = replace(run, training=replace(run.training, expert_imbalance=1.5))
    assert {t.name: t.size_bytes for t in saved_tensors(busy, 5)}["dispatched tokens"] == 1.5 * moe["dispatched tokens"]


@pytest.mark.parametrize(
    "tp, cp, kind, head_copies",
    [(4, 16, "ulysses", 16), (2, 16, "ulysses", 16), (2, 2, "ulysses", 2), (1, 2, "ulysses", 4), (8, 2, "ring", 1)],
)
def test_keys_and_values_of_context_parallel_ranks(tp, cp, kind, head_copies):
    """4 key-value heads. Ulysses leaves each of tp x cp ranks the whole sequence of one head at least, so of 64 ranks each has
    131,072 tokens x 128 elements x 2 bytes = 32 MiB of keys, 16 times its 8,192 tokens; ring attention its own tokens."""
    layout = Layout(tp=tp, sp=tp > 1, cp=cp, cp_kind=kind, pp=4, ep=8)
    run = planned(SHAPES["qwen3-235b-a22b"], 256, layout, sequence_length_tokens=131072)
    kept = {tensor.name: tensor.size_bytes for tensor in saved_tensors(run, 0)}
    assert run.attended_kv_heads == head_copies
    assert kept["k"] == 131072 // cp * head_copies * 128 * 2
    if kind == "ulysses":
        assert kept["k"] == kept["v"] and kept["k"] >= 131072 * 128 * 2


def test_recomputing_some_layers_or_every_second_product():
    kept = {}
    for recompute, layers in (((), 0), (("layer",), 0), (("layer",), 5), (("every_second_product",), 0)):
        run = planned(LLAMA_8B, 8, recompute=recompute, recompute_layers=layers)
        kept[recompute, layers] = rank_kept_bytes(run)[0]
    nothing, everything = kept[(), 0], kept[("layer",), 0]
    assert kept[("layer",), 5] == pytest.approx(nothing - (nothing - everything) * 5 / 32)
    hidden, key_value, width = LLAMA_8B.hidden_size, 8 * 128, LLAMA_8B.dense_intermediate_size
    some, none = (  # the more layers, the less is kept
        planned(LLAMA_8B, 8, recompute=("every_second_product",), recompute_layers=layers) for layers in (1, 32)
    )
    of_one = (nothing - kept[("every_second_product",), 0]) / 32
    assert rank_kept_bytes(some)[0] == pytest.approx(nothing - of_one)
    assert rank_kept_bytes(none)[0] == kept[("every_second_product",), 0]
    # layer input, q, v, attention's output and log-sum-exp, gate, the down projection's output; and the last norm
    element = 2 * (hidden + hidden + key_value + hidden + width + hidden) + 4 * LLAMA_8B.num_heads
    assert kept[("every_second_product",), 0] == 4096 * (32 * element + 2 * 2 * hidden)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([LLAMA_8B, QWEN_30B, SHAPES["mixtral-8x7b"], DEEPSEEK]),
    pp=st.sampled_from([1, 2, 4]),
    precision=st.sampled_from(["bf16", "fp8-tensorwise", "fp8-blockwise"]),
    tokens=st.sampled_from([1024, 4096, 16384]),
)
def test_recomputing_more_never_keeps_more(shape, pp, precision, tokens):
    layout = Layout(pp=pp, ep=1 if shape.moe is None else 8)

    def kept(*recompute: str) -> list[float]:
        run = planned(shape, 64, layout, precision=precision, sequence_length_tokens=tokens, recompute=recompute)
        return rank_kept_bytes(run)

    selected = ("norms", "activation", "mla_up_projection")[: 3 if shape.mla is not None else 2]
    none, selective, full = kept(), kept(*selected), kept("layer")
    assert all(a >= b >= c for a, b, c in zip(none, selective, full, strict=True))
    peaks = []
    for parts in ((), selected, ("layer",)):
        run = planned(shape, 64, layout, precision=precision, logits="in-place", recompute=parts)
        peaks.append(max(memory.parts_bytes["activations"] for memory in training_memory(run)))
    assert peaks == sorted(peaks, reverse=True)
