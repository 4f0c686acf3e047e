"""Memory of one generating GPU: the engine's weights, what is left for its KV cache and how many sequences that holds."""

from collections import Counter
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import GIB
from .devices import device_named
from .facts import kv_bytes_per_token, parameters
from .run import PlannedRun
from .shape import ModelShape
from .states import attention_rank_matrices, rank_state_bytes

LEAST_BYTES_OUTSIDE_MATRICES = 2
"""Of a weight that isn't in a layer's matrices: embedding, head, router, norms and biases stay in 16 bits beside matrices of
fewer (DeepSeek-V3's FP8 checkpoint; head and router are what recipes for vLLM and SGLang leave out)."""


def rollout_weight_bytes(run: PlannedRun) -> float:
    """Weights on one GPU of a rollout engine with a layout of its own: tp splits matrices, attention as in training
    (`attention_rank_matrices`: some of it is on every rank), ep (if larger) the experts; the mean over its pipeline ranks."""
    rollout, shape, counts = run.rollout, run.shape, parameters(run.shape)
    matrices = counts["experts"] / max(rollout.ep, rollout.tp) + shape.num_layers * attention_rank_matrices(shape, rollout.tp)
    matrices += (counts["dense_mlp"] + counts["shared_experts"]) / rollout.tp
    vectors = counts["attention"] - shape.num_layers * attention_rank_matrices(shape, 1)
    tied_head = counts["embedding"] if shape.tie_embeddings and rollout.pp > 1 else 0
    rest = counts["norms"] + counts["router"] + (vectors + counts["embedding"] + counts["head"] + tied_head) / rollout.tp
    width = rollout.weights_dtype_bytes
    return (matrices * width + rest * max(width, LEAST_BYTES_OUTSIDE_MATRICES)) / rollout.pp


def generating_weight_bytes(run: PlannedRun) -> float:
    """Weights that a GPU generates with: the trainer's own on its fullest pipeline rank (alias), or the engine's copy."""
    if run.rollout.weight_sync == "alias" and run.placement == "colocated":
        return max(rank_state_bytes(run, stage).weights for stage in run.stages())
    return rollout_weight_bytes(run)


def rollout_kv_cache_bytes(run: PlannedRun) -> float:
    """What one generating GPU has for its KV cache; 0 where the weights leave nothing of memory_fraction. What the engine
    computes with is left out: a few GB at most, that a real engine takes off this."""
    return max(_share_bytes(run) - generating_weight_bytes(run), 0.0)


def cache_bytes_per_token(run: PlannedRun) -> float:
    """Of a token that all layers keep, on one GPU. Latent vectors are on every tp rank, and so is a key-value head where there
    are fewer heads than ranks."""
    rollout, shape = run.rollout, run.shape
    splits = 1 if shape.mla is not None else min(rollout.tp, shape.num_kv_heads)
    return kv_bytes_per_token(shape, rollout.kv_dtype_bytes) / splits / rollout.pp


def sequence_cache_bytes(run: PlannedRun, tokens: ArrayLike) -> NDArray[np.float64]:
    """Of a sequence of that many tokens, on one GPU; window layers drop what their window has passed."""
    length = np.asarray(tokens, float)
    kept = [count * (np.minimum(length, window) if window else length) for window, count in _windows(run.shape).items()]
    return cache_bytes_per_token(run) / run.shape.num_layers * np.sum(kept, axis=0)


def holds_a_sequence(run: PlannedRun) -> bool:
    """Whether the KV cache holds a prompt with the longest response; engines refuse to start where it doesn't."""
    return rollout_kv_cache_bytes(run) >= sequence_cache_bytes(run, run.rollout.longest_sample_tokens)


def cache_shortage(run: PlannedRun) -> str:
    """What a message says of a KV cache that doesn't hold one sequence."""
    longest = run.rollout.longest_sample_tokens
    need = float(sequence_cache_bytes(run, longest))
    return (
        f"weights of {generating_weight_bytes(run) / GIB:.1f} GiB a GPU leave {rollout_kv_cache_bytes(run) / GIB:.1f} of the "
        f"{_share_bytes(run) / GIB:.1f} GiB that rollout.memory_fraction gives, and a sequence of {longest:,} "
        f"tokens takes {need / GIB:.2f} GiB of KV cache: use more rollout tp, pp or ep"
    )


def _share_bytes(run: PlannedRun) -> float:
    return run.rollout.memory_fraction * device_named(run.device).hbm_bytes


@lru_cache(maxsize=16)
def _windows(shape: ModelShape) -> dict[int, int]:
    """How many layers attend to a window of so many tokens; 0: to everything."""
    return Counter(shape.window_tokens(layer) or 0 for layer in range(shape.num_layers))
