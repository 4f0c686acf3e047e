"""Launch files as a user starts them: in processes of their own, judged by exit code, output and files."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Launched:
    """A launch file, running or ended; stdout and stderr together in `log`."""

    process: subprocess.Popen
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float) -> int:
        """The exit code. AssertionError with the output where the process outlives `timeout` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> None:
        """Until the condition holds, while the process lives."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode} too early:\n{self.output}"
            assert time.monotonic() < deadline, f"nothing after {timeout} s:\n{self.output}"
            time.sleep(0.005)

    def ranks(self) -> list[int]:
        """Process ids of the ranks that torchrun started, in rank order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children]

    def kill(self) -> None:
        """torchrun and its ranks (they have sessions of their own)."""
        for pid in [*self.ranks(), self.process.pid] if self.process.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Launcher:
    """Starts launch files in `folder` and ends what is left of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._started: list[Launched] = []

    def start(self, file: str, *flags: object, ranks: int = 1, wrap: Sequence[str] = (), **environment: str) -> Launched:
        """start("grpo.py", "tiny", "--seed", 1, ranks=2); one rank runs without torchrun. wrap: a command to run it under."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [*wrap, sys.executable, *torchrun, str(REPOSITORY / "launch" / file), *map(str, flags)]
        log = self.folder / f"launch-{len(self._started)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=self.folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "140"} | environment,
            )  # fmt: skip
        self._started.append(Launched(process, log))
        return self._started[-1]

    def run(self, file: str, *flags: object, code: int = 0, timeout: float = 120, ranks: int = 1, **options: Any) -> str:
        """Run to the end and give the output. `code` is the exit code to expect; torchrun turns every failure into 1."""
        launched = self.start(file, *flags, ranks=ranks, **options)
        ended = launched.wait(timeout)
        expected = min(code, 1) if ranks > 1 else code
        assert ended == expected, f"exit code {ended}, expected {expected}:\n{launched.output}"
        return launched.output

    def close(self) -> None:
        for launched in self._started:
            launched.kill()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def module_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launched"))
    yield launcher
    launcher.close()
