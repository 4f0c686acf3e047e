"""Divisions of layers over pipeline stages that weigh the head: it is worth a layer or more of a large vocabulary."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from .facts import layer_forward_flops_per_token
from .shape import ModelShape
from .stages import even_split


@lru_cache(maxsize=512)
def balanced_stage_layers(shape: ModelShape, pp: int, sequence_length_tokens: int) -> tuple[int, ...]:
    """Layers of each stage: as many on the last one, which has the head and MTP, as make the slowest stage do fewest FLOPs.

    The others share the rest evenly; the later ones take one more, since the first ones keep more micro-batches (1F1B).
    """
    flops, head_flops = _flops_of_layers_and_head(shape, sequence_length_tokens)

    def slowest_flops(stages: tuple[int, ...]) -> float:
        ends = list(accumulate(stages, initial=0))
        sums = [sum(flops[start:end]) for start, end in pairwise(ends)]
        return max(*sums[:-1], sums[-1] + head_flops)

    if pp == 1:
        return (shape.num_layers,)
    most = -(-shape.num_layers // pp)
    divisions = [(*reversed(even_split(shape.num_layers - last, pp - 1)), last) for last in range(most, 0, -1)]
    return min(divisions, key=slowest_flops)


def stage_layers_within(shape: ModelShape, most: Sequence[int], sequence_length_tokens: int) -> tuple[int, ...]:
    """Layers of each stage, at most so many: each next one goes to the stage that does fewest FLOPs with it, of equals to the
    last, since the first ones keep more micro-batches (1F1B). () where the stages together may not have as many."""
    if sum(most) < shape.num_layers or min(most) < 0:
        return ()
    flops, head_flops = _flops_of_layers_and_head(shape, sequence_length_tokens)
    mean_flops = sum(flops) / len(flops)
    layers, others = [0] * len(most), [0.0] * (len(most) - 1) + [head_flops]
    for _ in range(shape.num_layers):
        open_stages = [stage for stage in range(len(most)) if layers[stage] < most[stage]]
        layers[min(open_stages, key=lambda stage: (others[stage] + mean_flops * layers[stage], -stage))] += 1
    return tuple(layers)


@lru_cache(maxsize=64)
def _flops_of_layers_and_head(shape: ModelShape, sequence_length_tokens: int) -> tuple[tuple[float, ...], float]:
    """Forward FLOPs a token of each layer, and of the head with the MTP modules, which are on its stage."""
    layers = range(shape.num_layers + shape.num_mtp_layers)
    flops = tuple(layer_forward_flops_per_token(shape, layer, sequence_length_tokens) for layer in layers)
    head_flops = 2 * shape.vocab_size * shape.hidden_size * (1 + shape.num_mtp_layers)
    return flops[: shape.num_layers], head_flops + sum(flops[shape.num_layers :])
