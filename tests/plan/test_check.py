"""What a check says of runs that don't work: numbers, and ways out that are true when they are planned again."""

import math
import re
from dataclasses import replace
from functools import cache

import pytest

from strop.engine.config import Layout
from strop.engine.plan.check import check, memory_problems
from strop.engine.plan.devices import DEVICES
from strop.engine.plan.facts import total_parameters
from strop.engine.plan.memory import fits, memory_per_rank, worst_stage
from strop.engine.plan.models import SHAPES
from strop.engine.plan.nearest import LOSSY, Working, fewest_gpus, least_memory_fraction, nearest_that_fit, predict, ways_out
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.states import rank_state_bytes
from strop.engine.plan.text import printed_seconds

HBM_BYTES = DEVICES["h100"].hbm_bytes
RUNS = {
    "own division of layers": PlannedRun.of(SHAPES["qwen3-8b"], 16, layout=Layout(pp=2), stage_layers=(36, 0)),
    "own division, dualpipe": PlannedRun.of(
        SHAPES["qwen3-8b"], 16, layout=Layout(pp=2, schedule="dualpipe"), stage_layers=(30, 6)
    ),
    "GRPO": PlannedRun.of(SHAPES["qwen3-8b"], 8, rollout=RolloutPlan()),
    "GRPO with too small a share": PlannedRun.of(SHAPES["qwen3-8b"], 8, rollout=RolloutPlan(memory_fraction=0.1)),
    "long sequences": PlannedRun.of(SHAPES["qwen3-8b"], 8, training=TrainingPlan(sequence_length_tokens=131072)),
    "experts": PlannedRun.of(SHAPES["qwen3-30b-a3b"], 8, layout=Layout(ep=8)),
    "too little host": PlannedRun.of(
        SHAPES["qwen3-30b-a3b"], 8, host_memory_gib=512, layout=Layout(ep=8),
        training=TrainingPlan(offload_optimizer=True, recompute=("layer",)),
    ),
    "GRPO with too little host": PlannedRun.of(
        SHAPES["qwen3-30b-a3b"], 8, host_memory_gib=1024, layout=Layout(ep=8), rollout=RolloutPlan(tp=2, offload_training=True),
        training=TrainingPlan(offload_optimizer=True, recompute=("layer",)),
    ),
    "a full first stage": PlannedRun.of(SHAPES["qwen3-235b-a22b"], 128, layout=Layout(tp=2, sp=True, pp=8, ep=16)),
    "DualPipe": PlannedRun.of(
        SHAPES["deepseek-v3"], 2048, device="h800", layout=Layout(pp=16, ep=64, schedule="dualpipe"),
        training=TrainingPlan(
            global_batch_sequences=15360, precision="fp8-blockwise", recompute=("norms", "mla_up_projection", "activation"),
            moment_dtype_bytes=2, dispatch_dtype_bytes=1, overlap_expert=True,
        ),
    ),
    "a million tokens": PlannedRun.of(
        SHAPES["qwen3-8b"], 8,
        training=TrainingPlan(2**20, global_batch_sequences=8, recompute=("layer",), fsdp=True),
    ),
    "GRPO of shards": PlannedRun.of(SHAPES["qwen3-8b"], 8, rollout=RolloutPlan(), training=TrainingPlan(fsdp=True)),
    "GRPO with the trainer's weights": PlannedRun.of(SHAPES["qwen3-32b"], 8, rollout=RolloutPlan(weight_sync="alias")),
    "GRPO with one GPU that trains": PlannedRun.of(
        SHAPES["qwen3-8b"], 8, rollout=RolloutPlan(gpus=7), placement="split", training=TrainingPlan(fsdp=True)
    ),
    "interleaved": PlannedRun.of(
        SHAPES["qwen3-14b"], 8, layout=Layout(tp=2, sp=True, pp=2, vpp=4, schedule="interleaved"),
        training=TrainingPlan(micro_batch_sequences=8),
    ),
}  # fmt: skip


def planned_again(run: PlannedRun, flags: str) -> PlannedRun:
    """The run that a person gets by typing these flags behind those of `run`."""
    layout = replace(run.layout, dp=0)
    parts = {"": {}, "layout": {}, "training": {}, "rollout": {}}
    for path, values in re.findall(r"--([\w.-]+)((?: (?!--)\S+)*)", flags):
        section, _, name = path.replace("-", "_").rpartition(".")
        words = values.split()
        if name.startswith("no_"):
            parts[section][name[3:]] = False
        elif not words:
            parts[section][name] = True
        elif name in ("recompute", "stage_layers"):
            parts[section][name] = tuple(int(word) if word.isdigit() else word for word in words)
        else:
            (word,) = words
            parts[section][name] = int(word) if word.isdigit() else float(word) if "." in word else word
    changed = replace(run, **parts[""], layout=replace(layout, **parts["layout"]))
    changed = replace(changed, training=replace(run.training, **parts["training"]))
    if run.rollout is not None:
        changed = replace(changed, rollout=replace(run.rollout, **parts["rollout"]))
    return PlannedRun.of(changed.shape, changed.gpus, **{
        name: getattr(changed, name)
        for name in ("device", "host_memory_gib", "layout", "stage_layers", "training", "rollout", "placement")
    })  # fmt: skip


@cache
def ways_of(name: str) -> list[Working]:
    return nearest_that_fit(RUNS[name], HBM_BYTES)


@pytest.mark.parametrize("name", RUNS)
def test_every_way_that_is_named_is_true_when_planned_again(name):
    run, ways = RUNS[name], ways_of(name)
    assert not fits(run, HBM_BYTES)
    order = [(bool(way.settings & LOSSY), printed_seconds(way.seconds), way.need_bytes) for way in ways]
    assert ways and order == sorted(order)
    for way in ways:
        again = planned_again(run, " ".join(way.flags))
        assert check(again) == []
        assert worst_stage(memory_per_rank(again)).total_bytes == pytest.approx(way.need_bytes)
        assert predict(again).step_seconds == pytest.approx(way.seconds)
        assert f"{way.need_bytes / 2**30:.1f} GiB" in str(way) and "a step" in str(way)


def test_pairs_of_changes_are_all_looked_at():
    """Both phases of this run need too much, so no single change does, and no greedy choice finds the fastest pair."""
    ways = ways_of("GRPO")
    assert all(len(way.settings) == 2 for way in ways)
    known = planned_again(RUNS["GRPO"], "--training.fsdp --rollout.offload-training")
    assert fits(known, HBM_BYTES) and printed_seconds(ways[0].seconds) <= predict(known).step_seconds


def test_a_full_stage_gives_layers_to_others():
    """Of DeepSeek-V3's 61 layers the last of 16 stages has one, beside head and MTP, and each of the others 4. Qwen3-235B's
    first stage keeps most micro-batches, so it must have fewer than an even 12."""
    for name in ("a full first stage", "DualPipe"):
        fastest = ways_of(name)[0]
        assert fastest.settings == {"stage_layers"} and fits(fastest.run, HBM_BYTES)
        assert sum(fastest.run.stage_layers) == RUNS[name].shape.num_layers
    assert ways_of("a full first stage")[0].run.stage_layers[0] < 12
    assert ways_of("DualPipe")[0].run.stage_layers == (*(4,) * 15, 1)


def test_what_changes_no_result_comes_first():
    """bf16 moments print the same seconds as a smaller share of memory, and change what is computed."""
    first, *_, last = ways_of("GRPO of shards")
    assert first.settings == {"rollout.memory_fraction"} and last.settings == {"training.moment_dtype_bytes"}
    assert printed_seconds(first.seconds) >= printed_seconds(last.seconds)


def test_both_kinds_of_context_parallelism_are_tried():
    """A million tokens fit with Ulysses alone."""
    assert {way.run.layout.cp_kind for way in ways_of("a million tokens")} == {"ulysses"}


def test_engines_with_the_trainers_weights_follow_its_layout():
    for way in ways_of("GRPO with the trainer's weights"):
        layout, plan = way.run.layout, way.run.rollout
        assert (layout.tp, layout.pp, layout.ep) == (plan.tp, plan.pp, plan.ep) != (1, 1, 1)
        assert f"--rollout.tp {plan.tp}" in way.flags or layout.tp == 1


def test_where_no_change_is_enough_the_gpus_that_are():
    run = PlannedRun.of(SHAPES["llama3-70b"], 1)
    (problem,) = check(run)
    assert problem.reason.endswith("; no change of up to 4 settings fits on 1 GPU")
    assert not nearest_that_fit(run, HBM_BYTES) and not nearest_that_fit(replace(run, gpus=2), HBM_BYTES)
    for way in problem.nearest:
        assert way.startswith("--gpus 4 --") and check(planned_again(run, way.partition(" (")[0])) == []
    assert ways_out([run], 2**30) == ([], "no change of up to 4 settings fits on 1 GPU, nor on up to 64")


def test_a_lack_of_cache_hides_no_lack_of_the_trainer():
    """An 8B model in 16 bits takes 15.3 GiB, more than 10% of the memory; on 8 GPUs without shards nothing else fits either."""
    cache, trainer = check(RUNS["GRPO with too small a share"])
    assert cache.setting == "rollout.memory_fraction" and "KV cache" in cache.reason and not cache.nearest
    assert trainer.setting == "device" and "stage 0 needs" in trainer.reason
    assert trainer.nearest == tuple(map(str, ways_of("GRPO with too small a share")))


def test_short_sequences_are_not_divided():
    for name, run in RUNS.items():
        if run.training.sequence_length_tokens == 4096:
            assert not any("--layout.cp" in str(way) for way in ways_of(name))


def test_each_phase_that_needs_too_much_is_named():
    (problem,) = check(RUNS["GRPO"])
    assert problem.nearest == tuple(map(str, ways_of("GRPO")))
    assert problem.reason.count("of 79.2 GiB") == 2 and "while generating" in problem.reason


def test_a_share_of_memory_that_is_too_small_is_blamed_itself():
    run = RUNS["GRPO with too small a share"]
    assert memory_problems(run, HBM_BYTES)[0].setting == "rollout.memory_fraction"
    least = least_memory_fraction(run)
    for fraction, enough in ((least + 1e-3, True), (least - 1e-3, False)):
        one = replace(run, rollout=replace(run.rollout, memory_fraction=fraction, offload_training=True, reference=False))
        assert fits(replace(one, training=replace(one.training, fsdp=True)), HBM_BYTES) == enough


def test_fewest_gpus_is_what_all_states_fill():
    run = PlannedRun.of(SHAPES["deepseek-v3"], 8)
    (problem,) = check(run)
    fewest = fewest_gpus(run, HBM_BYTES)
    assert problem.setting == "gpus" and f"fill {fewest} GPUs" in problem.reason
    assert fewest == math.ceil(18 * total_parameters(SHAPES["deepseek-v3"], mtp=True) / HBM_BYTES)
    sharded = PlannedRun.of(SHAPES["deepseek-v3"], 128, layout=Layout(ep=128), training=TrainingPlan(fsdp=True))
    assert rank_state_bytes(sharded, sharded.stages()[0]).on_device >= (fewest - 1) * HBM_BYTES / 128


def test_default_adam_of_30b_does_not_fit_8_gpus_and_the_check_says_what_does():
    """scale.md of the states: 76.8 GB on each of 8 GPUs, before activations and the CUDA context."""
    run = PlannedRun.of(
        SHAPES["qwen3-30b-a3b"], 8, layout=Layout(ep=8),
        training=TrainingPlan(global_batch_sequences=64, recompute=("layer",)),
    )  # fmt: skip
    states = worst_stage(memory_per_rank(run)).parts_bytes
    assert sum(states[part] for part in ("weights", "gradients", "optimizer")) == pytest.approx(76.8e9, rel=0.01)
    (problem,) = check(run)
    assert problem.setting == "device" and "optimizer" in problem.reason
    assert problem.nearest
    for change in problem.nearest:
        need_gib = float(re.search(r"\(([\d.]+) GiB", change)[1])
        assert need_gib * 2**30 <= HBM_BYTES * 1.001


def test_check_names_the_wrong_degree():
    run = PlannedRun(
        SHAPES["llama3-8b"], 12, layout=Layout(tp=6, sp=True, dp=2), training=TrainingPlan(global_batch_sequences=12)
    )
    assert any(problem.setting == "layout.tp" and problem.nearest for problem in check(run))


def test_gpus_that_generate_hold_nothing_of_a_split_trainer():
    """DeepSeek-V3's states, 18 bytes a parameter, fill 146 of 160 GPUs, and 128 train."""
    rollout = RolloutPlan(gpus=32, tp=32, weights_dtype_bytes=1)
    run = PlannedRun.of(
        SHAPES["deepseek-v3"], 160, layout=Layout(ep=128), placement="split", rollout=rollout,
        training=TrainingPlan(fsdp=True),
    )  # fmt: skip
    assert 128 < fewest_gpus(run, HBM_BYTES) < 160
    problem = memory_problems(run, HBM_BYTES)[0]
    assert problem.setting == "gpus" and "and 128 train" in problem.reason
