"""Every mistake of a planned run is named with its number, and what is proposed instead does fit."""

import dataclasses
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from strop.engine.config import InputError, Layout
from strop.engine.plan.models import SHAPES
from strop.engine.plan.run import PlannedRun, RolloutPlan, TrainingPlan
from strop.engine.plan.validation import problems

GRPO = {"rollout": RolloutPlan()}
ALIAS = {"rollout.weight_sync": "alias"}
SPLIT = {"placement": "split", "rollout": RolloutPlan(gpus=16), "training.global_batch_sequences": 240}


def changed(run: PlannedRun, settings_: dict[str, Any]) -> PlannedRun:
    """The run with other settings, named as in Problem.setting; whole parts before their fields."""
    for path, value in settings_.items():
        part, _, name = path.partition(".")
        run = dataclasses.replace(run, **{part: dataclasses.replace(getattr(run, part), **{name: value}) if name else value})
    return run


def found(model: str, gpus: int, settings_: dict[str, Any]) -> list[str]:
    return [str(problem) for problem in problems(changed(PlannedRun(SHAPES[model], gpus), settings_))]


@pytest.mark.parametrize(
    ("model", "gpus", "settings_"),
    [
        ("llama3-8b", 1, {}),
        ("llama3-8b", 64, {"layout.tp": 8, "layout.sp": True, "layout.cp": 2, "layout.cp_kind": "ulysses"}),
        ("llama3-8b", 64, {"layout.tp": 32}),  # 8 key/value heads, each copied four times
        ("deepseek-v3", 2048, {"layout": Layout(pp=16, schedule="dualpipe", ep=64), "training.global_batch_sequences": 15360}),
        ("deepseek-v3", 1024, {"layout": Layout(tp=2, sp=True, pp=8, vpp=4, schedule="interleaved", ep=64),
                               "stage_layers": (7, 8, 8, 8, 8, 8, 8, 6), "training.global_batch_sequences": 8192}),
        ("qwen3-235b-a22b", 256, {"layout": Layout(tp=2, sp=True, pp=32, vpp=3, schedule="interleaved", ep=8),
                                  "stage_layers": (2, *(3,) * 30, 2), "training.global_batch_sequences": 2048}),
        ("deepseek-v3", 256, {"layout": Layout(pp=16, ep=16), **GRPO, "rollout.tp": 32}),
        ("deepseek-v3", 512, {"layout": Layout(pp=16, ep=16), "placement": "split",
                              "rollout": RolloutPlan(gpus=256, tp=32, steps_ahead=1, weight_sync="reshard")}),
        ("qwen3-30b-a3b", 8, {"layout": Layout(tp=4, sp=True, ep=8), **GRPO, "rollout.ep": 8, "rollout.tp": 4}),
        ("qwen3-30b-a3b", 8, {"layout": Layout(tp=4, sp=True, ep=1, etp=4)}),
        # Engines generate with the trainer's own weights.
        ("qwen3-8b", 16, {"layout": Layout(tp=2, sp=True, cp=2, pp=2), **GRPO, **ALIAS, "rollout.tp": 2, "rollout.pp": 2}),
        ("qwen3-30b-a3b", 16, {"layout": Layout(ep=8), **GRPO, **ALIAS, "rollout.ep": 8}),
        ("qwen3-8b", 1, {**GRPO, **ALIAS, "training.fsdp": True}),
        # Samples follow the schedule, whatever batch is named.
        ("llama3-8b", 64, {"layout": Layout(pp=8, schedule="dualpipe"), **GRPO, "training.global_batch_sequences": 7}),
    ],
)  # fmt: skip
def test_runs_that_work(model: str, gpus: int, settings_: dict[str, Any]) -> None:
    assert found(model, gpus, settings_) == []


VALUES = [
    ("gpus", 0, 1), ("steps", 0, 1), ("layout.tp", 0, 1), ("layout.etp", -1, 1), ("layout.vpp", 0, 1),
    ("training.sequence_length_tokens", 0, 1), ("training.global_batch_sequences", 0, 1),
    ("training.micro_batch_sequences", 0, 1), ("training.expert_imbalance", 0.9, 1),
    ("training.recompute_layers", -1, 0),
    ("training.packed_length_tokens", -1, 0), ("rollout.prompts_per_step", 0, 1), ("rollout.group_size", 0, 1),
    ("rollout.prompt_tokens", 0.0, 1), ("rollout.mean_response_tokens", 0.5, 1), ("rollout.tp", 0, 1), ("rollout.ep", 0, 1),
    ("rollout.max_sequences", 0, 1), ("rollout.speculative_tokens", 0.0, 1), ("rollout.optimizer_steps", 0, 1),
    ("rollout.train_epochs", 0, 1), ("rollout.response_spread", -0.1, 0), ("rollout.steps_ahead", -1, 0),
    ("rollout.reward_seconds", -1.0, 0), ("rollout.gpus", -1, 0),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "value", "least"), VALUES)
def test_values_below_what_is_possible(setting: str, value: float, least: int) -> None:
    flag = "--" + setting.replace("_", "-")
    message = f"{flag} {value}: must be at least {least}; nearest allowed: {least}"
    assert message in found("qwen3-30b-a3b", 64, {**GRPO, setting: value})


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"training.precision": "fp8"}, "--training.precision fp8: must be fp32 or bf16 or fp8-tensorwise or fp8-blockwise"),
        ({"training.recompute": ("norms", "norm")}, "--training.recompute norm: must be norms or activation or"),
        ({"layout.cp_kind": "rings"}, "--layout.cp-kind rings: must be ring or ulysses"),
        ({"placement": "apart"}, "--placement apart: must be colocated or split"),
        ({**GRPO, "rollout.weight_sync": "copy"}, "--rollout.weight-sync copy: must be alias or local_copy or"),
        ({"training.weights_dtype_bytes": 3}, "--training.weights-dtype-bytes 3: must be 1 or 2 or 4 bytes"),
        ({"training.gradient_dtype_bytes": 1}, "--training.gradient-dtype-bytes 1: must be 2 or 4 bytes"),
        ({"training.moment_dtype_bytes": 8}, "--training.moment-dtype-bytes 8: must be"),
        ({"training.dispatch_dtype_bytes": 4}, "--training.dispatch-dtype-bytes 4: must be 1 or 2"),
        ({**GRPO, "rollout.weights_dtype_bytes": 3}, "--rollout.weights-dtype-bytes 3: must be 0.5 or 1"),
        ({**GRPO, "rollout.kv_dtype_bytes": 0}, "--rollout.kv-dtype-bytes 0: must be"),
        ({**GRPO, "rollout.memory_fraction": 0.0}, "--rollout.memory-fraction 0.0: a share"),
        ({**GRPO, "rollout.memory_fraction": 1.1}, "--rollout.memory-fraction 1.1: a share"),
        # Contradictions, and settings without effect.
        ({"training.precision": "fp32"}, "--training.weights-dtype-bytes 2: precision fp32 has weights of 4 bytes"),
        ({"training.packed_length_tokens": 8192}, "--training.packed-length-tokens 8192: what is packed into 4096"),
        ({"training.recompute": ("norms", "layer")}, "nearest allowed: --training.recompute layer"),
        ({"training.recompute_layers": 4}, "--training.recompute-layers 4: has no effect without training.recompute"),
        ({"training.overlap_expert": True}, "--training.overlap-expert: llama3-8b has no experts"),
        ({"training.expert_imbalance": 4}, "--training.expert-imbalance 4: llama3-8b has no experts; nearest allowed: 1"),
        ({"training.dispatch_dtype_bytes": 1}, "--training.dispatch-dtype-bytes 1: llama3-8b has no experts; nearest"),
        ({"training.overlap_expert": True, "layout.pp": 2, "layout.schedule": "zero-bubble"},
         "--layout.schedule zero-bubble: has no pairs of passes for training.overlap_expert"),
        ({"layout.sp": True}, "and layout.tp is 1; nearest allowed: --layout.no-sp"),
        ({"layout.cp_kind": "ulysses"}, "--layout.cp-kind ulysses: has no effect while layout.cp is 1; nearest"),
        ({"layout.schedule": "dualpipe"}, "--layout.schedule dualpipe: has no effect while layout.pp is 1"),
        ({"layout.vpp": 2}, "--layout.vpp 2: has no effect while layout.pp is 1"),
        ({"layout.pp": 4, "layout.vpp": 2}, "has no effect while layout.schedule is 1f1b, not interleaved"),
        ({"layout.pp": 4, "layout.schedule": "dualpipev", "layout.vpp": 2}, "while layout.schedule is dualpipev"),
        ({"layout.pp": 4, "layout.schedule": "interleaved"}, "--layout.vpp 1: schedule interleaved needs several"),
        ({"layout.ep": 8}, "--layout.ep 8: llama3-8b has no experts; nearest allowed: 1"),
        ({"layout.etp": 2}, "--layout.etp 2: llama3-8b has no experts"),
        ({"placement": "split"}, "--placement split: nothing is generated"),
        ({**GRPO, "rollout.gpus": 8}, "--rollout.gpus 8: with colocated placement all GPUs generate; nearest allowed: 0"),
        ({**GRPO, "rollout.steps_ahead": 1}, "--rollout.steps-ahead 1: with colocated placement generation waits"),
        ({**GRPO, "placement": "split"}, "--rollout.gpus 0: with split placement some of the 64 GPUs generate"),
        ({**SPLIT, "rollout.gpus": 64}, "--rollout.gpus 64: with split placement some of the 64"),
        ({**SPLIT, "rollout.weight_sync": "alias"}, "--rollout.weight-sync alias: with split placement weights come from"),
        ({**SPLIT, "rollout.offload_training": True}, "--rollout.offload-training: with split placement nobody waits"),
        ({**GRPO, "rollout.mean_response_tokens": 5000.0}, "--rollout.mean-response-tokens 5000.0: responses are cut at 3840"),
        ({**GRPO, "rollout.max_response_tokens": 4096},
         "--training.sequence-length-tokens 4096: a prompt of 256 tokens and a response of up to 4096 must fit; "
         "nearest allowed: 4352"),
        ({**GRPO, "rollout.speculative_tokens": 1e6}, "--rollout.speculative-tokens 1000000.0: a step accepts no more than"),
        ({**GRPO, "rollout.ep": 2, "rollout.max_sequences": 0}, "--rollout.max-sequences 0: must be at least 1"),
        # Numbers that are none.
        ({"training.expert_imbalance": float("nan")}, "--training.expert-imbalance nan: must be a finite number; nearest"),
        ({**GRPO, "rollout.reward_seconds": float("inf")}, "--rollout.reward-seconds inf: must be a finite number"),
        ({**GRPO, "rollout.response_spread": 50.0}, "--rollout.response-spread 50.0: is the standard deviation of a logarithm"),
        ({"gpus": 8.5}, "--gpus 8.5: must be a whole number; nearest allowed: 8"),
        ({"layout.tp": 0.2}, "--layout.tp 0.2: must be a whole number; nearest allowed: 1"),
        # What the model or the device doesn't have.
        ({"training.recompute": ("norms", "mla_up_projection")},
         "names a part twice, or one that llama3-8b doesn't have; nearest allowed: --training.recompute norms"),
        ({"training.recompute": ("norms", "norms")}, "names a part twice"),
        ({"training.resident_gradients": True}, "resident-gradients: has no effect without a rollout"),
        ({"training.weights_dtype_bytes": 1}, "--training.weights-dtype-bytes 1: precision bf16 has weights of 2 or 4 bytes"),
        ({"training.precision": "fp8-tensorwise", "device": "a100"}, "--training.precision fp8-tensorwise: a100 has no FP8"),
        ({**GRPO, "device": "a100", "rollout.weights_dtype_bytes": 1}, "--rollout.weights-dtype-bytes 1: a100 has no FP8"),
        # weight_sync alias and local_copy: the engines' layout is the trainer's.
        ({**GRPO, **ALIAS, "layout.tp": 8}, "--rollout.tp 1: weight_sync alias generates with the weights that a GPU trains, "
         "and layout.tp is 8; nearest allowed: 8"),
        ({**GRPO, **ALIAS, "layout.pp": 4}, "--rollout.pp 1: weight_sync alias"),
        ({**GRPO, **ALIAS, "training.fsdp": True}, "--rollout.weight-sync alias: weight_sync alias generates with the weights "
         "that a GPU trains, and training.fsdp leaves it a shard; nearest allowed: reshard"),
        ({**GRPO, **ALIAS, "rollout.weights_dtype_bytes": 1}, "--rollout.weights-dtype-bytes 1: weight_sync alias"),
        ({**GRPO, **ALIAS, "layout": Layout(pp=4, vpp=2, schedule="interleaved"), "rollout.pp": 4},
         "schedule interleaved leaves it no consecutive layers; nearest allowed: reshard"),
        ({**GRPO, "rollout.weight_sync": "local_copy", "rollout.tp": 2}, "--rollout.tp 2: weight_sync local_copy generates"),
        ({**GRPO, "rollout.optimizer_steps": 3},
         "--rollout.optimizer-steps 3: 1024 samples don't divide into as many mini-batches; "
         "nearest allowed: 2 or 4"),
    ],
)  # fmt: skip
def test_contradictions_of_a_dense_run(settings_: dict[str, Any], message: str) -> None:
    assert [text for text in found("llama3-8b", 64, settings_) if message in text], found("llama3-8b", 64, settings_)


INTERLEAVED = Layout(pp=8, vpp=4, schedule="interleaved")


@pytest.mark.parametrize(
    ("model", "gpus", "settings_", "messages"),
    [
        ("llama3-8b", 100, {"layout": Layout(tp=8, pp=4)},
         ["--layout.tp 8: 100 training GPUs can't hold tp 8 x cp 1 x pp 4 = 32; nearest allowed: 1, or --gpus 96 or 128"]),
        # Colocated engines of 16 GPUs and a trainer of tp 8 both fill 96 GPUs and 112.
        ("llama3-8b", 100, {"layout": Layout(tp=8), **GRPO, "rollout.tp": 16},
         ["--layout.tp 8: 100 training GPUs can't hold tp 8 x cp 1 x pp 1 = 8; nearest allowed: 4, or --gpus 96 or 112"]),
        # 16 GPUs would hold 16 ranks, but the layers wouldn't fill them.
        ("qwen2.5-7b", 12, {"layout": Layout(pp=16, schedule="dualpipev")},
         ["--layout.pp 16: 28 layers don't fill as many ranks of two chunks; nearest allowed: 12"]),
        # pp 48 would leave 4 GPUs a stage, which etp 3 doesn't divide.
        ("qwen3-30b-a3b", 192, {"layout": Layout(pp=64, etp=3), "training.global_batch_sequences": 192},
         ["--layout.pp 64: 48 layers don't fill as many ranks; nearest allowed: 32"]),
        ("llama3-8b", 1, {"layout.ep": 2, "layout.etp": 2},
         ["--layout.ep 2: llama3-8b has no experts; nearest allowed: 1", "--layout.etp 2: llama3-8b has no experts"]),
        ("qwen3-30b-a3b", 16, {"layout": Layout(tp=3, ep=6)},
         ["--layout.tp 3: doesn't divide 32 heads, doesn't divide 151936 tokens of the vocabulary, 4 key/value heads",
          "with experts, tensor-parallel ranks divide",
          "--layout.ep 6: doesn't divide 128 experts; nearest allowed: 4 or 8"]),
        ("qwen3-30b-a3b", 16, {"layout.cp": 3},
         ["--layout.cp 3: a sequence of 4096 tokens doesn't divide into 2 parts a rank; nearest allowed: 2 or 4"]),
        ("qwen3-8b", 8, {"layout.pp": 3, "layout.schedule": "dualpipe"},
         ["--layout.pp 3: schedule dualpipe pairs the ranks; nearest allowed: 2 or 4"]),
        ("qwen3-8b", 7, {"layout.tp": 5},
         ["--layout.tp 5: doesn't divide 32 heads, doesn't divide 151936 tokens of the vocabulary, doesn't"]),
        ("qwen3-8b", 7, {"layout.tp": 2, "layout.cp": 3},
         ["--gpus 7: 7 training GPUs can't hold tp 2 x cp 3 x pp 1 = 6", "--layout.cp 3: a sequence of 4096 tokens doesn't"]),
        ("qwen3-30b-a3b", 16, {"layout.etp": 3},
         ["--layout.etp 3: ep x etp = 3 doesn't divide dp x cp x tp = 16; nearest allowed: 2 or 4"]),
        ("llama3-8b", 60, {**SPLIT, "layout.tp": 8},
         ["--layout.tp 8: 44 training GPUs can't hold tp 8 x cp 1 x pp 1 = 8; nearest allowed: 4, or --gpus 56 or 64"]),
        ("llama3-8b", 64, {"layout": Layout(tp=8, dp=4)},
         ["--layout.dp 4: 64 training GPUs with tp 8 x cp 1 x pp 1 give another number of replicas; nearest allowed: 8"]),
        ("qwen3-30b-a3b", 16, {"layout": Layout(pp=2, ep=16)},
         ["--layout.ep 16: ep x etp = 16 doesn't divide dp x cp x tp = 8; nearest allowed: 8"]),
        ("qwen3-30b-a3b", 96, {"layout.ep": 3, "training.global_batch_sequences": 96},
         ["--layout.ep 3: doesn't divide 128 experts; nearest allowed: 2 or 4"]),
        ("gpt-oss-20b", 49, {"layout.tp": 7, "layout.etp": 7},
         ["--layout.tp 7: doesn't divide 64 heads, doesn't divide 201088 tokens of the vocabulary, 8 key/value heads",
          "with experts, tensor-parallel ranks divide",
          "--layout.etp 7: doesn't divide 2880 columns of an expert; nearest allowed: 1",
          "--training.global-batch-sequences 256"]),
        ("qwen2.5-7b", 48, {"layout.tp": 16},
         ["--layout.tp 16: doesn't divide 28 heads; nearest allowed: 4", "--training.global-batch"]),
        ("qwen2-57b-a14b", 8, {"layout.tp": 8},
         ["--layout.tp 8: doesn't divide 28 heads; nearest allowed: 4", "with experts, tensor-parallel ranks divide"]),
        ("qwen3-30b-a3b", 16, {"training.overlap_expert": True, "training.dispatch_dtype_bytes": 1,
                               "training.expert_imbalance": 1.5, "training.recompute": ("dense_mlp",)},
         ["names a part twice, or one that qwen3-30b-a3b doesn't have"]),
        ("qwen3-30b-a3b", 16, {"training.overlap_expert": True, "training.dispatch_dtype_bytes": 1,
                               "training.expert_imbalance": 1.5},
         ["--training.expert-imbalance 1.5: the busiest of ep 1 ranks gets 1 times the mean at most; nearest allowed: 1",
          "overlap-expert: has no effect while layout.ep is 1", "--training.dispatch-dtype-bytes 1: has no"]),
        ("qwen3-30b-a3b", 16, {"training.recompute": ("every_second_product",)},
         ["every_second_product counts the products of a dense Llama layer; qwen3-30b-a3b has other ones"]),
        ("qwen3-30b-a3b", 16, {"layout.ep": 4, **GRPO, **ALIAS},
         ["--rollout.ep 1: weight_sync alias generates with the weights that a GPU trains, and layout.ep is 4"]),
        ("qwen3-30b-a3b", 16, {"layout": Layout(tp=2, sp=True), **GRPO, **ALIAS, "rollout.tp": 2},
         ["--layout.etp 1: weight_sync alias generates with the weights that a GPU trains; engines of tp 2 and ep 1 split"]),
        ("qwen3-30b-a3b", 64, {**GRPO, "rollout.ep": 8, "rollout.max_sequences": 4},
         ["--rollout.max-sequences 4: an engine of ep 8 and tp 1 has 8 replicas"]),
        ("llama3-8b", 64, {"layout": Layout(tp=8, sp=True), "training.sequence_length_tokens": 4100},
         ["--layout.tp 8: doesn't divide 4100 tokens of a micro-batch; nearest allowed: 4"]),
        ("llama3-8b", 64, {"layout.cp": 4, "training.sequence_length_tokens": 4100},
         ["--layout.cp 4: a sequence of 4100 tokens doesn't divide into 2 parts a rank; nearest allowed: 2"]),
        ("llama3-8b", 64, {"layout": Layout(tp=8, cp=8, cp_kind="ulysses")},
         ["--layout.cp 8: ulysses divides 32 heads by tp x cp = 64, which doesn't go; nearest allowed: 4"]),
        ("llama3-8b", 64, {"layout.cp": 8, "layout.cp_kind": "ulysses", "training.sequence_length_tokens": 4100},
         ["--layout.cp 8: doesn't divide a sequence of 4100 tokens; nearest allowed: 4"]),
        ("llama3-8b", 64, {"layout.pp": 64}, ["--layout.pp 64: 32 layers don't fill as many ranks; nearest allowed: 32"]),
        ("llama3-8b", 64, {"layout.pp": 32, "layout.schedule": "dualpipev"},
         ["--layout.pp 32: 32 layers don't fill as many ranks of two chunks; nearest allowed: 16"]),
        ("llama3-8b", 60, {"layout.pp": 5, "layout.schedule": "dualpipe", "training.global_batch_sequences": 240},
         ["--layout.pp 5: schedule dualpipe pairs the ranks; nearest allowed: 4 or 6"]),
        ("llama3-8b", 64, {"layout": dataclasses.replace(INTERLEAVED, vpp=6)},
         ["--layout.vpp 6: a rank with 4 layers doesn't fill as many chunks; nearest allowed: 4"]),
        ("qwen3-8b", 64, {"training.recompute": ("layer",), "training.recompute_layers": 100},
         ["--training.recompute-layers 100: no rank has more than 36 layers; nearest allowed: 36"]),
        ("llama3-8b", 64, {"layout.pp": 4, "stage_layers": (8, 8, 16)},
         ["--stage-layers 8 8 16: is for 3 ranks, and layout.pp is 4"]),
        ("llama3-8b", 64, {"layout.pp": 4, "stage_layers": (8, 8, 9, 8)},
         ["--stage-layers 8 8 9 8: has 33 layers in all; llama3-8b has 32; nearest allowed: --stage-layers 8 8 9 7"]),
        ("llama3-8b", 64, {"layout.pp": 4, "stage_layers": (16, -1, 9, 8)},
         ["--stage-layers 16 -1 9 8: a rank has 0 layers"]),
        ("llama3-8b", 64, {"layout.pp": 4, "stage_layers": (16, 0, 8, 8)}, ["--stage-layers 16 0 8 8: leaves a rank"]),
        ("llama3-8b", 64, {"training.global_batch_sequences": 100},
         ["100: doesn't divide into micro-batches of 1 on 64 replicas; nearest allowed: 64 or 128"]),
        ("llama3-8b", 64, {"training.micro_batch_sequences": 8},
         ["--training.micro-batch-sequences 8: a batch of 256 doesn't divide into micro-batches of 8 on 64 replicas; "
          "nearest allowed: 4, or --training.global-batch-sequences 512"]),
        ("llama3-8b", 64, {"layout": INTERLEAVED, "training.global_batch_sequences": 96},
         ["gives 12 micro-batches a replica; schedule interleaved needs a multiple of pp = 8; nearest allowed: 64 or 128"]),
        ("llama3-8b", 64, {"layout": Layout(pp=8, schedule="dualpipe"), "training.global_batch_sequences": 64},
         ["8 micro-batches a replica; schedule dualpipe needs an even number of at least 2 x pp = 16; nearest allowed: 128"]),
        ("llama3-8b", 64, {"layout": Layout(pp=8, schedule="dualpipe"), "training.global_batch_sequences": 136},
         ["gives 17 micro-batches a replica; schedule dualpipe needs an even number"]),
        ("llama3-8b", 64, {"layout": Layout(pp=8, schedule="dualpipev"), "training.global_batch_sequences": 120},
         ["gives 15 micro-batches a replica; schedule dualpipev needs at least 2 x pp = 16; nearest allowed: 128"]),
        ("llama3-8b", 48, {**GRPO, "rollout.tp": 6, "training.global_batch_sequences": 240},
         ["--rollout.tp 6: doesn't divide 32 heads, doesn't divide 14336 columns of a dense MLP, 8 key/value heads neither"]),
        ("qwen3-30b-a3b", 64, {**GRPO, "rollout.tp": 32}, []),
        ("qwen3-30b-a3b", 60, {**GRPO, "rollout.ep": 10, "training.global_batch_sequences": 240},
         ["--rollout.ep 10: must divide 128 experts and be a multiple of rollout.tp 1; nearest allowed: 4"]),
        ("qwen3-30b-a3b", 64, {**GRPO, "rollout.ep": 2, "rollout.tp": 4},
         ["--rollout.ep 2: must divide 128 experts and be a multiple of rollout.tp 4; nearest allowed: 1 or 4"]),
        ("llama3-8b", 64, {**GRPO, "rollout.ep": 8}, ["--rollout.ep 8: llama3-8b has no experts; nearest allowed: 1"]),
        ("llama3-8b", 64, {**GRPO, "rollout.pp": 64},
         ["--rollout.pp 64: 32 layers don't fill as many ranks; nearest allowed: 32"]),
        ("llama3-8b", 24, {**GRPO, "rollout.tp": 16, "training.global_batch_sequences": 240},
         ["--rollout.tp 16: engines take max(tp 16, ep 1) x pp 1 = 16 GPUs each, and 24 generate; "
          "nearest allowed: 8, or --gpus 16 or 32"]),
        ("llama3-8b", 64, {**SPLIT, "rollout.gpus": 12, "rollout.tp": 8, "training.global_batch_sequences": 260},
         ["--rollout.tp 8: engines take max(tp 8, ep 1) x pp 1 = 8 GPUs each, and 12 generate; "
          "nearest allowed: 4, or --rollout.gpus 8 or 16"]),
        # The GPUs and the batch are what a person has: a degree or the micro-batch is what is wrong.
        ("qwen3-235b-a22b", 64, {"layout": Layout(pp=7, ep=8)},
         ["--layout.pp 7: 64 training GPUs can't hold tp 1 x cp 1 x pp 7 = 7; nearest allowed: 4 or 8, or --gpus 63 or 70"]),
        ("llama3-70b", 12, {"layout.tp": 8},
         ["--layout.tp 8: 12 training GPUs can't hold tp 8 x cp 1 x pp 1 = 8; nearest allowed: 4, or --gpus 8 or 16"]),
        ("llama3-8b", 64, {"layout": Layout(pp=10), "stage_layers": (3,) * 8 + (4, 4)},
         ["--gpus 64: 64 training GPUs can't hold tp 1 x cp 1 x pp 10 = 10; nearest allowed: 60 or 70"]),
        ("qwen3-30b-a3b", 8, {"layout.ep": 8, **GRPO, "rollout.tp": 16},
         ["--rollout.tp 16: engines take max(tp 16, ep 1) x pp 1 = 16 GPUs each, and 8 generate; "
          "nearest allowed: 8, or --gpus 16"]),
        ("qwen3-30b-a3b", 8, {"layout.ep": 8, **GRPO, "rollout.tp": 3},
         ["--rollout.tp 3: doesn't divide 32 heads, 4 key/value heads neither divide by it nor can all be copied "
          "equally often; nearest allowed: 2 or 4"]),
        ("qwen3-30b-a3b", 8, {"layout.ep": 8, **GRPO, "rollout.tp": 8, "rollout.pp": 3},
         ["--rollout.pp 3: engines take max(tp 8, ep 1) x pp 3 = 24 GPUs each, and 8 generate; "
          "nearest allowed: 1, or --gpus 24"]),
        ("qwen3-4b", 8, {"training.micro_batch_sequences": 64},
         ["--training.micro-batch-sequences 64: a batch of 256 doesn't divide into micro-batches of 64 on 8 replicas; "
          "nearest allowed: 32, or --training.global-batch-sequences 512"]),
        ("qwen3-32b", 8, {"layout.cp": 8, "training.sequence_length_tokens": 1000003, "training.global_batch_sequences": 8},
         ["nearest allowed: 1, or --training.sequence-length-tokens 1000000 or 1000016"]),
    ],
)  # fmt: skip
def test_what_does_not_divide(model: str, gpus: int, settings_: dict[str, Any], messages: list[str]) -> None:
    texts = found(model, gpus, settings_)
    assert len(texts) == len(messages) and all(part in text for part, text in zip(messages, texts, strict=True)), texts


@settings(max_examples=200, deadline=None)
@given(
    model=st.sampled_from(["llama3-8b", "qwen2.5-7b", "gpt-oss-20b", "qwen3-30b-a3b", "deepseek-v3"]),
    gpus=st.sampled_from([1, 6, 8, 12, 48, 64, 100, 256]),
    degrees=st.tuples(*[st.sampled_from([1, 1, 1, 2, 3, 4, 6, 8, 16])] * 6),
    schedule=st.sampled_from(["1f1b", "interleaved", "zero-bubble", "dualpipe", "dualpipev"]),
    cp_kind=st.sampled_from(["ring", "ulysses"]),
    sizes=st.tuples(st.sampled_from([4096, 4100]), st.sampled_from([64, 100, 256, 480]), st.sampled_from([1, 2, 3])),
    rollout=st.none() | st.builds(
        RolloutPlan, gpus=st.sampled_from([0, 0, 4, 32]), tp=st.sampled_from([1, 2, 6, 8]), ep=st.sampled_from([1, 8, 12]),
        optimizer_steps=st.sampled_from([1, 3]), steps_ahead=st.integers(0, 1),
    ),
    split=st.booleans(),
)  # fmt: skip
@example("qwen3-30b-a3b", 100, (1, 1, 1, 1, 2, 3), "1f1b", "ring", (4096, 64, 1), None, False)  # 5 divides the ranks alone
def test_proposals_do_fit(model, gpus, degrees, schedule, cp_kind, sizes, rollout, split) -> None:
    """Each number proposed for a setting leaves no problem of that setting, and a run without problems can be made."""
    tp, cp, pp, vpp, ep, etp = degrees
    layout = Layout(tp=tp, sp=tp == 2, cp=cp, cp_kind=cp_kind, pp=pp, vpp=vpp, schedule=schedule, ep=ep, etp=etp)
    training = TrainingPlan(*[sizes[0], 0, *sizes[1:]])
    placement = "split" if split and rollout is not None else "colocated"
    run = PlannedRun(SHAPES[model], gpus, layout=layout, training=training, rollout=rollout, placement=placement)
    problems_found = problems(run)
    for problem in problems_found:
        proposed = [(problem.setting, problem.nearest), *problem.instead]
        for setting, value in ((setting, value) for setting, values in proposed for value in values):
            left = [str(other) for other in problems(changed(run, {setting: value})) if other.setting == problem.setting]
            assert not left, (str(problem), setting, value, left)
    if problems_found:
        with pytest.raises(InputError):
            PlannedRun.of(run.shape, gpus, layout=layout, training=training, rollout=rollout, placement=placement)
    else:
        made = PlannedRun.of(run.shape, gpus, layout=layout, training=training, rollout=rollout, placement=placement)
        assert problems(made) == []
        batch = made.training.global_batch_sequences  # with a rollout what its samples are packed into
        assert made.microbatches * made.layout.dp * training.micro_batch_sequences == batch
        assert rollout is not None or batch == training.global_batch_sequences
        assert made.edp * ep * etp == made.layout.dp * cp * tp
