"""Which layers each pipeline rank holds: `LayerDivision` -> chunks of consecutive layers -> `Stage`s."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from ..config import PipelineSchedule


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds. With vpp > 1, DualPipe and DualPipeV its layers are not contiguous."""

    index: int
    layers: tuple[int, ...]
    """Indices of its layers in the order of its chunks; num_layers and above are MTP modules. With DualPipe every layer is on
    two ranks."""
    has_embedding: bool
    """It holds the embedding: for the model's input, or for that of MTP modules (which share it with the first stage)."""
    has_head: bool
    """It holds the head. A tied head off the embedding's rank is a copy of it, to be kept equal."""


@dataclass(frozen=True)
class LayerDivision:
    """How layers are divided over pipeline ranks."""

    num_layers: int
    num_mtp_layers: int
    """MTP modules, which follow the last layer."""
    pp: int
    vpp: int
    """Chunks a rank; read by the interleaved schedule alone."""
    schedule: PipelineSchedule
    stage_layers: tuple[int, ...] = ()
    """Layers of each rank, first to last; () divides them evenly."""


def ranks_of_chunks(division: LayerDivision) -> list[tuple[int, ...]]:
    """For each chunk of consecutive layers, first to last, the pipeline ranks that hold it.

    Interleaved (arXiv 2104.04473): rank r holds chunks r, r + pp, ... of pp x vpp. DualPipe (arXiv 2412.19437, figure 5): rank
    r holds stages r and pp - 1 - r, for the two directions. DualPipeV (deepseek-ai/DualPipe, README): rank r holds chunks r
    and 2 pp - 1 - r, so the first rank has embedding and head.
    """
    pp, schedule = division.pp, division.schedule
    if schedule == "interleaved":
        return [(chunk % pp,) for chunk in range(pp * division.vpp)]
    if schedule == "dualpipev" and pp > 1:
        return [(rank,) for rank in (*range(pp), *reversed(range(pp)))]
    if schedule == "dualpipe" and pp > 1:
        return [(rank, pp - 1 - rank) for rank in range(pp)]
    return [(rank,) for rank in range(pp)]


# Kept, since a search asks for the same few divisions in thousands of runs.
@lru_cache(maxsize=2048)
def chunks_of(division: LayerDivision) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk, first to last; the last one with the MTP modules.

    A rank's layers are divided evenly over its chunks. Where they don't divide but would with embedding, head and MTP modules
    counted as layers, these count (Megatron-LM: --account-for-embedding-in-pipeline-split); else the first chunks take one
    more.
    """
    chunk_ranks, mtp_layers = ranks_of_chunks(division), division.num_mtp_layers
    chunks_per_rank = sum(ranks[0] == 0 for ranks in chunk_ranks)
    embedding, head = chunk_ranks[0][0], chunk_ranks[-1][0]
    sizes = [
        _chunk_sizes(layers, chunks_per_rank, int(rank == embedding), (1 + mtp_layers) * (rank == head))
        for rank, layers in enumerate(division.stage_layers or even_split(division.num_layers, division.pp))
    ]
    ends = list(accumulate((sizes[ranks[0]].pop(0) for ranks in chunk_ranks), initial=0))
    ends[-1] += mtp_layers
    return tuple(tuple(range(start, end)) for start, end in pairwise(ends))


@lru_cache(maxsize=2048)
def stages_of(division: LayerDivision) -> tuple[Stage, ...]:
    """The pipeline ranks, first to last."""
    chunk_ranks, chunks = ranks_of_chunks(division), chunks_of(division)
    stages = []
    for rank in range(division.pp):
        held = [chunk for chunk, ranks in enumerate(chunk_ranks) if rank in ranks]
        layers = tuple(layer for chunk in held for layer in chunks[chunk])
        has_head = len(chunks) - 1 in held
        stages.append(Stage(rank, layers, 0 in held or (has_head and division.num_mtp_layers > 0), has_head))
    return tuple(stages)


def even_split(count: int, parts: int) -> tuple[int, ...]:
    """`count` things in `parts` parts, the first ones taking one more where it doesn't divide."""
    return tuple(count // parts + (part < count % parts) for part in range(parts))


def _chunk_sizes(layers: int, chunks: int, before: int, after: int) -> list[int]:
    """Layers of a rank's chunks; what its first one holds besides weighs as `before` layers, its last one's as `after`."""
    size, over = divmod(layers + before + after, chunks)
    if over or size < max(before, after) or chunks == 1:
        return list(even_split(layers, chunks))
    return [size - before * (chunk == 0) - after * (chunk == chunks - 1) for chunk in range(chunks)]
