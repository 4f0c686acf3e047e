"""What the launch files' --plan says where a run doesn't fit, with the flags that these files have."""

import re
from dataclasses import replace

import pytest

from strop.engine.config import InputError, Layout
from strop.launch.planned import PROBLEMS_EXIT_CODE, plan_evaluation, plan_grpo
from strop.launch.presets import EVALUATE_PRESETS, GRPO_PRESETS, EvaluateConfig, GrpoConfig


def grpo(model: str, **layout: int) -> GrpoConfig:
    return replace(GRPO_PRESETS["tiny"][1], model=model, precision="bf16", layout=Layout(**layout))


def evaluation(model: str) -> EvaluateConfig:
    return replace(EVALUATE_PRESETS["tiny"][1], model=model, precision="bf16")


def problems(output: str) -> list[str]:
    return [line.removeprefix("problem: ") for line in output.splitlines() if line.startswith("problem: ")]


def test_a_model_too_large_for_one_gpu(capsys) -> None:
    """Weights of 70,553,706,496 x 2 bytes = 131.4 GiB, and 264 tokens of 327,680 bytes: no smaller cache would help."""
    assert plan_grpo(grpo("llama3-70b"), 8, "h100") == PROBLEMS_EXIT_CODE
    output = capsys.readouterr().out
    assert "Memory of a rank in GiB" in output and "GRPO step" not in output
    engine, trainer = problems(output)
    assert engine.startswith("--layout.tp 1: weights of 131.4 GiB leave a GPU of 79.2 no KV cache: a sequence of 264 tokens ")
    assert engine.endswith("takes 0.081 GiB")
    # A weight, its gradient, master weight and moments are 18 bytes: 1.27e12 bytes in all, 15 times 85.03e9.
    alone = "weights, gradients and optimizer states alone fill 15 GPUs of 79.2 GiB, and 8 train; "
    assert trainer.startswith(f"--plan h100x8: {alone}")


def test_the_nearest_layouts_fit_as_they_say(capsys) -> None:
    assert plan_grpo(grpo("llama3-70b"), 8, "h100") == PROBLEMS_EXIT_CODE
    *_, problem = problems(capsys.readouterr().out)
    ways = re.findall(r"--plan h100x(\d+)((?: --\S+(?: [\d.]+)?)*) \(([\d.]+) GiB, (\S+ \w+) a step, not implemented", problem)
    assert len(ways) == 2
    for gpus, flags, gib, seconds in ways:
        degrees = {name: int(value) if value else True for name, value in re.findall(r"--layout\.(\w+)(?: (\d+))?", flags)}
        config = grpo("llama3-70b", **degrees)
        for cache in re.findall(r"--rollout.kv-cache-gib (\S+)", flags):
            config = replace(config, rollout=replace(config.rollout, kv_cache_gib=float(cache)))
        assert plan_grpo(config, int(gpus), "h100") == 0
        output = capsys.readouterr().out
        free_gib = float(re.search(r"fits, ([\d.]+) GiB free", output)[1])
        assert free_gib + float(gib) == pytest.approx(79.2, abs=0.11) and f"GRPO step: {seconds}\n" in output


def test_a_cache_too_small_does_not_hide_what_the_trainer_lacks(capsys) -> None:
    assert plan_grpo(grpo("qwen3-32b"), 8, "h100") == PROBLEMS_EXIT_CODE
    cache, trainer = problems(capsys.readouterr().out)
    assert cache == "--rollout.kv-cache-gib 0.01: a sequence of 264 tokens takes 0.065 GiB; nearest allowed: 0.065"
    assert trainer.startswith("--plan h100x8: stage 0 needs ") and "; nearest that fits: --layout.tp 8 --layout.sp (" in trainer


def test_settings_are_named_as_the_launch_file_has_them(capsys) -> None:
    """The number of GPUs is part of --plan."""
    assert plan_grpo(grpo("tiny", tp=2), 3, "h100") == PROBLEMS_EXIT_CODE
    output = capsys.readouterr().out
    assert "problem: --layout.tp 2: 3 training GPUs" in output and "nearest allowed: 1, or --plan h100x2 or h100x4" in output
    assert "evaluations and checkpoints" in output


def test_a_cache_that_no_gpu_holds(capsys) -> None:
    config = grpo("tiny")
    with pytest.raises(InputError, match=r"--rollout.kv-cache-gib 100: .* more than the 79.2 GiB of a GPU: give less"):
        plan_grpo(replace(config, rollout=replace(config.rollout, kv_cache_gib=100)), 1, "h100")


def test_the_cache_of_an_evaluation(capsys) -> None:
    """272 tokens of 30 layers, 2 x 3 heads of 64 in fp32: 46,080 bytes a token, 0.0117 GiB."""
    config = EVALUATE_PRESETS["smollm2"][1]
    for gib, code in ((0.001, PROBLEMS_EXIT_CODE), (0.012, 0)):
        assert plan_evaluation(replace(config, rollout=replace(config.rollout, kv_cache_gib=gib)), 1, "h200") == code
        output = capsys.readouterr().out
        said = "--rollout.kv-cache-gib 0.001: a sequence of 272 tokens takes 0.012 GiB; nearest allowed: 0.012"
        assert problems(output) == [said] if code else "Generation" in output


def test_an_evaluation_needs_weights_and_cache_alone(capsys) -> None:
    assert plan_evaluation(evaluation("llama3-70b"), 8, "h100") == PROBLEMS_EXIT_CODE
    [problem] = problems(capsys.readouterr().out)
    assert "weights of 131.4 GiB" in problem and "; nearest that fits: --layout.tp 2 --layout.sp (" in problem
    assert plan_evaluation(evaluation("llama3-8b"), 1, "h100") == 0


@pytest.mark.parametrize("device, named", [("gb200", "gb200"), ("", "x8")])
def test_an_unknown_device_is_plans(device: str, named: str) -> None:
    for plan, config in ((plan_grpo, grpo("tiny")), (plan_evaluation, evaluation("tiny"))):
        with pytest.raises(InputError, match=f"^--plan {named}: which GPU is that"):
            plan(config, 8, device)
