"""The folder of one run: who may write into it, which settings it belongs to, where its files are."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from ..config import InputError

CHECKPOINT_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, how often it saves, when it stops. A resume may change these settings and no others."""

    dir: Path | None = None
    """The run folder. Unset: runs/<preset>-<date-time> below the current folder."""
    resume: bool = False
    """Go on from the newest checkpoint in --run.dir; a run that ended before its first save begins again there."""
    stop_at: int | None = None
    """Stop after this step, as if interrupted: with a save. Unset: run to the end of the schedule (--train.steps)."""
    save_every: int = 10
    """Steps between checkpoints. At most this many steps are lost by a crash; the save itself runs beside the training."""
    keep: int = 2
    """Checkpoints kept, the newest ones. With 2 one is left if the newest turns out unreadable."""
    sample_groups: int = 16
    """Prompts a step whose responses are written to samples.jsonl, the first of rank 0's share; 0 writes none."""
    stall_seconds: float = 600.0
    """Without a sign of progress for this long a rank prints its stacks and exits; 0 never. Above the longest single phase."""

    def __post_init__(self) -> None:
        for name, least in (("save_every", 1), ("keep", 1), ("sample_groups", 0), ("stall_seconds", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--run.{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        if self.stop_at is not None and self.stop_at < 1:
            raise InputError(f"--run.stop-at {self.stop_at}: must be at least 1, the number of the first step")
        if self.resume and self.dir is None:
            raise InputError("--run.resume needs --run.dir: the folder of the run to go on with")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside an opened run folder. On rank 0 the folder stays locked until the process ends."""

    path: Path
    settings_digest: str
    """SHA-256 of the settings without run.*: a checkpoint that carries another one belongs to another run."""
    _lock: TextIO | None = None

    @classmethod
    def open(
        cls, run: RunConfig, settings: Any, preset: str, *, rank: int = 0, share: Callable[[Any], Any] = lambda value: value
    ) -> "RunFolder":
        """Create the folder of a new run, or check that of a run to resume. Collective over the ranks that `share`.

        settings: the launch file's config dataclass, written to config.json. share: returns rank 0's argument on every
        rank; rank 0 alone touches the file system. Raises InputError on every rank for a folder in use, a used one
        without --run.resume, a resume where no run was started, and settings other than the recorded ones.
        """
        recorded = settings_as_json(settings)
        if rank == 0:
            try:
                path, lock = _claim(run, recorded, preset)
                share((str(path), None))
            except InputError as error:
                share((None, str(error)))
                raise
        else:
            (name, mistake), lock = share(None), None
            if mistake is not None:
                raise InputError(mistake)
            path = Path(name)
        return cls(path, _digest(recorded), lock)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints in a run's checkpoints folder, ascending."""
    names = [entry.name for entry in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := CHECKPOINT_NAME.fullmatch(name)))


def settings_as_json(settings: Any) -> dict[str, Any]:
    """A (nested) config dataclass as JSON values: what config.json holds. TypeError for values that JSON can't express."""

    def plain(value: Any) -> str:
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{type(value).__name__} {value!r} in the settings can't be written to config.json")

    return json.loads(json.dumps(dataclasses.asdict(settings), default=plain, allow_nan=False))


def _claim(run: RunConfig, recorded: dict[str, Any], preset: str) -> tuple[Path, TextIO]:
    if run.resume:
        return _resume(Path(run.dir), recorded)
    try:
        path = _new_folder(preset) if run.dir is None else Path(run.dir)
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"--run.dir {run.dir} is a file: name a folder") from None
    except OSError as error:
        where = run.dir or "runs"
        raise InputError(f"--run.dir {where} can't be created ({error.strerror}): choose another --run.dir") from None
    held = sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")
    if held and "config.json" not in held:
        raise InputError(f"--run.dir {path} is not empty (it holds {held[0]}) and is no run: choose another folder")
    lock = _lock(path)  # from here on no other process decides about this folder
    if saved_steps(path / "checkpoints") or (path / "metrics.jsonl").exists():  # what never began may begin again, mended
        raise InputError(f"--run.dir {path} already holds a run: add --run.resume to go on with it, or choose another folder")
    _write_config(path, recorded)
    return path, lock


def _new_folder(preset: str) -> Path:
    """Creates runs/<preset>-<date-time>; with a number behind it where another run began in the same second."""
    name = f"{preset}-{datetime.now():%Y%m%d-%H%M%S}"
    Path("runs").mkdir(exist_ok=True)
    for n in range(1, 1000):
        path = Path("runs") / (name if n == 1 else f"{name}-{n}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise InputError(f"runs/ holds {name} and 999 more of this second: name a folder with --run.dir")


def _resume(path: Path, recorded: dict[str, Any]) -> tuple[Path, TextIO]:
    config = path / "config.json"
    if not config.is_file():
        what = "is not a folder" if not path.is_dir() else "holds no config.json"
        raise InputError(f"--run.resume: {path} {what}, so no run was started there: check --run.dir")
    lock = _lock(path)
    try:
        before = json.loads(config.read_text())
    except ValueError as error:
        raise InputError(f"--run.resume: {config} is not JSON ({error}): restore it, or start a new run") from None
    _refuse_changes(_flatten(before), _flatten(recorded), config)
    logged = _last_logged_step(path / "metrics.jsonl")
    if not saved_steps(path / "checkpoints") and ((path / "model").exists() or logged >= 2 * before["run"]["save_every"]):
        raise InputError(
            f"--run.resume: {path} holds a log of {logged} steps but no checkpoint: its checkpoints were removed; "
            "restore them, or start a new run in another folder"
        )
    return path, lock


def _last_logged_step(metrics: Path) -> int:
    """Number of complete lines after that of step 0; 0 without a file."""
    return max(metrics.read_bytes().count(b"\n") - 1, 0) if metrics.is_file() else 0


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], config: Path) -> None:
    absent = object()
    changed = [
        f"--{key.replace('_', '-')} was {_shown(before, key)}, now {_shown(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if not key.startswith("run.") and before.get(key, absent) != now.get(key, absent)
    ]
    if changed:
        raise InputError(
            f"--run.resume may change only --run.* settings; {'; '.join(changed)} ({config}): give the recorded values, "
            "or start a new run"
        )


def _shown(settings: dict[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "not there"


def _flatten(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{above}{key}.") if isinstance(value, dict) and value else {above + key: value}
    return flat


def _digest(recorded: dict[str, Any]) -> str:
    lasting = {key: value for key, value in recorded.items() if key != "run"}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def _lock(path: Path) -> TextIO:
    """The lock file, open. The kernel drops the lock with the process, however it ends, so it can't go stale."""
    try:
        lock = (path / ".lock").open("a+")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise InputError(f"--run.dir {path} is in use by {lock.read().strip()}: wait for it or choose another folder") from None
    except OSError as error:
        raise InputError(f"--run.dir {path} can't be written ({error.strerror}): choose another --run.dir") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _write_config(path: Path, recorded: dict[str, Any]) -> None:
    beside = path / "config.json.part"
    beside.write_text(json.dumps(recorded, indent=2) + "\n")
    beside.rename(path / "config.json")
