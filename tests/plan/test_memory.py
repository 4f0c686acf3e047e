"""Memory of a planned run: published states, formulas and peaks, and what must hold of any run."""

import importlib.util
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.engine.config import InputError, Layout
from strop.engine.plan.activations import kept_bytes
from strop.engine.plan.devices import device_named
from strop.engine.plan.facts import parameters, total_parameters
from strop.engine.plan.memory import (
    PARTS,
    StageMemory,
    colocated_rollout_memory,
    communication_bytes,
    fits,
    memory_per_rank,
    outside_bytes,
    training_memory,
    worst_stage,
)
from strop.engine.plan.models import SHAPES
from strop.engine.plan.rollout_memory import (
    generating_weight_bytes,
    rollout_kv_cache_bytes,
    rollout_weight_bytes,
    sequence_cache_bytes,
)
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.shape import ModelShape
from strop.engine.plan.states import layer_rank_parameters, rank_parameters, rank_state_bytes, state_bytes_per_parameter
from strop.engine.plan.validation import problems

DEEPSEEK, QWEN_30B, LLAMA_8B = SHAPES["deepseek-v3"], SHAPES["qwen3-30b-a3b"], SHAPES["llama3-8b"]
BF16_STATES = {"gradient_dtype_bytes": 2, "moment_dtype_bytes": 2}
GIB = 2**30


def memory_rows():
    """MEMORY_ROWS of the benchmarks, which are no package."""
    path = Path(__file__).parents[2] / "benchmarks" / "planner_memory_rows.py"
    spec = importlib.util.spec_from_file_location("planner_memory_rows", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.MEMORY_ROWS


def planned(
    shape: ModelShape, gpus: int, device: str = "h100", stage_layers=(), rollout=None, placement="colocated", **settings
):
    """A run; settings are those of Layout and of TrainingPlan."""
    names = {field.name for field in fields(Layout)}
    layout = Layout(**{name: value for name, value in settings.items() if name in names})
    training = {name: value for name, value in settings.items() if name not in names}
    training.setdefault("global_batch_sequences", 64 * gpus)
    return PlannedRun.of(
        shape, gpus, device=device, layout=layout, stage_layers=stage_layers, training=TrainingPlan(**training),
        rollout=rollout, placement=placement,
    )  # fmt: skip


@pytest.mark.parametrize("row", memory_rows(), ids=lambda row: row.name.replace(" ", "-"))
def test_published_peak(row):
    within = abs(row.error) <= 0.10
    message = f"{row.name}: predicted {row.predicted_gib:.2f} GiB, published {row.published_gib:.2f} ({row.error:+.1%})"
    assert within == (not row.miss), f"{message}; listed as a miss: {row.miss or 'no'}"


def test_published_peaks_together():
    rows = memory_rows()
    errors = sorted(abs(row.error) for row in rows)
    assert len(rows) >= 70 and errors[len(rows) // 2] < 0.03 and errors[-1] < 0.25
    assert sum(bool(row.miss) for row in rows) <= 6


@pytest.mark.parametrize(
    "published_gb, run",
    [
        (58.7, planned(DEEPSEEK, 256, pp=16, ep=16)),
        (39.1, planned(DEEPSEEK, 256, pp=16, ep=16, **BF16_STATES)),
        (26.6, planned(DEEPSEEK, 256, pp=16, ep=16, offload_optimizer=True)),
        (35.0, planned(DEEPSEEK, 512, pp=16, ep=32)),
        (34.2, planned(DEEPSEEK, 128, tp=8, sp=True, pp=4, ep=32, offload_optimizer=True)),
        (21.5, planned(DEEPSEEK, 1024, tp=2, sp=True, pp=8, ep=64, moment_dtype_bytes=2)),
        (17.8, planned(DEEPSEEK, 2048, pp=16, ep=64, moment_dtype_bytes=2)),
        (76.8, planned(QWEN_30B, 8, ep=8)),
        (51.2, planned(QWEN_30B, 8, ep=8, **BF16_STATES)),
        (31.0, planned(QWEN_30B, 8, ep=8, offload_optimizer=True)),
        (43.0, planned(QWEN_30B, 16, ep=16)),
        (42.4, planned(QWEN_30B, 32, ep=8)),
    ],
)
def test_states_of_the_reference_table(published_gb, run):
    """The table shares the layers out evenly (DeepSeek-V3's 61 over 16 ranks: 3.8) and adds one vocabulary matrix; without a
    pipeline there are two, and that is exactly what a rank holds. For DualPipe it counts two FP8 copies of the weights, of one
    stage's parameters (17.8 GB); two whole stages, as `rank_state_bytes` has them, take more."""
    shape, layout = run.shape, run.layout
    counts = parameters(shape)
    dense, expert = state_bytes_per_parameter(run)
    matrix = counts["embedding"] / layout.tp
    vocabulary = matrix if layout.pp > 1 else 2 * matrix
    rest = total_parameters(shape) - counts["experts"] - counts["embedding"] - counts["head"]
    experts = counts["experts"] / (layout.ep * layout.etp * layout.pp)
    even = expert.on_device * experts + dense.on_device * (rest / (layout.tp * layout.pp) + vocabulary)
    assert even / 1e9 == pytest.approx(published_gb, abs=0.06)
    worst = max(
        rank_state_bytes(replace(run, shape=replace(shape, num_mtp_layers=0)), stage).on_device for stage in run.stages()
    )
    if layout.pp == 1:
        assert worst / 1e9 == pytest.approx(published_gb, abs=0.06)


def test_adam_on_8_gpus_does_not_fit_qwen_30b():
    run = planned(QWEN_30B, 8, ep=8, global_batch_sequences=512, recompute=("layer",))
    assert not fits(run)
    assert fits(planned(QWEN_30B, 8, ep=8, global_batch_sequences=512, recompute=("layer",), offload_optimizer=True))
    assert fits(planned(QWEN_30B, 8, ep=8, global_batch_sequences=512, recompute=("layer",), **BF16_STATES))
    bf16_alone = {"master_weights": False, "fsdp": True, "micro_batch_sequences": 4, "logits": "materialized", **BF16_STATES}
    assert fits(planned(QWEN_30B, 8, ep=8, global_batch_sequences=512, recompute=("layer",), **bf16_alone))  # AutoModel's


NVIDIA = {"logits": "in-place", "schedule": "interleaved"}
FP8_NVIDIA = {**NVIDIA, "precision": "fp8-tensorwise", "weights_dtype_bytes": 1, "gradient_dtype_bytes": 2}


@pytest.mark.parametrize(
    "run",
    [
        planned(
            DEEPSEEK, 1024, tp=2, sp=True, pp=8, vpp=4, ep=64, global_batch_sequences=8192, moment_dtype_bytes=2,
            recompute=("mla_up_projection", "dense_mlp"), **FP8_NVIDIA,
        ),
        planned(
            SHAPES["qwen3-235b-a22b"], 256, tp=2, sp=True, pp=8, vpp=4, ep=32, global_batch_sequences=2048,
            gradient_dtype_bytes=2, recompute=("activation", "norms"), overlap_expert=True, **NVIDIA,
        ),
        planned(SHAPES["mixtral-8x22b"], 128, tp=2, sp=True, pp=8, vpp=7, ep=8, global_batch_sequences=256, **NVIDIA),
        planned(
            SHAPES["llama3.1-405b"], 1024, tp=8, sp=True, pp=8, cp=2, vpp=8, sequence_length_tokens=8192,
            global_batch_sequences=1536, **FP8_NVIDIA,
        ),
        planned(
            SHAPES["llama3-70b"], 64, tp=4, sp=True, pp=8, vpp=5, sequence_length_tokens=8192, global_batch_sequences=128,
            **FP8_NVIDIA,
        ),
        planned(
            DEEPSEEK, 256, pp=16, ep=16, stage_layers=(3, *[4] * 14, 2), global_batch_sequences=512,
            sequence_length_tokens=1536, recompute=("layer",),
        ),
    ],
    ids=["DeepSeek-V3 1024", "Qwen3-235B 256", "Mixtral-8x22B 128", "Llama3.1-405B 1024", "Llama3-70B 64", "NeMo-RL V3 256"],
)  # fmt: skip
def test_layouts_that_ran_on_80_gb_fit(run):
    """Measured runs of scale.md, sections 1 and 3, whose memory isn't published: they filled their devices, more or less."""
    worst = worst_stage(memory_per_rank(run))
    assert fits(run) and worst.total_bytes > 0.6 * device_named(run.device).hbm_bytes, worst.parts_bytes


def test_fp8_copies_and_saved_inputs():
    bf16, fp8 = planned(LLAMA_8B, 8), planned(LLAMA_8B, 8, precision="fp8-tensorwise")
    stage = bf16.stages()[0]
    parameters_ = rank_parameters(bf16, stage)
    assert rank_state_bytes(fp8, stage).weights - rank_state_bytes(bf16, stage).weights == 2 * parameters_.matrices
    stored = planned(LLAMA_8B, 8, precision="fp8-tensorwise", weights_dtype_bytes=1)
    assert rank_state_bytes(stored, stage).weights == 2 * parameters_.total
    assert kept_bytes(fp8, 0) < kept_bytes(bf16, 0)


def test_what_tensor_parallelism_leaves_on_every_rank():
    hidden, mla = DEEPSEEK.hidden_size, DEEPSEEK.mla
    layers = [layer_rank_parameters(planned(DEEPSEEK, 64, tp=tp, sp=tp > 1, ep=8), 0) for tp in (1, 2)]
    down = hidden * (mla.q_rank + mla.kv_rank + mla.rope_dim)
    assert layers[1].matrices == (layers[0].matrices - down) / 2 + down
    assert layers[0].rest == layers[1].rest  # norms
    eight, sixteen = (layer_rank_parameters(planned(LLAMA_8B, 32, tp=tp), 0).matrices for tp in (8, 16))
    key_value_head = 2 * LLAMA_8B.hidden_size * LLAMA_8B.head_dim  # 8 KV heads over 16 ranks: one each, as over 8
    assert sixteen - key_value_head == (eight - key_value_head) / 2


def test_phases_of_a_colocated_run():
    rollout = RolloutPlan(tp=2, offload_training=True, memory_fraction=0.8)
    run = planned(QWEN_30B, 32, ep=8, global_batch_sequences=2048, recompute=("layer",), rollout=rollout)
    trained, generated = training_memory(run)[0], colocated_rollout_memory(run)[0]
    assert trained.parts_bytes["rollout_weights"] == trained.parts_bytes["kv_cache"] == 0
    assert generated.parts_bytes["weights"] == generated.parts_bytes["optimizer"] == generated.parts_bytes["gradients"] == 0
    reference = trained.parts_bytes["weights"]
    assert generated.host_bytes == pytest.approx(2 * reference + trained.parts_bytes["optimizer"])
    assert trained.host_bytes == reference and trained.parts_bytes["reference_weights"] == 0
    capacity = device_named(run.device).hbm_bytes
    assert generated.parts_bytes["rollout_weights"] + generated.parts_bytes["kv_cache"] == pytest.approx(0.8 * capacity)
    assert memory_per_rank(run)[0] == max(trained, generated, key=lambda memory: memory.total_bytes)
    kept = replace(run, rollout=replace(rollout, offload_training=False))
    assert fits(run) and not fits(kept)
    assert training_memory(kept)[0].parts_bytes["reference_weights"] == reference
    no_reference = training_memory(replace(run, rollout=replace(rollout, reference=False)))[0]
    assert no_reference.parts_bytes["reference_weights"] == no_reference.host_bytes == 0
    same = {"tp": 1, "ep": 8, "weight_sync": "alias"}
    alias = replace(run, rollout=replace(rollout, offload_training=False, memory_fraction=0.5, **same))
    assert problems(alias) == []
    shared = colocated_rollout_memory(alias)[0]
    assert shared.parts_bytes["rollout_weights"] == 0 and shared.parts_bytes["weights"] == trained.parts_bytes["weights"]
    assert shared.parts_bytes["kv_cache"] == pytest.approx(0.5 * capacity - trained.parts_bytes["weights"])
    assert generating_weight_bytes(alias) == trained.parts_bytes["weights"]


def test_memory_counts_the_micro_batches_that_samples_are_packed_into():
    """8 samples of 1000 tokens make few sequences, whatever batch is named."""
    rollout = RolloutPlan(prompts_per_step=8, group_size=1, mean_response_tokens=1000, memory_fraction=0.5)
    named, other = (
        planned(LLAMA_8B, 8, pp=8, recompute=("layer",), rollout=rollout, global_batch_sequences=batch) for batch in (1, 640)
    )
    assert named == other and named.microbatches < 8
    assert training_memory(named) == training_memory(other)


def test_rollout_gpus_of_a_split_run():
    rollout = RolloutPlan(gpus=32, tp=32, memory_fraction=0.9)
    run = planned(DEEPSEEK, 64, pp=4, ep=8, rollout=rollout, placement="split", global_batch_sequences=64)
    down = 7168 * (1536 + 512 + 64)  # of each layer, on every rank
    router = 58 * (7168 + 1) * 256
    assert rollout_weight_bytes(run) == pytest.approx(2 * ((671.03e9 - 61 * down - router) / 32 + 61 * down + router), rel=1e-4)
    fp8 = replace(run, rollout=replace(rollout, weights_dtype_bytes=1))
    vocabulary = 2 * 129280 * 7168 / 32  # head and embedding keep 16 bits, as router and norms
    saved = rollout_weight_bytes(run) / 2 - vocabulary - router
    assert rollout_kv_cache_bytes(fp8) - rollout_kv_cache_bytes(run) == pytest.approx(saved, rel=1e-3)
    assert sequence_cache_bytes(run, 1000) == pytest.approx(1000 * 70272)
    too_much = replace(run, rollout=replace(rollout, tp=8))
    assert rollout_kv_cache_bytes(too_much) == 0 and not fits(too_much)
    assert all(memory.phase == "training" for memory in memory_per_rank(run))


def test_offloaded_optimizer_is_in_the_hosts_memory():
    here, away = planned(QWEN_30B, 8, ep=8), planned(QWEN_30B, 8, ep=8, offload_optimizer=True)
    on_device, on_host = training_memory(here)[0], training_memory(away)[0]
    assert on_host.parts_bytes["optimizer"] == 0 and on_device.host_bytes == 0
    assert on_host.host_bytes == pytest.approx(on_device.parts_bytes["optimizer"] * 16 / 12)


def test_unknown_device_is_named():
    with pytest.raises(InputError, match="b9000"):
        fits(replace(planned(LLAMA_8B, 8), device="b9000"))


def test_names_carry_their_units():
    names = {field.name for field in fields(StageMemory)} | {name for name in vars(StageMemory) if not name.startswith("_")}
    assert {name for name in names if not name.endswith("_bytes")} == {"stage", "phase"}


powers = st.sampled_from([1, 2, 4, 8])
shapes = st.sampled_from([LLAMA_8B, QWEN_30B, SHAPES["mixtral-8x7b"], DEEPSEEK])


def on_8(shape: ModelShape) -> int:
    """Expert-parallel ranks: 8 where there are experts."""
    return 1 if shape.moe is None else 8


def worst_part(run: PlannedRun, part: str) -> float:
    return max(memory.parts_bytes[part] for memory in training_memory(run))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, tp=powers, pp=st.sampled_from([1, 2, 4]), fsdp=st.booleans())
def test_more_tensor_parallelism_never_raises_weights(shape, tp, pp, fsdp):
    """FSDP at the same dp: of the same GPUs, fewer replicas would share what tensor parallelism doesn't split."""
    gpus = (32 * pp * tp, 64 * pp * tp) if fsdp else (256, 256)
    few, many = (
        planned(shape, count, tp=degree, sp=degree > 1, pp=pp, ep=on_8(shape), fsdp=fsdp)
        for count, degree in zip(gpus, (tp, 2 * tp), strict=True)
    )
    assert worst_part(many, "weights") <= worst_part(few, "weights") * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, dp=powers, tp=st.sampled_from([1, 2, 4]), cp=st.sampled_from([1, 2]))
def test_more_data_parallelism_never_raises_optimizer(shape, dp, tp, cp):
    few, many = (planned(shape, 8 * tp * cp * degree, tp=tp, sp=tp > 1, cp=cp, ep=on_8(shape)) for degree in (dp, 2 * dp))
    assert worst_part(many, "optimizer") <= worst_part(few, "optimizer") * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, sequences=powers, tp=st.sampled_from([1, 2, 4]), schedule=st.sampled_from(["1f1b", "zero-bubble"]))
def test_larger_micro_batches_raise_activations_and_totals_are_sums(shape, sequences, tp, schedule):
    small, large = (
        planned(shape, 64, tp=tp, sp=tp > 1, pp=2, ep=on_8(shape), schedule=schedule, micro_batch_sequences=count)
        for count in (sequences, 2 * sequences)
    )
    for stage in range(2):
        before, after = training_memory(small)[stage], training_memory(large)[stage]
        assert after.parts_bytes["activations"] > before.parts_bytes["activations"]
        assert set(after.parts_bytes) == set(PARTS) and min(after.parts_bytes.values()) >= 0
        assert after.total_bytes == sum(after.parts_bytes.values())
        assert after.allocated_bytes < after.reserved_bytes < after.total_bytes


@pytest.mark.parametrize(
    "layout, buffers_bytes",
    [
        # Keys and values of 8 heads, that attention reads and that arrive: 4 tensors of the block's 2,048 tokens.
        ({"cp": 2}, 4 * 2048 * 8 * 128 * 2),
        ({"cp": 2, "cp_kind": "ulysses"}, 0),
        ({"pp": 2}, 2 * 4096 * 4096 * 2),  # what arrives and what leaves
        # The largest unit is embedding or head: two of them gathered in 16 bits, a gradient in 16 bits and, summed, in 32.
        ({"fsdp": True}, 128_256 * 4096 * (2 + 2 + 2 + 4)),
        # The last of two ranks: head, last norm and 16 layers of 218,112,000, whole in 16 bits with 32-bit gradients.
        ({"fsdp": True, "pp": 2}, (128_256 * 4096 + 4096 + 16 * 218_112_000) * (2 + 4) + 2 * 4096 * 4096 * 2),
    ],
)
def test_buffers_of_collectives(layout, buffers_bytes):
    run = planned(LLAMA_8B, 8, **layout)
    assert communication_bytes(run, run.stages()[-1]) == pytest.approx(buffers_bytes)


@pytest.mark.parametrize(
    "gpus, layout, groups",
    [
        (1, {}, 0),
        (8, {}, 2),  # the world and its replicas
        (8, {"ep": 8}, 3),
        (8, {"tp": 2, "sp": True, "cp": 2, "pp": 2}, 4),
        (64, {"tp": 2, "sp": True, "cp": 2, "pp": 2, "ep": 4}, 6),
    ],
)
def test_every_group_of_ranks_has_buffers_of_nccl(gpus, layout, groups):
    context_and_kernels = 0.52 + 3.0
    assert outside_bytes(planned(QWEN_30B, gpus, **layout)) / GIB == pytest.approx(context_and_kernels + 0.4 * groups)
