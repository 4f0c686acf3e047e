"""A division of layers over pipeline stages that weighs the head: it is worth a layer or more of a large vocabulary."""

from itertools import accumulate, pairwise

from .facts import layer_forward_flops_per_token
from .shape import ModelShape
from .stages import even_split


def balanced_stage_layers(shape: ModelShape, pp: int, sequence_length_tokens: int) -> tuple[int, ...]:
    """Layers of each stage: as many on the last one, which has the head and MTP, as make the slowest stage do fewest FLOPs.

    The others share the rest evenly; the later ones take one more, since the first ones keep more micro-batches (1F1B).
    """
    layers = range(shape.num_layers + shape.num_mtp_layers)
    flops = [layer_forward_flops_per_token(shape, layer, sequence_length_tokens) for layer in layers]
    head_flops = 2 * shape.vocab_size * shape.hidden_size * (1 + shape.num_mtp_layers)

    def slowest_flops(stages: tuple[int, ...]) -> float:
        ends = list(accumulate(stages, initial=0))
        sums = [sum(flops[start:end]) for start, end in pairwise(ends)]
        return max(*sums[:-1], sums[-1] + sum(flops[shape.num_layers :]) + head_flops)

    if pp == 1:
        return (shape.num_layers,)
    most = -(-shape.num_layers // pp)
    divisions = [(*reversed(even_split(shape.num_layers - last, pp - 1)), last) for last in range(most, 0, -1)]
    return min(divisions, key=slowest_flops)
