"""Whole-run checkpoints: everything a resume needs, written beside the training.

checkpoints/step-N/ holds the tensors in the format of torch.distributed.checkpoint, which any layout can load, and
state.json: whatever else the caller wants back. It must lie on a file system that all ranks share.
"""

import json
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..config import GIB, InputError
from .checkpoint_writer import PARTIAL, CheckpointWriter
from .folder import saved_steps

NestedTensors = Mapping[str, "Tensor | NestedTensors"]
"""Tensors (or DTensors) by name, nested as one likes; names are joined with dots. Every rank passes the same names.

A plain tensor counts as equal on all ranks and is written once; what differs between ranks is a DTensor, of which each rank
writes its own part.
"""


class Checkpoints:
    """The checkpoints of one run. All ranks call the same methods in the same order."""

    def __init__(self, path: Path, *, keep: int, settings_digest: str = "", rank: int = 0, group: ProcessGroup | None = None):
        """path: RunFolder.checkpoints; what an earlier process left unfinished there is removed.

        settings_digest: RunFolder's; a checkpoint with another one is refused. group: a gloo group of all ranks that nothing
        else uses (sharing training's dead-locks); None for one rank.
        """
        self.path = path
        self._keep = keep
        self._settings_digest = settings_digest
        self._rank = rank
        self._group = group
        self._newest = self.latest()
        self._writer: CheckpointWriter | None = None
        self._copy_seconds = 0.0
        if rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            for leftover in path.glob(f"step-*{PARTIAL}"):
                shutil.rmtree(leftover)
        if group is None:  # torch says so at every save and load
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None when there is none."""
        return max(saved_steps(self.path), default=None)

    def save(self, step: int, tensors: NestedTensors, state: Mapping[str, Any]) -> None:
        """Start saving the run as it stands after `step`; returns as soon as the tensors are copied to host memory.

        state: JSON values; rank 0's are stored. Waits for an earlier save first, and raises what that one raised. Does
        nothing when `step` is saved already, or being saved.
        """
        if step == self._newest:
            return
        self.finish()
        start = time.perf_counter()
        about = {
            "step": step, "settings": self._settings_digest, "ranks": self._group.size() if self._group else 1,
            "torch": torch.__version__, "state": dict(state),
        }  # fmt: skip
        writer = CheckpointWriter(self.path / f"step-{step}", self._keep, about)
        self._saved = dcp.async_save(
            _flatten(tensors), storage_writer=writer, process_group=self._group, no_dist=self._group is None
        )
        self._writer, self._newest = writer, step
        self._copy_seconds = time.perf_counter() - start

    def poll(self) -> dict[str, float]:
        """Call it every step: raises what a save in the background raised, as soon as it did.

        Once after each save it returns, on rank 0, time/save_background (seconds from its start to its end), time/save_copy
        (seconds of these in which training stood still) and mem/checkpoint_gib. Raises InputError when there is no space left
        or the folder can't be written; older checkpoints are unharmed.
        """
        return self.finish() if self._writer is not None and self._saved.done() else {}

    def finish(self) -> dict[str, float]:
        """Wait for the save under way, if there is one; otherwise like `poll`."""
        if self._writer is None:
            return {}
        writer, self._writer = self._writer, None
        try:
            self._saved.result()
        except CheckpointException as error:
            if self._rank == 0:
                shutil.rmtree(writer.partial, ignore_errors=True)  # gives its space back; a leftover would go at the next start
            raise _as_one(error, f"saving {writer.folder}") from error
        if self._rank != 0:
            return {}
        gib = writer.total_bytes / GIB
        return {"time/save_background": writer.seconds, "time/save_copy": self._copy_seconds, "mem/checkpoint_gib": gib}

    def load(self, step: int, tensors: NestedTensors) -> dict[str, Any]:
        """Overwrite `tensors`, in place and bit for bit, with those of step-<step>; returns the state stored with them.

        Ranks and the sharding of DTensors may differ from those that saved. Raises InputError for a checkpoint of other
        settings, one whose names, shapes or dtypes aren't those of `tensors`, and one that can't be read.
        """
        folder = self.path / f"step-{step}"
        flat = _flatten(tensors)
        reader = dcp.FileSystemReader(folder)
        try:
            about = json.loads((folder / "state.json").read_text())
            metadata = reader.read_metadata()
        except Exception as error:  # unpickling damaged bytes raises anything
            raise self._unreadable(folder, f"{type(error).__name__}: {error}") from error
        if about["settings"] != self._settings_digest:
            raise InputError(f"checkpoint {folder} was written under other settings than config.json's: it is another run's")
        _require_same_tensors(folder, metadata, flat, about["ranks"])
        try:
            dcp.load(flat, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            causes = sorted({f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()})
            raise self._unreadable(folder, "; ".join(causes)) from error
        self._newest = step
        return about["state"]

    def _unreadable(self, folder: Path, why: str) -> InputError:
        older = [f"step-{step}" for step in saved_steps(self.path) if self.path / f"step-{step}" != folder]
        fix = f"remove it to go on from {older[-1]}" if older else "there is no older one: start a new run"
        return InputError(f"checkpoint {folder} can't be read ({why}): {fix}")


def _as_one(error: CheckpointException, what: str) -> Exception:
    """What the ranks raised, as one exception: the user's mistake if there is one, otherwise everything."""
    mistakes = [cause for cause, _ in error.failures.values() if isinstance(cause, InputError)]
    return mistakes[0] if mistakes else RuntimeError(f"{what} failed: {error}")


def _flatten(tensors: NestedTensors, above: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        entries = {above + name: value} if isinstance(value, Tensor) else _flatten(value, f"{above}{name}.")
        assert not flat.keys() & entries.keys(), f"two tensors are named {sorted(flat.keys() & entries.keys())}"
        flat |= entries
    return flat


def _require_same_tensors(folder: Path, metadata: Metadata, flat: Mapping[str, Tensor], ranks: int) -> None:
    """Names, global shapes and dtypes. torch itself would ignore a tensor nobody asks for, and cast silently."""
    saved = metadata.state_dict_metadata
    for names, what in ((flat.keys() - saved.keys(), "lacks"), (saved.keys() - flat.keys(), "has an unknown")):
        if names:
            raise InputError(
                f"checkpoint {folder} (of {ranks} ranks) {what} {min(names)!r}, {len(names)} such in all: resume with the "
                "model, layout and version that wrote it"
            )
    for name, tensor in flat.items():
        entry = saved[name]
        assert isinstance(entry, TensorStorageMetadata), f"{name} in {folder} is no tensor"
        if entry.size != tensor.shape or entry.properties.dtype != tensor.dtype:
            raise InputError(
                f"checkpoint {folder}: {name} is {entry.properties.dtype} {list(entry.size)} there but {tensor.dtype} "
                f"{list(tensor.shape)} in this run: resume with the model and precision that wrote it"
            )
