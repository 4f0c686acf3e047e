"""What a run measured and what it sampled: metrics.jsonl, samples.jsonl and TensorBoard events.

Both files hold one JSON object a line and are cut back on resume to where the checkpoint left them, so that the files of a
resumed run equal those of an uninterrupted one. Keys whose values may differ between equal runs start with time/ or mem/.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..batch import Group, Prompt
from ..config import InputError

REWARD = "reward/mean"
ACCURACY = "eval/pass@1"
"""Accuracy on held-out questions, in the steps that evaluate."""
LENGTH = "response/length"
"""Mean response length in tokens."""
KL = "kl/ref"
"""Nats a token, to the reference policy; only where the loss has a KL term."""
KL_OLD = "kl/old"
"""Nats a token, to the policy before the step's first update: what stands in KL's place without a KL term."""
ENTROPY = "entropy"
"""Nats a token."""
TOKENS_PER_SECOND = "time/tokens_per_second"
"""Response tokens of the step, all ranks, over the seconds of the whole step."""
MISMATCH = "mismatch/mean"
MISMATCH_MAX = "mismatch/max"
"""|log-prob by the rollout engine - by the trainer|, over the step's sampled tokens."""


class JsonLines:
    """A file of JSON objects, one a line, appended to and flushed line by line. Floats are written exactly (repr)."""

    def __init__(self, path: Path, keep_bytes: int = 0):
        """Open `path` for appending after its first `keep_bytes` bytes; what follows them, a torn line too, is removed.

        Raises InputError when the file is shorter, or `keep_bytes` is not the end of a line.
        """
        self.path = path
        self._file = path.open("a+b")
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(keep_bytes - 1, 0))
        if size < keep_bytes or (keep_bytes and self._file.read(1) != b"\n"):
            raise InputError(
                f"{path} has {size} bytes and no line ending at byte {keep_bytes}, where the checkpoint left it: it was "
                "changed since; restore the file, or start a new run"
            )
        self._file.truncate(keep_bytes)
        self._file.seek(0, os.SEEK_END)

    def append(self, record: Mapping[str, Any]) -> None:
        """One line, handed to the operating system before this returns: a killed process loses none of it.

        Raises ValueError for NaN and infinity, which JSON can't express, and InputError when the file can't grow.
        """
        try:
            self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path} can't be written ({error.strerror}): free space, then add --run.resume") from error

    def position(self) -> int:
        """Length of the file in bytes, all of them on the disk: the `keep_bytes` of a resume from a checkpoint made now."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class MetricsLog:
    """metrics.jsonl and TensorBoard events, written by rank 0; on other ranks every method does nothing."""

    def __init__(self, path: Path, tensorboard: Path, *, rank: int = 0, keep_bytes: int = 0, after_step: int = 0):
        """keep_bytes, after_step: on resume, the position and the step stored in the checkpoint.

        TensorBoard forgets what an earlier attempt wrote beyond `after_step` (its purge_step).
        """
        self._lines = self._events = None
        if rank == 0:
            self._lines = JsonLines(path, keep_bytes)
            self._events = SummaryWriter(str(tensorboard), purge_step=after_step + 1 if after_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line {"step": step, **values}; values are numbers. Raises FloatingPointError naming a value that isn't finite:
        what wasn't measured in this step is left out, never NaN.
        """
        if self._lines is None:
            return
        numbers = {key: value if isinstance(value, int) else float(value) for key, value in values.items()}
        for key, value in numbers.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"metric {key} is {value} in step {step}")
        self._lines.append({"step": step, **numbers})
        now = time.time()
        for key, value in numbers.items():
            self._events.add_scalar(key, value, step, walltime=now)
        self._events.flush()  # its own clock is two minutes, which a killed process would lose

    def position(self) -> int:
        """For the checkpoint, after `log` of the step that it follows."""
        return 0 if self._lines is None else self._lines.position()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()


class SampleLog:
    """samples.jsonl: responses with their scores, for a person to read. Written by rank 0."""

    def __init__(self, path: Path, *, rank: int = 0, keep_bytes: int = 0):
        self._lines = JsonLines(path, keep_bytes) if rank == 0 else None

    def log(self, step: int, groups: Sequence[Group]) -> None:
        """One line a sample of the (scored) groups."""
        if self._lines is None:
            return
        for group in groups:
            for index, (sample, score) in enumerate(zip(group.samples, group.scores, strict=True)):
                record = {
                    "step": step, "prompt_id": group.prompt.id, "source": group.prompt.source, "sample_id": sample.id,
                    "question": question_text(group.prompt), "answer": group.prompt.answer, "response": sample.text,
                    "score": _judged(score.value), "parts": {part: _judged(v) for part, v in score.parts.items()},
                    "why": score.why,
                    "finish_reason": sample.finish_reason, "length": len(sample),
                }  # fmt: skip
                if group.advantages:
                    record["advantage"] = group.advantages[index]
                self._lines.append(record)

    def position(self) -> int:
        """For the checkpoint, after `log` of the step that it follows."""
        return 0 if self._lines is None else self._lines.position()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def _judged(value: float) -> float | None:
    """None for what no scorer could judge (NaN), which JSON can't express."""
    return value if math.isfinite(value) else None


def question_text(prompt: Prompt) -> str:
    """What a reader should see: the text, or the contents of the messages."""
    if prompt.text is not None:
        return prompt.text
    return "\n".join(message["content"] for message in prompt.messages)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The complete lines of a metrics.jsonl, in order; a torn last line, of a running or killed writer, is left out."""
    whole_lines = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole_lines.splitlines()]
