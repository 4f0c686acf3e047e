"""Other libraries' forms of our ops, or the reason why one can't be measured here; none of them is required."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

TRL_CHUNK = 32768
"""Columns of the vocabulary that TRL 1.16's trainer gives its chunked log-prob at a time."""


def attribute(module: str, name: str) -> Any:
    """module.name, or a string with the reason."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        return f"not installed: {error}"
    except AttributeError:
        return f"not in this version: {module}.{name}"


def on_gpu(found: Any, device: torch.device) -> Any:
    """`found`, unless it is made of Triton kernels and there is no GPU."""
    return found if isinstance(found, str) or device.type == "cuda" else "Triton kernels: needs a GPU"


def trl_chunked() -> Callable | str:
    """(hidden, weight, targets) -> log-prob, entropy."""
    function = attribute("trl.kernels", "ChunkedLogProbFunction")
    if isinstance(function, str):
        return function

    def run(hidden, weight, targets):
        return function.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))[:2]

    return run


def liger_scaled() -> Callable | str:
    """(hidden, weight, targets) -> log-prob, entropy; chunks of 512 tokens in torch where there is no Hopper GPU."""
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    function = attribute(module, "LigerFusedLinearScaledCrossEntropyFunction")
    if isinstance(function, str):
        return function

    def run(hidden, weight, targets):
        negative, entropy = function.apply(hidden, weight, targets, 1.0, -100, 1, True)
        return -negative, entropy

    return run
