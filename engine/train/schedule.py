"""The learning rate of each step: a linear warm-up, then constant, linear or cosine down to a floor."""

import math
from typing import Literal

from ..config import InputError

LrSchedule = Literal["constant", "linear", "cosine"]


def check_schedule(steps: int, warmup_steps: int, floor: float) -> None:
    """InputError where a run of `steps` steps can't have this schedule."""
    if not 0 <= warmup_steps <= steps:
        raise InputError(f"--train.warmup-steps {warmup_steps}: must lie between 0 and --train.steps {steps}")
    if not 0 <= floor <= 1:
        raise InputError(f"--train.lr-floor {floor}: is a fraction of --train.lr, between 0 and 1")


def learning_rate(step: int, peak: float, steps: int, warmup_steps: int, schedule: LrSchedule, floor: float) -> float:
    """The rate used in step `step`, 1 <= step <= steps.

    Step w of a warm-up of W steps uses w / W of the peak. The first step after it uses the peak; a decay would reach
    floor * peak in the step after the last, so that with floor 0 the last step's rollouts still count.
    """
    assert 1 <= step <= steps, f"step {step} is outside 1 .. {steps}"
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - 1 - warmup_steps) / (steps - warmup_steps)
    remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (floor + (1 - floor) * remaining)
