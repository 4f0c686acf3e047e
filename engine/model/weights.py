"""The weights of a live model under Hugging Face names: `ModelWeights`, the trainer's WeightSource; and their bit sum."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..protocols import WeightMeta
from . import names
from .transformer import Transformer

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ModelWeights:
    """A WeightSource over the parameters of a whole model on this rank: every tensor is full, none is copied.

    A tied `lm_head.weight` is listed (and given out) under its own name too, because receivers that are not told about
    it keep an old head without an error.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def metadata(self) -> Sequence[WeightMeta]:
        """In the order of the layers; the tied head, if any, last."""
        head_is_tied = self._model.is_last and self._model.config.tie_embeddings
        return [
            WeightMeta(
                name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                tied_to=names.EMBEDDING if head_is_tied and name == names.LM_HEAD else None,
            )
            for name, tensor in self.local_shards().items()
        ]

    def local_shards(self) -> dict[str, Tensor]:
        """Hugging Face name -> the parameter's own storage, detached from autograd."""
        shards = {names.to_hf(name): parameter.detach() for name, parameter in self._model.named_parameters()}
        if self._model.is_last:
            shards[names.LM_HEAD] = self._model.lm_head_weight.detach()
        return shards

    def iter_full(self, bucket_bytes: int) -> Iterator[Sequence[tuple[str, Tensor]]]:
        """Consecutive tensors in buckets of at most `bucket_bytes` each, one tensor at least."""
        bucket: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in self.local_shards().items():
            if bucket and size + tensor.nbytes > bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append((name, tensor))
            size += tensor.nbytes
        if bucket:
            yield bucket


def bit_sum(tensor: Tensor) -> int:
    """The sum of all elements' bit patterns, read as signed integers of their width, modulo 2^64.

    It doesn't depend on the order of the elements, so the sums of a tensor's shards add up (modulo 2^64) to its own, and
    a single changed bit changes it. Two tensors of different dtype with equal values have different sums.
    """
    bits = tensor.detach().view(_SIGNED[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64)) % 2**64
