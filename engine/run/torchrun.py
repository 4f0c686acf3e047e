"""What torchrun tells a rank about itself, and how a rank tells torchrun why it ended.

The mesh knows the ranks too, but a run can fail before there is a mesh. Measured with torch 2.13: torchrun looks at its
ranks every 0.1 s; when one has exited with an error it sends the others SIGTERM, and SIGKILL 30 s later (--shutdown-timeout
changes that). It passes SIGINT, SIGTERM, SIGHUP and SIGQUIT that it gets itself on to the ranks, which live in sessions of
their own, so that a terminal's Ctrl-C reaches torchrun alone.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

MESSAGE_LIMIT = 2000
"""Characters of a message shown in the box that torchrun prints last; the whole text stands elsewhere."""


@dataclass(frozen=True)
class Torchrun:
    """One rank's place as its environment gives it. Without torchrun: the only rank, and no file to write errors into."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    """Ranks on this node."""
    error_file: Path | None = None
    """Where torchrun reads the reason of this rank's failure. The ranks of a node have theirs in sibling folders."""
    parent: int | None = None
    """Process id of torchrun; None without it."""

    @classmethod
    def from_environment(cls) -> "Torchrun":
        """A malformed number counts as absent: the mesh refuses it, with a better message."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        numbers = {name.lower(): int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()}
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        return cls(
            **numbers,
            error_file=Path(error_file) if error_file else None,
            parent=os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None,
        )

    def record(self, message: str) -> None:
        """Make `message` the reason that torchrun prints for this rank; the first record of a process stays."""
        if self.error_file is None or self.error_file.exists():
            return
        extra = {"py_callstack": message[:MESSAGE_LIMIT], "timestamp": str(int(time.time()))}
        record = {"message": {"message": message[:MESSAGE_LIMIT], "extraInfo": extra}}  # the form of torch's ErrorHandler
        try:
            beside = self.error_file.with_suffix(".part")
            beside.write_text(json.dumps(record))
            beside.rename(self.error_file)
        except OSError as error:  # its temporary folder is full or gone: the message still stands on the terminal
            print(f"rank {self.rank}: {self.error_file} can't be written ({error.strerror})", file=sys.stderr)

    def recorded(self) -> dict[int, str]:
        """Local rank -> message, for every rank of this node that recorded one, itself included."""
        if self.error_file is None:
            return {}
        files = self.error_file.parent.parent.glob(f"*/{self.error_file.name}")
        return {int(file.parent.name): json.loads(file.read_text())["message"]["message"] for file in files}

    def first_to_fail(self) -> int:
        """Local rank of the first rank of this node that asked this: every rank gets the same answer, once it asked."""
        if self.error_file is None:
            return self.local_rank
        claim = self.error_file.parent.parent / "first-failure"
        mine = claim.with_suffix(f".{self.local_rank}")
        try:
            mine.write_text(str(self.local_rank))
            os.link(mine, claim)  # fails when it exists; unlike exclusive creation, the file is never seen empty
        except FileExistsError:
            return int(claim.read_text())
        except OSError:
            return self.local_rank
        return self.local_rank
