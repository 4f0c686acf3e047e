"""Seconds of an optimizer step: what its operations compute, what its parts add up to, and what can only make it longer."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.engine.config import InputError, Layout
from strop.engine.plan import layer_time
from strop.engine.plan.devices import DEVICES, device_named
from strop.engine.plan.efficiency import memory_bound_seconds
from strop.engine.plan.facts import layer_forward_flops_per_token, train_flops_per_token
from strop.engine.plan.layer_time import Work, head_operations, layer_operations
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.states import layer_rank_parameters, rank_parameters
from strop.engine.plan.training import PARTS, chunk_times, layer_pass, train_step
from strop.engine.plan.validation import problems

DENSE, MOE, LATENT = (SHAPES[name] for name in ("llama3-8b", "qwen3-30b-a3b", "deepseek-v3"))


def planned(shape=MOE, gpus=16, device="h100", stage_layers=(), layout=None, **training) -> PlannedRun:
    return PlannedRun.of(
        shape, gpus, device=device, stage_layers=stage_layers, layout=layout or Layout(ep=8), training=TrainingPlan(**training)
    )


RUNS = {
    "one gpu": planned(SHAPES["qwen3-0.6b"], 1, layout=Layout(), global_batch_sequences=4),
    "fsdp": planned(
        DENSE, 8, layout=Layout(), fsdp=True, recompute=("layer",), recompute_layers=5, precision="fp8-tensorwise",
        gradient_dtype_bytes=2,
    ),
    "tensor parallel": planned(DENSE, 8, layout=Layout(tp=4, sp=True), micro_batch_sequences=2),
    "no sequence parallel": planned(DENSE, 8, layout=Layout(tp=4), recompute=("layer",)),
    "ring": planned(DENSE, 16, layout=Layout(tp=2, sp=True, cp=4), sequence_length_tokens=65536, global_batch_sequences=16),
    "ulysses": planned(
        DENSE, 8, layout=Layout(cp=2, cp_kind="ulysses"), recompute=("core_attention",), attention_kernel="flash2"
    ),
    "pipeline": planned(DENSE, 16, layout=Layout(pp=4), stage_layers=(9, 9, 8, 6), logits="materialized"),
    "zero bubble": planned(DENSE, 16, layout=Layout(pp=4, schedule="zero-bubble"), offload_optimizer=True),
    "interleaved": planned(
        MOE, 32, layout=Layout(tp=2, sp=True, pp=4, vpp=3, schedule="interleaved", ep=8), overlap_expert=True
    ),
    "experts": planned(overlap_expert=True, dispatcher="hybridep", cuda_graphs=True),
    "expert tensor parallel": planned(layout=Layout(tp=2, sp=True, ep=4, etp=2), dispatcher="alltoall", compiled=False),
    "windows": planned(SHAPES["gpt-oss-20b"], 8, recompute=("experts", "norms"), expert_imbalance=1.3),
    "dualpipe": planned(
        LATENT, 256, "h800", (4,) * 15 + (1,), Layout(pp=16, ep=16, schedule="dualpipe"), global_batch_sequences=768,
        overlap_expert=True, precision="fp8-blockwise", dispatch_dtype_bytes=1, overlap_data=False,
        recompute=("norms", "activation", "mla_up_projection"),
    ),
    "dualpipev": planned(LATENT, 512, layout=Layout(pp=8, ep=64, schedule="dualpipev"), global_batch_sequences=2048),
}  # fmt: skip


@pytest.fixture
def counting_operations(monkeypatch):
    """A second is an operation of a matrix product, and nothing else takes time."""
    monkeypatch.setattr(layer_time, "gemm_seconds", lambda device, m, n, k, precision: 2 * m * n * k)
    monkeypatch.setattr(layer_time, "grouped_gemm_seconds", lambda device, groups, m, n, k, precision: 2 * groups * m * n * k)
    monkeypatch.setattr(layer_time, "attention_seconds", lambda device, flops, *_: flops)
    monkeypatch.setattr(layer_time, "memory_bound_seconds", lambda *_, **__: 0.0)


@pytest.mark.parametrize("name", ["llama3-8b", "qwen3-30b-a3b", "mixtral-8x7b", "qwen2-57b-a14b", "gpt-oss-20b", "deepseek-v3"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=4, sp=True, cp=2), Layout(ep=4), Layout(tp=2, sp=True, ep=2, etp=2)])
def test_operations_of_a_layer_are_the_models_flops(name, layout, counting_operations):
    shape = SHAPES[name]
    if shape.moe is None and layout.ep > 1:
        layout = Layout(tp=2)
    run = planned(shape, 8, layout=layout)
    work = Work(run, device_named("h100"))
    for layer in (0, 1, shape.num_layers - 1, *range(shape.num_layers, shape.num_layers + shape.num_mtp_layers)):
        operations = layer_operations(work, layer)
        tokens = run.microbatch_tokens / run.layout.tp
        wanted = tokens * layer_forward_flops_per_token(shape, layer, run.training.sequence_length_tokens)
        forward = sum(one.forward_seconds for one in operations)
        # A rank computes the router and MLA's down-projections for its own tokens, as every other product for all; what a gate
        # of one column costs is left out.
        assert forward == pytest.approx(wanted, rel=1e-4)
        products = [one for one in operations if one.name != "core_attention"]
        assert sum(one.backward_weight_seconds for one in products) == pytest.approx(
            sum(one.forward_seconds for one in products)
        )
        assert sum(one.backward_input_seconds for one in products) == pytest.approx(
            sum(one.forward_seconds for one in products)
        )


def test_operations_of_the_head_are_the_models_flops(counting_operations):
    work = Work(planned(DENSE, 8, layout=Layout(tp=2)), device_named("h100"))
    tokens, seconds = 4096, [one.forward_seconds for one in head_operations(work)]
    assert sum(seconds) == 2 * tokens * DENSE.hidden_size * DENSE.vocab_size / 2


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_parts_add_up_and_none_is_negative(run):
    step = train_step(run)
    assert tuple(step.parts_seconds) == PARTS
    assert sum(step.parts_seconds.values()) == step.step_seconds
    assert min(step.parts_seconds.values()) >= -1e-9 * step.step_seconds
    assert len(step.stage_seconds) == run.layout.pp
    tokens_per_second = step.tokens_per_second_per_gpu * run.gpus
    assert tokens_per_second * step.step_seconds == pytest.approx(run.step_tokens)
    flops = train_flops_per_token(run.shape, run.training.sequence_length_tokens, mtp=run.shape.num_mtp_layers > 0)
    assert step.model_flops_per_gpu_per_second == pytest.approx(flops * step.tokens_per_second_per_gpu)
    assert step.model_flops_utilization == step.model_flops_per_gpu_per_second / DEVICES[run.device].bf16_flops_per_second
    for transfer in step.transfers:
        assert 0 <= transfer.exposed_seconds <= transfer.seconds


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_exposed_parts_are_those_of_the_transfers(run):
    step = train_step(run)
    exposed = {
        "exposed_tensor": ("tp",),
        "exposed_context": ("cp",),
        "exposed_expert": ("ep", "etp"),
        "exposed_data": ("zero", "edp"),
    }
    for part, axes in exposed.items():
        seconds = sum(one.exposed_seconds for one in step.transfers if one.axis in axes)
        if part == "exposed_data":  # an embedding on two pipeline ranks
            seconds += sum(one.exposed_seconds for one in step.transfers if (one.axis, one.kind) == ("pp", "all_reduce"))
        assert step.parts_seconds[part] == pytest.approx(seconds, abs=1e-9)
    for one in step.transfers:
        if one.kind == "send_recv" and one.axis == "pp":  # the step also waits for hops between other ranks
            assert one.exposed_seconds == min(step.parts_seconds["exposed_pipeline"], one.seconds)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_without_exchanges_of_experts_nothing_of_them_is_exposed(run):
    step = train_step(run)
    exchanged = any(one.axis in ("ep", "etp") for one in step.transfers)
    assert (step.parts_seconds["exposed_expert"] != 0.0) == exchanged


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_larger_batch_takes_longer_and_no_more_than_in_proportion(run):
    seconds = []
    for factor in (1, 2, 4, 8):
        training = replace(run.training, global_batch_sequences=factor * run.training.global_batch_sequences)
        seconds.append(train_step(replace(run, training=training)).step_seconds)
    for shorter, longer in pairwise(seconds):
        assert shorter < longer <= 2.001 * shorter


SLOWER = {
    "dispatched bytes": ("dualpipe", {"dispatch_dtype_bytes": 2}),
    "imbalance": ("interleaved", {"expert_imbalance": 1.5}),
    "unhidden experts": ("interleaved", {"overlap_expert": False}),
    "unhidden tensors": ("tensor parallel", {"overlap_tensor": False}),
    "unhidden gradients": ("pipeline", {"overlap_data": False}),
    "unhidden weights": ("fsdp", {"overlap_data": False}),
    "gradient bytes": ("fsdp", {"gradient_dtype_bytes": 4}),
    "recomputation": ("tensor parallel", {"recompute": ("layer",)}),
    "partial recomputation": ("tensor parallel", {"recompute": ("norms",)}),
    "selective recomputation": ("fsdp", {"recompute_layers": 6}),
    "half of the products": ("tensor parallel", {"recompute": ("every_second_product",)}),
    "eager": ("tensor parallel", {"compiled": False}),
    "launches": ("experts", {"cuda_graphs": False}),
    "logits": ("tensor parallel", {"logits": "materialized"}),
    "precision": ("dualpipe", {"precision": "bf16"}),
    "offload": ("pipeline", {"offload_optimizer": True}),
    "old attention": ("ring", {"attention_kernel": "flash2"}),
    "copies": ("windows", {"dispatcher": "alltoall"}),
}


@pytest.mark.parametrize("name, changes", SLOWER.values(), ids=SLOWER.keys())
def test_more_work_or_less_overlap_is_never_faster(name, changes):
    run = RUNS[name]
    slower = replace(run, training=replace(run.training, **changes))
    assert not problems(slower)
    assert train_step(slower).step_seconds > train_step(run).step_seconds


@settings(max_examples=40, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 2, 4]),
    ep=st.sampled_from([1, 2, 8]),
    overlap=st.booleans(),
    dispatcher=st.sampled_from(["alltoall", "deepep", "hybridep"]),
    nic=st.floats(1.0, 8.0),
    nvlink=st.floats(1.0, 8.0),
)
def test_slower_links_are_never_faster(tp, pp, ep, overlap, dispatcher, nic, nvlink):
    layout = Layout(tp=tp, sp=tp > 1, pp=pp, ep=ep)
    run = planned(gpus=64, layout=layout, overlap_expert=overlap and ep > 1, dispatcher=dispatcher)
    device = DEVICES["h100"]
    slower = replace(
        device,
        name="slower",
        nic_bytes_per_second=device.nic_bytes_per_second / nic,
        nvlink_bytes_per_second=device.nvlink_bytes_per_second / nvlink,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEVICES, "slower", slower)
        assert train_step(replace(run, device="slower")).step_seconds >= train_step(run).step_seconds - 1e-12


def test_fsdp_casts_gathered_weights_in_every_pass():
    """16-bit weights to FP8, forward and backward; weights that are kept in FP8 need no cast."""
    run = planned(DENSE, 8, layout=Layout(), fsdp=True, precision="fp8-tensorwise")
    kept = replace(run, training=replace(run.training, weights_dtype_bytes=1))
    cast, as_kept = (layer_pass(Work(one, device_named("h100")), 0) for one in (run, kept))
    seconds = memory_bound_seconds(DEVICES["h100"], 6 * layer_rank_parameters(run, 0).matrices)
    for name in ("forward", "backward_input"):
        assert cast.seconds[name, name] - as_kept.seconds[name, name] == pytest.approx(seconds)


@pytest.mark.parametrize(
    "changes, layout",
    [
        ({"fsdp": True, "global_batch_sequences": 64}, Layout(tp=4, sp=True, cp=2)),
        ({"fsdp": True, "global_batch_sequences": 64}, Layout(tp=2, sp=True, cp=4)),
        ({"fsdp": True, "precision": "fp8-blockwise"}, Layout(cp=2)),
        ({"fsdp": True}, Layout()),
    ],
)
def test_a_faster_chip_with_the_same_links_is_never_slower(changes, layout):
    """Even where its weights travel for longer than it computes: they travel beside launches and other waiting too."""
    for shape in (SHAPES["qwen3-4b"], SHAPES["qwen3-14b"]):
        seconds = [train_step(planned(shape, 64, name, layout=layout, **changes)).step_seconds for name in ("h100", "h200")]
        assert seconds[1] <= seconds[0]


def test_twice_the_tokens_are_never_faster_where_gathered_weights_are_slowest():
    seconds = [
        train_step(
            planned(
                SHAPES["qwen3-4b"], 8, "h800", layout=Layout(cp=2), fsdp=True, precision="fp8-blockwise",
                sequence_length_tokens=tokens, global_batch_sequences=64,
            )
        ).step_seconds
        for tokens in (512, 1024, 2048, 4096, 8192)
    ]  # fmt: skip
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    "bytes_moved, states",
    [
        (4 + 2 * 4 + 2 * 8 + 2, {}),
        (4 + 2 * 2 + 2 * 8, {"master_weights": False}),
        (4 + 2 * 4 + 2 * 8, {"weights_dtype_bytes": 4}),
        (2 + 2 * 4 + 2 * 4 + 2, {"gradient_dtype_bytes": 2, "moment_dtype_bytes": 2}),
    ],
)
def test_adam_reads_and_writes_the_states_that_there_are(bytes_moved, states):
    """Gradient, master and moments read, the last three and the weight written; without a master the weight is both."""
    run = planned(DENSE, 1, layout=Layout(), global_batch_sequences=1, **states)
    gradient = run.training.gradient_dtype_bytes
    moved = rank_parameters(run, run.stages()[0]).total * (bytes_moved + 3 * gradient)  # cleared, read for the norm twice
    assert train_step(run).parts_seconds["optimizer"] == pytest.approx(memory_bound_seconds(DEVICES["h100"], moved, 3))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2),
        Layout(pp=4, vpp=4, schedule="interleaved"),
        Layout(pp=4, schedule="dualpipe"),
        Layout(pp=4, schedule="dualpipev"),
    ],
)
def test_recompute_layers_holds_for_the_first_layers_of_each_rank(layout):
    run = planned(DENSE, 8, layout=layout, recompute=("layer",), recompute_layers=3)
    work = Work(run, device_named("h100"))
    one_layer, chunks = layer_pass(work, 0).seconds["forward", "forward"], chunk_times(work)
    for rank in range(layout.pp):
        held = [chunks[chunk] for chunk, ranks in enumerate(run.ranks_of_chunk()) if rank in ranks]
        assert sum(one.seconds["recompute", "backward_input"] for one in held) == pytest.approx(3 * one_layer)


def test_deepseek_v3_on_2048_h800_is_near_its_published_step():
    """19.926 s, arXiv 2505.09343, Table 4; benchmarks/results/planner.md has the parts and every other row."""
    training = {
        "global_batch_sequences": 15360, "precision": "fp8-blockwise", "moment_dtype_bytes": 2,
        "recompute": ("norms", "activation", "mla_up_projection"),
        "overlap_expert": True, "overlap_data": False, "dispatch_dtype_bytes": 1,
    }  # fmt: skip
    run = planned(LATENT, 2048, "h800", (4,) * 15 + (1,), Layout(pp=16, ep=64, schedule="dualpipe"), **training)
    assert train_step(run).step_seconds == pytest.approx(19.926, rel=0.2)


def test_flash_attention_2_is_slower_than_3_where_there_is_a_3():
    """The curve of an A100 is FlashAttention 2's own."""
    for device, slower in (("h100", True), ("a100", False)):
        second, third = (
            train_step(planned(DENSE, 8, device, layout=Layout(), attention_kernel=kernel)) for kernel in ("flash2", "flash3")
        )
        assert (second.step_seconds > third.step_seconds) is slower


def test_fp8_on_a_device_without_it_is_an_input_error():
    with pytest.raises(InputError, match="a100 has no FP8 tensor cores"):
        train_step(replace(planned(precision="fp8-blockwise"), device="a100"))
