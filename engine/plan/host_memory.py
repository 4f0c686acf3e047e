"""Memory of a node's host: what its GPUs' trainers keep there, beside everything else that lives on the node."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..config import GIB
from .devices import device_named

if TYPE_CHECKING:
    from .memory import Phase, StageMemory
    from .run import PlannedRun

PINNED_ROUNDING = 0.25
"""What PyTorch takes beyond the tensors it keeps: blocks of pinned memory are rounded up to powers of two (vllm-project/vllm
pull request 58185: a third and more for experts; a shard of any size has 0.44 on average), other memory is not. Fitted, with
the next constant, on what nodes of published runs use (tests/plan/test_host_memory.py)."""
SYSTEM_BYTES_PER_GPU = 32 * GIB
"""A GPU's share of what isn't the trainer's tensors: its own process (8 GiB), the engine's, data loaders, object store, page
cache, operating system. THUDM/slime issue 1851: 180 GiB of a node with 8 GPUs are not the trainers'."""
USABLE_FRACTION = 0.93
"""Of the installed memory: Linux has 1,003 to 1,008 GiB of 1,024 to give (vllm-project/vime issue 56, slime's above), and Ray,
which runs most trainers with a rollout, kills processes above 95% of that."""


@dataclass(frozen=True)
class NodeMemory:
    """The host of the node on which most is kept, in the phase that keeps most."""

    phase: "Phase"
    gpu_bytes: float
    """Tensors of the GPU that keeps most."""
    parts_bytes: dict[str, float]
    """Of the whole node: tensors (StageMemory.host_parts_bytes), their rounding and the system's. {} where no tensor is kept:
    then the host is what any run needs, and isn't looked at."""
    installed_bytes: float

    @property
    def total_bytes(self) -> float:
        return sum(self.parts_bytes.values())

    @property
    def usable_bytes(self) -> float:
        return USABLE_FRACTION * self.installed_bytes

    @property
    def shortage_bytes(self) -> float:
        """What is missing; 0 where it is enough."""
        return max(0.0, self.total_bytes - self.usable_bytes)


def fullest_node(run: "PlannedRun", phases: Sequence[tuple["StageMemory", ...]]) -> NodeMemory:
    """The node that needs most of its host, of a run whose layout is resolved and whose memory in each phase is given.

    A node has consecutive ranks of the grid pp x dp x cp x tp, so those of one stage, or of several small ones. Engines that
    sleep leave their weights nowhere (vLLM's sleep level 2), and GPUs that only generate keep nothing on the host.
    """
    return max((_fullest_in(run, memories) for memories in phases), key=lambda node: node.total_bytes)


def _fullest_in(run: "PlannedRun", memories: tuple["StageMemory", ...]) -> NodeMemory:
    device = device_named(run.device)
    installed_bytes = run.host_memory_gib * GIB or device.node_host_bytes
    by_stage = np.array([memory.host_bytes for memory in memories])
    if not by_stage.any():
        return NodeMemory(memories[0].phase, 0.0, {}, installed_bytes)
    stage_of_rank = np.repeat(np.arange(len(memories)), run.training_gpus // len(memories))
    starts = np.arange(0, run.training_gpus, device.gpus_per_node)
    first = int(starts[np.add.reduceat(by_stage[stage_of_rank], starts).argmax()])
    ranks = Counter(stage_of_rank[first : first + device.gpus_per_node].tolist())
    tensors: Counter[str] = Counter()
    for stage, count in ranks.items():
        tensors.update({part: count * size for part, size in memories[stage].host_parts_bytes.items() if size})
    parts = {
        **tensors,
        "rounding": PINNED_ROUNDING * tensors.total(),
        "system": SYSTEM_BYTES_PER_GPU * min(device.gpus_per_node, run.gpus),
    }
    return NodeMemory(memories[0].phase, float(by_stage.max()), parts, installed_bytes)
