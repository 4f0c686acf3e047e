"""The grid of ranks: who this process is, which ranks it talks to along each axis, and on which device.

Dense ranks form the grid pp x dp x cp x tp with tp fastest, one `arange` viewed in four dimensions: the ranks of a pipeline
stage are neighbours, so that expert-parallel groups, which fold over them, span as few nodes as they can. A `Mesh` is
made once, at the top of a launch file, and handed to whoever needs it: nothing else reads the environment or keeps a group in
a global.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..config import Device, InputError, Layout

RENDEZVOUS_SECONDS = 120.0
"""How long ranks wait for each other at the start; afterwards the process-group time-out counts."""

AXIS_DIMS: dict[str, tuple[int, ...]] = {
    "world": (0, 1, 2, 3),
    "dp": (1,),
    "pp": (0,),
    "cp": (2,),
    "tp": (3,),
    "zero": (1, 2),
}
"""Axis -> the dimensions of the pp x dp x cp x tp grid that vary along it."""


@dataclass(frozen=True, eq=False)
class Axis:
    """The ranks that differ from this one in one coordinate of the grid."""

    name: str
    size: int
    rank: int
    """This process's coordinate, 0 <= rank < size."""
    group: dist.ProcessGroup | None
    """None when size is 1: collectives over the axis are then no-ops."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """This process's place in the grid. Made by `start` (collective over all ranks) or `single`."""

    layout: Layout
    """Resolved: layout.dp is the real number of replicas."""
    rank: int
    world_size: int
    device: torch.device
    world: Axis
    dp: Axis
    pp: Axis
    cp: Axis
    tp: Axis
    zero: Axis
    """dp x cp: the ranks that hold the same dense parameters and shard their optimizer states (ZeRO-1)."""
    zero_mesh: DeviceMesh | None
    """The same ranks for DTensor, which checkpoints are written in; None when `zero` has one rank."""
    timeout: timedelta
    """After this long a collective that a peer never joined fails."""

    @classmethod
    def start(cls, layout: Layout, device: Device = "auto", timeout_seconds: float = 1800.0) -> "Mesh":
        """Join the other ranks that torchrun started; without torchrun this is the only rank and no process group is made.

        Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, once. CPU tensors travel over gloo and CUDA
        tensors over NCCL. Raises InputError for a device that isn't there, a layout that doesn't fit the ranks, an
        incomplete environment, and ranks that don't find each other within two minutes.
        """
        rank, world_size, local_rank = _read_environment()
        layout.require_implemented()
        layout = layout.resolve(world_size)
        torch_device = _pick_device(device, local_rank)
        timeout = timedelta(seconds=timeout_seconds)
        if world_size == 1:
            return cls._alone(layout, torch_device, timeout)
        if torch_device.type == "cuda":
            torch.cuda.set_device(torch_device)
        _rendezvous(rank, world_size, "cpu:gloo,cuda:nccl" if torch_device.type == "cuda" else "gloo", timeout)
        axes = {name: _make_axis(layout, name, rank, timeout) for name in AXIS_DIMS}
        zero_mesh = None if axes["zero"].group is None else DeviceMesh.from_group(axes["zero"].group, torch_device.type)
        return cls(layout, rank, world_size, torch_device, zero_mesh=zero_mesh, timeout=timeout, **axes)

    @classmethod
    def single(cls, device: str = "cpu") -> "Mesh":
        """One rank and no process group, whatever the environment says: for tests and for embedding the engine."""
        return cls._alone(Layout().resolve(1), torch.device(device), timedelta(minutes=30))

    @classmethod
    def _alone(cls, layout: Layout, device: torch.device, timeout: timedelta) -> "Mesh":
        axes = {name: Axis(name, 1, 0, None) for name in AXIS_DIMS}
        return cls(layout, 0, 1, device, zero_mesh=None, timeout=timeout, **axes)

    def new_gloo_group(self) -> dist.ProcessGroup | None:
        """A new gloo group of all ranks (collective); None for one rank.

        Asynchronous checkpoints talk from a thread of their own: sharing a group with training would dead-lock.
        """
        return None if self.world_size == 1 else dist.new_group(backend="gloo", timeout=self.timeout)

    def close(self) -> None:
        """Leave the process group. Call it once, when no collective is under way."""
        if self.world_size > 1:
            dist.destroy_process_group()


def axis_ranks(layout: Layout, axis: str, rank: int) -> list[int]:
    """Global ranks of the group of `rank` along `axis`, in the order of their coordinate. `layout` must be resolved."""
    grid = torch.arange(layout.pp * layout.dp * layout.cp * layout.tp).view(layout.pp, layout.dp, layout.cp, layout.tp)
    coordinate = (grid == rank).nonzero()[0].tolist()
    return grid[tuple(slice(None) if dim in AXIS_DIMS[axis] else coordinate[dim] for dim in range(4))].flatten().tolist()


def _make_axis(layout: Layout, axis: str, rank: int, timeout: timedelta) -> Axis:
    ranks = axis_ranks(layout, axis, rank)
    if len(ranks) == 1:
        return Axis(axis, 1, 0, None)
    if len(ranks) == dist.get_world_size():
        group = dist.group.WORLD
    else:  # local synchronization: only the members take part, so a rank makes its own groups and no others
        group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True, group_desc=axis)
    return Axis(axis, len(ranks), ranks.index(rank), group)


def _read_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun exports them; (0, 1, 0) when it exported none."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    if not any(name in found for name in names):
        return 0, 1, 0
    values = []
    for name in names:
        if not found.get(name, "").isdigit():
            raise InputError(
                f"environment variable {name} is {found.get(name, 'not set')!r} but {sorted(found)} are set: "
                "start the ranks with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK for a single process"
            )
        values.append(int(found[name]))
    rank, world_size, local_rank = values
    if not rank < world_size:
        raise InputError(f"environment has RANK {rank} but WORLD_SIZE {world_size}: RANK counts from 0, start with torchrun")
    if world_size > 1 and not (found.get("MASTER_ADDR") and found.get("MASTER_PORT", "").isdigit()):
        raise InputError(
            f"WORLD_SIZE is {world_size} but MASTER_ADDR is {found.get('MASTER_ADDR')!r} and MASTER_PORT "
            f"{found.get('MASTER_PORT')!r}: start the ranks with torchrun, which sets the address they meet at"
        )
    return rank, world_size, local_rank


def _pick_device(device: Device, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch {torch.__version__} sees no CUDA device, use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} needs a GPU of its own but this machine shows {torch.cuda.device_count()}: "
            f"start at most --nproc-per-node {torch.cuda.device_count()}, or use --device cpu"
        )
    return torch.device("cuda", local_rank)


def _rendezvous(rank: int, world_size: int, backend: str, timeout: timedelta) -> None:
    """Meet the other ranks and make the default process group."""
    patience = min(timeout, timedelta(seconds=RENDEZVOUS_SECONDS))
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=patience))
        store.set_timeout(patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        store.set_timeout(timeout)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError; a bad port is a ValueError
        cause = str(error).strip().splitlines()[0]
        raise InputError(
            f"rank {rank} of {world_size} can't meet the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"within {patience.total_seconds():.0f} s ({cause}): check that all {world_size} ranks were started and reach it"
        ) from error
