"""The swap of weights: which tier serves each parameter, and the proof that the engine uses what it was told to use.

Only T0 exists so far: the engine's parameters are the trainer's storages, so after an optimizer step there is nothing to
move, and a swap is a proof. A checksum would compare a tensor with itself; instead the storage pointers are compared, and
the log-probs of one fixed prompt, computed over the paged cache, with those of a trainer forward.
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import InputError
from ..model import names
from ..model.transformer import Transformer
from ..model.weights import ModelWeights, bit_sum
from ..protocols import SyncPlan, WeightMeta, WeightSource

MAX_PROBE_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 1.0}
"""Largest difference between two log-probs of the fixed prompt, engine against trainer, in nats. fp32: DESIGN section 3.
bf16: the 135M model's sampled tokens differ by 0.03 on average and up to 0.23 (rounding flips grow through the layers), the
fixed prompt's by 0.14; a wrong tensor moves some token by whole nats."""

PROBE_TEXT = "The capital of France is Paris, and two and two make four."
"""Ordinary text: on random token ids bf16 differs by up to 8 nats with nothing wrong."""
PROBE_LENGTH = 16
"""Tokens of it that are used: all but the last two are fed at once, those two one by one, as in decoding."""


class StaleWeightsError(RuntimeError):
    """The rollout engine doesn't use the weights of the version it was told. The run must stop: its samples would be
    attributed to weights that didn't produce them."""


def bind_aliases(model: Transformer, source: WeightSource, device: torch.device) -> SyncPlan:
    """Make the parameters of `model` (on "meta") the source's own storages.

    Raises InputError for every parameter that T0 can't serve, naming the tier that could: a parameter missing, sharded, or
    of another shape, dtype, memory layout or device than `device`, or one the model doesn't have.
    """
    offered = {meta.name: meta for meta in source.metadata()}
    shards = source.local_shards()
    wanted = ModelWeights(model).local_shards()
    for name, tensor in wanted.items():
        _require_alias(name, tensor, offered.get(name), shards.get(name), device)
    if surplus := sorted(offered.keys() - wanted.keys()):
        raise InputError(f"weight {surplus[0]} of the trainer has no place in the rollout model: their configurations differ")
    if model.config.tie_embeddings and shards[names.LM_HEAD].data_ptr() != shards[names.EMBEDDING].data_ptr():
        raise InputError(
            f"weight {names.LM_HEAD}: the rollout model shares it with {names.EMBEDDING}, the trainer keeps it apart: "
            "set tie_word_embeddings alike"
        )
    model.alias_parameters({names.from_hf(name): shard for name, shard in shards.items()})
    return SyncPlan({name: "alias" for name in wanted})


def _require_alias(
    name: str, wanted: Tensor, offered: WeightMeta | None, shard: Tensor | None, device: torch.device
) -> None:
    if offered is None or shard is None:
        reason, tier = "this rank's trainer doesn't hold it", "T2 (reshard) or T3 (stream)"
    elif offered.shard is not None:
        reason, tier = f"the trainer holds only the part {offered.shard}", "T2 (reshard)"
    elif shard.shape != wanted.shape:
        found, expected = tuple(shard.shape), tuple(wanted.shape)
        raise InputError(f"weight {name} has shape {found} in the trainer, {expected} in the rollout model")
    elif shard.dtype != wanted.dtype:
        reason, tier = f"the trainer holds it in {shard.dtype}, rollouts want {wanted.dtype}", "T1 (local copy)"
    elif shard.device.type != device.type:
        reason, tier = f"the trainer holds it on {shard.device}, rollouts run on {device}", "T1 (local copy)"
    elif shard.stride() != wanted.stride():
        reason, tier = f"its memory layout is {shard.stride()}, rollouts want {wanted.stride()}", "T1 (local copy)"
    else:
        return
    raise InputError(
        f"weight {name} can't be used in place (T0): {reason}. {tier} isn't implemented yet: "
        "give rollouts the trainer's layout, dtype and device"
    )


def prove_aliases(model: Transformer, source: WeightSource, version: int) -> None:
    """Raise StaleWeightsError naming the first parameter of `model` that isn't the source's storage."""
    shards = source.local_shards()
    for name, used in ModelWeights(model).local_shards().items():
        shard = shards.get(name)
        if shard is None or _place(used) != _place(shard):
            raise StaleWeightsError(
                f"rollouts don't use version {version} of {name}: it lies at {_place(used)}, the trainer's at "
                f"{'no place' if shard is None else _place(shard)} (address, shape, strides, dtype)"
            )


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def probe_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """int64 [L], L at most PROBE_LENGTH: the fixed prompt."""
    return torch.tensor(tokenizer.encode(PROBE_TEXT, add_special_tokens=False)[:PROBE_LENGTH])


def prove_logprobs(engine: Tensor, trainer: Tensor, tokens: Tensor, dtype: torch.dtype, version: int) -> float:
    """Compare the engine's log-probs of the fixed prompt's tokens 1 .. L - 1 with the trainer's, both fp32 [L - 1].

    Returns the largest difference, in nats. Raises StaleWeightsError when it exceeds MAX_PROBE_DIFFERENCE[dtype] or is not a
    number.
    """
    assert trainer.shape == engine.shape, f"the trainer's probe gave shape {tuple(trainer.shape)}, not {tuple(engine.shape)}"
    differences = (engine.double() - trainer.double()).abs()
    largest = differences.max().item()
    if not largest <= MAX_PROBE_DIFFERENCE[dtype]:
        place = int(differences.argmax())
        raise StaleWeightsError(
            f"rollouts don't use version {version} of the weights: log-prob of token {int(tokens[place + 1])} at position "
            f"{place + 1} of the fixed prompt is {engine[place]:.6f} in the engine, {trainer[place]:.6f} in the trainer "
            f"(largest difference allowed in {dtype}: {MAX_PROBE_DIFFERENCE[dtype]:g})"
        )
    return largest


def checksums(model: Transformer) -> dict[str, str]:
    """Hugging Face name -> order-independent sum of the bits of the parameter in use, 16 hexadecimal digits."""
    return {name: f"{bit_sum(tensor):016x}" for name, tensor in ModelWeights(model).local_shards().items()}
