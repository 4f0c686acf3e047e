"""The planner's constants that were fitted on published rows: which they are, and what the fitted rows ask them to be.

There are few, each is a property of the hardware or of training software, and all rows share them. `fit` minimises
the mean squared logarithm of predicted over published step time of the fitted families, by Gauss-Newton steps on the
constants' logarithms; it prints what it finds. The values themselves live beside the formulas that use them.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from planner_training_row import TrainingRow

from strop.engine.plan.training import train_step

PACKAGE = "strop.engine.plan"
ROUNDS = 8
STEP = 0.02
"""Of a constant's logarithm, for the finite differences."""
LARGEST_MOVE = 0.2
"""Of a constant's logarithm in one round."""
PRIOR_WEIGHT = 0.02
"""How strongly a constant is held at its present value: the rows decide wherever they say anything."""


@dataclass(frozen=True)
class FittedConstant:
    """A number of an engine.plan module, or an entry of a dictionary there."""

    module: str
    name: str
    meaning: str
    key: tuple[str, ...] | None = None
    """Of the dictionary's entry."""
    at_most: float = math.inf
    """What nature allows."""

    @property
    def label(self) -> str:
        return self.name if self.key is None else f"{self.name}[{', '.join(self.key)}]"

    def get(self) -> float:
        value = getattr(self._module, self.name)
        return value if self.key is None else value[self.key]

    def set(self, value: float) -> None:
        """In every module of engine.plan that has the name; results that were remembered with the old value are forgotten."""
        if self.key is not None:
            getattr(self._module, self.name)[self.key] = value
        for module in _modules():
            if self.key is None and hasattr(module, self.name):
                setattr(module, self.name, value)
            for remembered in vars(module).values():
                if hasattr(remembered, "cache_clear"):
                    remembered.cache_clear()

    @property
    def _module(self) -> ModuleType:
        return sys.modules[f"{PACKAGE}.{self.module}"]


def _modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.")]


FITTED: tuple[FittedConstant, ...] = (
    FittedConstant("layer_time", "FUSED_PASSES", "seconds of fused element-wise kernels over those of the fewest bytes"),
    FittedConstant("training", "EAGER_GAP_SECONDS", "between two kernels of an eager step"),
    FittedConstant("efficiency", "POWER_EXPONENT", "of the clock under a lower power limit", at_most=1.0),
)


FITTED_ELSEWHERE: tuple[tuple[str, str], ...] = (
    (
        "efficiency (curves of bf16 products and attention), collectives (start and fill inside a node)",
        "kernel tables of aiconfigurator-core 0.12.0",
    ),
    ("efficiency (FP8 products)", "cuBLASLt's peaks and 28 shapes of DeepGEMM's README"),
    ("collectives.BESIDE_COMPUTE_FRACTION", "the DualPipe trace"),
    ("memory.FRAGMENTATION", "19 peaks of MooreThreads/SimuMax"),
    ("decode.HOST_STEP_SECONDS, HOST_SEQUENCE_SECONDS; grpo.SWITCH_SECONDS, HOST_COPY_FRACTION", "NeMo-RL v0.3's phases"),
    ("decode.NETWORK_REDUCE_SECONDS", "NeMo-RL's Qwen3-235B rows"),
    ("decode.EAGER_OPERATION_SECONDS", "verl's Qwen3-30B-A3B row"),
    ("weight_sync", "published seconds of weight synchronisation (its docstrings)"),
)
"""Constants of the other sections, and what they saw."""


def log_errors(rows: Sequence[TrainingRow]) -> np.ndarray:
    return np.array([math.log(train_step(row.run).step_seconds / row.published_step_seconds) for row in rows])


def weight_in_steps(constant: FittedConstant, rows: Sequence[TrainingRow]) -> np.ndarray:
    """How much of each row's step a constant decides: the step's growth, relative to the constant's own (its elasticity)."""
    value, before = constant.get(), log_errors(rows)
    constant.set(value * (1 + STEP))
    after = log_errors(rows)
    constant.set(value)
    return (after - before) / math.log1p(STEP)


def fit(rows: Sequence[TrainingRow], constants: Sequence[FittedConstant] = FITTED) -> dict[str, float]:
    """The constants that fit these rows best; they are left set, so that errors can be printed with them."""
    start = np.log([constant.get() for constant in constants])
    logs = start.copy()

    def errors_at(point: np.ndarray) -> np.ndarray:
        for constant, value in zip(constants, np.exp(point), strict=True):
            constant.set(float(value))
        return log_errors(rows)

    for _ in range(ROUNDS):
        errors = errors_at(logs)
        slopes = np.column_stack([(errors_at(logs + STEP * unit) - errors) / STEP for unit in np.eye(len(logs))])
        matrix = np.vstack([slopes, PRIOR_WEIGHT * math.sqrt(len(rows)) * np.eye(len(logs))])
        wanted = np.concatenate([-errors, PRIOR_WEIGHT * math.sqrt(len(rows)) * (start - logs)])
        logs += np.clip(np.linalg.lstsq(matrix, wanted, rcond=None)[0], -LARGEST_MOVE, LARGEST_MOVE)
        logs = np.minimum(logs, np.log([constant.at_most for constant in constants]))
    errors_at(logs)
    return {constant.label: constant.get() for constant in constants}
