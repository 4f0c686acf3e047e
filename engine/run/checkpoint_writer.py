"""Writes one checkpoint so that it exists entirely or not at all.

All ranks write into step-N.partial. When every file of every rank is on the disk, rank 0 renames the folder to step-N: a
folder of that name is complete, whenever a process was killed. A removal renames first, for the same reason.
"""

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from ..config import InputError
from .folder import saved_steps

PARTIAL = ".partial"
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointWriter(dcp.FileSystemWriter):
    """torch's writer of files, with a copy of the tensors first, plain words for a full disk, and a rename at the very end."""

    def __init__(self, folder: Path, keep: int, state: dict[str, Any]):
        """folder: checkpoints/step-N. keep: how many checkpoints stay, this one included. state: written as state.json."""
        self.folder = folder
        self.partial = folder.with_name(folder.name + PARTIAL)
        self.seconds = 0.0
        """From the start of the save to the rename; on rank 0, once that happened."""
        self.total_bytes = 0
        """Written by all ranks; on rank 0, once they have."""
        self._keep = keep
        self._state_json = json.dumps(state, indent=2, allow_nan=False)
        self._local_bytes = 0
        self._start = time.perf_counter()
        super().__init__(self.partial, per_thread_copy_ahead=0)

    def stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, made on the calling thread: the originals may change as soon as this returns."""
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        for copy in copies.values():
            local = copy.to_local() if hasattr(copy, "to_local") else copy  # a DTensor counts this rank's part only
            self._local_bytes += local.numel() * local.element_size()
        return copies

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        """This rank's files, on the disk when this returns."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise self._in_words(error) from error

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """On rank 0, after write_data of every rank: makes the checkpoint exist, then removes the oldest."""
        try:
            super().finish(metadata, results)
            self._require_shared_folder({result.storage_data.relative_path for rank in results for result in rank})
            (self.partial / "state.json").write_text(self._state_json + "\n")
            for path in (self.partial / ".metadata", self.partial / "state.json", self.partial):
                sync_to_disk(path)
            self.partial.rename(self.folder)
            sync_to_disk(self.folder.parent)
            for step in saved_steps(self.folder.parent)[: -self._keep]:
                old = self.folder.with_name(f"step-{step}")
                shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))
        except Exception as error:
            raise self._in_words(error) from error
        self.total_bytes = sum(result.size_in_bytes for rank in results for result in rank)
        self.seconds = time.perf_counter() - self._start

    def _require_shared_folder(self, files: set[str]) -> None:
        if unseen := [name for name in sorted(files) if not (self.partial / name).exists()]:
            raise InputError(
                f"rank 0 can't see {self.partial / unseen[0]}, which another rank wrote: --run.dir must lie on a file system "
                "that all nodes share"
            )

    def _in_words(self, error: Exception) -> Exception:
        """An InputError for what the user can mend. torch's zip writer hides an OSError behind errors of its own."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            return error
        older = [f"step-{step}" for step in saved_steps(self.folder.parent)]
        kept = f"{' and '.join(older)} unharmed" if older else "there is no earlier one"
        if cause.errno not in NO_SPACE:
            where = cause.filename or self.partial
            return InputError(f"checkpoint {self.folder}: {where} can't be written ({cause.strerror}); {kept}")
        free = shutil.disk_usage(self.folder.parent).free
        return InputError(
            f"checkpoint {self.folder}: {cause.strerror}; this rank writes {self._local_bytes:,} bytes and {free:,} are free "
            f"(a quota or `ulimit -f` may allow less); {kept}: free space or lower --run.keep, then go on with --run.resume"
        )


def sync_to_disk(path: Path) -> None:
    """What was written to the file, or the entries of the folder, survive a power cut when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
