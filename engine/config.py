"""Settings that more than one room of the engine reads. A room's own settings live in the file that uses them.

Every launch file composes these dataclasses into one frozen `Config`; the command line is generated from it.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

PipelineSchedule = Literal["1f1b", "interleaved", "zero-bubble", "dualpipe", "dualpipev"]
ContextParallelKind = Literal["ring", "ulysses"]
Placement = Literal["colocated", "split"]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
GIB = 2**30
"""Bytes."""


class InputError(ValueError):
    """A mistake in what the person gave us: a flag, a file, a value. The message names the value and the fix.

    Launch files show it as one line without a traceback; any other exception keeps its traceback.
    """


@dataclass(frozen=True)
class Layout:
    """How one model is spread over the ranks. Dense ranks form the grid pp x dp x cp x tp, tp fastest.

    Experts fold over the same ranks: ep * etp * edp = dp * cp * tp.
    """

    tp: int = 1
    """Tensor-parallel ranks: attention heads and MLP columns are split (Megatron-LM, arXiv 1909.08053)."""
    sp: bool = False
    """Sequence parallel: norms and residuals are split over the tp ranks by token (arXiv 2205.05198)."""
    cp: int = 1
    """Context-parallel ranks: each holds a part of every long sequence."""
    cp_kind: ContextParallelKind = "ring"
    """How context-parallel ranks exchange keys and values: ring (send/recv) or ulysses (all-to-all over heads)."""
    pp: int = 1
    """Pipeline ranks: each holds some of the layers, and micro-batches go from one to the next."""
    vpp: int = 1
    """Model chunks a pipeline rank (interleaved schedules); 1 is one contiguous range of layers."""
    schedule: PipelineSchedule = "1f1b"
    """Order of the forward and backward passes of the micro-batches in the pipeline."""
    ep: int = 1
    """Expert-parallel ranks: the experts of an MoE layer are divided among them."""
    etp: int = 1
    """Tensor-parallel ranks inside one expert."""
    dp: Annotated[int, tyro.conf.Suppress] = 0
    """Data-parallel replicas. Not a flag: it follows from the number of ranks (`resolve`); 0 is 'not resolved yet'."""

    def resolve(self, world_size: int) -> "Layout":
        """The same layout with dp filled in for `world_size` ranks.

        Raises InputError where a degree is below 1, the ranks don't divide, or settings contradict each other.
        """
        for name in ("tp", "cp", "pp", "vpp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise InputError(f"--layout.{name} {getattr(self, name)}: must be at least 1")
        if self.sp and self.tp == 1:
            raise InputError("--layout.sp needs --layout.tp of at least 2: it splits tokens over the tensor-parallel ranks")
        if self.vpp > 1 and self.pp == 1:
            raise InputError(f"--layout.vpp {self.vpp} needs --layout.pp of at least 2: it cuts a pipeline rank's layers")
        model_ranks = self.tp * self.cp * self.pp
        if world_size % model_ranks:
            raise InputError(
                f"{world_size} ranks can't hold tp {self.tp} x cp {self.cp} x pp {self.pp} = {model_ranks}: "
                f"start a multiple of {model_ranks} ranks (torchrun --nproc-per-node) or lower a degree"
            )
        dp = world_size // model_ranks
        if self.dp not in (0, dp):
            ranks = self.dp * model_ranks
            raise InputError(f"layout has dp {self.dp} but {world_size} ranks give dp {dp}: start {ranks} ranks")
        if (dp * self.cp * self.tp) % (self.ep * self.etp):
            raise InputError(f"ep {self.ep} x etp {self.etp} doesn't divide dp x cp x tp = {dp * self.cp * self.tp}")
        return replace(self, dp=dp)

    def require_implemented(self) -> None:
        """Only data parallelism runs today: raises InputError for every other degree by name (none is ignored silently).

        The planner predicts all of them, so this is apart from `resolve`.
        """
        waiting = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep, "etp": self.etp}
        for name, degree in waiting.items():
            if degree != 1:
                raise InputError(f"--layout.{name} {degree} is not implemented yet: use --layout.{name} 1 (data parallel only)")
        if self.schedule != "1f1b" or self.cp_kind != "ring":
            raise InputError(
                f"--layout.schedule {self.schedule} / --layout.cp-kind {self.cp_kind} has no effect without pp / cp, "
                "which are not implemented yet: leave the defaults (1f1b, ring)"
            )
