"""How a run ends when something goes wrong, in real processes: errors, dead ranks, Ctrl-C, stalls."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from strop.engine.run.failure import is_lost_peer

PRELUDE = """
import os, re, sys, time
from pathlib import Path
from strop.engine.config import InputError
from strop.engine.run.failure import FailureReport
from strop.engine.run.interrupt import Interrupt
from strop.engine.run.watchdog import Watchdog
folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
def started(): (folder / f"started-{rank}").write_text(str(os.getpid()))
def group():
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    return lambda: dist.all_reduce(torch.ones(1))
"""
NOT_OURS = ("TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(NOT_OURS)} | {"OMP_NUM_THREADS": "1"}


def start(folder: Path, body: str, ranks: int = 1) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    script = folder / "launch.py"
    script.write_text(PRELUDE + body)
    torchrun = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *torchrun, str(script), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def finish(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str]:
    try:
        output = process.communicate(timeout=seconds)[0]
    finally:
        process.kill()
    return process.returncode, output


def run(folder: Path, body: str, ranks: int = 1) -> tuple[int, str]:
    return finish(start(folder, body, ranks))


def wait_for(*files: Path, seconds: float = 40) -> float:
    """Until all exist; returns the time of day of the last."""
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"no {files}"
        time.sleep(0.01)
    return max(file.stat().st_mtime for file in files)


def own_text(output: str) -> str:
    """What the ranks printed: all before torchrun's own words."""
    return re.split(r"\n[WE]\d{4} |^[WE]\d{4} ", output, maxsplit=1)[0]


def ended(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


# One process


def test_a_users_mistake_is_one_line(tmp_path):
    code, output = run(tmp_path, 'with FailureReport():\n raise InputError("--train.lr -1: must be positive")')
    assert (code, output) == (2, "error: --train.lr -1: must be positive\n")


def test_any_other_error_keeps_its_traceback(tmp_path):
    body = """
from strop.engine.run.progress import RunProgress
with FailureReport() as failure:
    failure.folder = folder
    with Watchdog(0) as watchdog, RunProgress(5, watchdog) as progress:
        with progress.phase("reward"):
            raise KeyError("gold")
"""
    code, output = run(tmp_path, body)
    assert code == 1
    assert output.startswith("rank 0 failed in phase reward of step 1:\nTraceback") and output.count("Traceback") == 1
    assert "KeyError: 'gold'" in output and 'raise KeyError("gold")' in output
    assert output in (tmp_path / "error-rank-0.txt").read_text()


def test_exits_that_are_no_failures_pass_through(tmp_path):
    assert run(tmp_path, 'with FailureReport(): sys.exit(0)') == (0, "")
    assert run(tmp_path, 'with FailureReport(): sys.exit(4)') == (4, "")
    assert run(tmp_path, 'with FailureReport(): raise KeyboardInterrupt') == (130, "interrupted: nothing was saved\n")


@pytest.mark.parametrize(
    ("target", "said"),
    [("| sleep 0", ""), ("> /dev/full", "error: standard output can't be written (No space left on device)\n")],
)
def test_where_nothing_can_be_printed(tmp_path, target, said):
    """Into a pipe that nobody reads (| head) and onto a full disk: met while printing, or as Python ends."""
    (tmp_path / "launch.py").write_text(f"""{PRELUDE}
with FailureReport():
    time.sleep(0.3)
    print("line\\n" * int(sys.argv[2]))
    sys.exit(0)
""")
    for lines in (1, 100_000):
        command = f"set -o pipefail; {sys.executable} {tmp_path}/launch.py {tmp_path} {lines} {target}"
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT)
        assert (ended.returncode, ended.stderr) == (1, said)


def test_a_broken_pipe_of_something_else_is_an_error(tmp_path):
    code, output = run(tmp_path, 'with FailureReport():\n raise BrokenPipeError("a reward worker is gone")')
    assert code == 1 and "BrokenPipeError: a reward worker is gone" in output


def test_lost_peers_are_told_from_own_errors():
    gloo = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:5508")
    assert is_lost_peer(gloo) and is_lost_peer(RuntimeError("[pair.cc:537] Read error [::1]:1: Connection reset by peer"))
    assert not is_lost_peer(ConnectionResetError("Connection reset by peer")), "of a reward server, say"
    assert not is_lost_peer(RuntimeError("Timed out waiting 60000ms for recv operation to complete"))
    wrapped = ValueError("in between")
    wrapped.__cause__ = gloo
    assert is_lost_peer(wrapped)
    gloo.__context__ = KeyError("what really happened first")
    assert not is_lost_peer(wrapped)


# Two ranks


def test_the_same_mistake_on_all_ranks_is_told_once(tmp_path):
    code, output = run(tmp_path, 'with FailureReport():\n raise InputError("--data.path x.jsonl line 37: no JSON")', ranks=2)
    assert code != 0
    assert own_text(output) == "error: --data.path x.jsonl line 37: no JSON"
    assert re.search(r"Root Cause.*traceback : error: --data.path x.jsonl line 37: no JSON\n=+\n*$", output, re.DOTALL)


def test_a_mistake_of_one_rank_ends_the_one_that_waits_for_it(tmp_path):
    """Rank 0 is in the rendezvous of the process group, which alone would give up after minutes."""
    body = """
with FailureReport():
    if rank == 1:
        while not (folder / "started-0").exists(): time.sleep(0.01)
        time.sleep(0.3)
        raise InputError("--model x: no such folder")
    import torch, torch.distributed as dist
    started()
    dist.init_process_group("gloo")
"""
    process = start(tmp_path, body, ranks=2)
    waiting_since = wait_for(tmp_path / "started-0")
    code, output = finish(process)
    assert code != 0 and time.time() - waiting_since < 15
    assert own_text(output) == "error (rank 1): --model x: no such folder"


def test_the_rank_that_failed_is_told_and_the_one_that_lost_it_is_not(tmp_path):
    body = """
with FailureReport() as failure:
    failure.folder = folder
    all_reduce = group()
    all_reduce()
    started()
    if rank == 1:
        raise FloatingPointError("loss is nan in step 3")
    all_reduce()
"""
    process = start(tmp_path, body, ranks=2)
    failed_at = wait_for(tmp_path / "started-0", tmp_path / "started-1")
    code, output = finish(process)
    assert code != 0 and time.time() - failed_at < 15
    text = own_text(output)
    assert text.count("Traceback") == 1 and "rank 1 failed:\nTraceback" in text and "loss is nan in step 3" in text
    assert set(re.findall(r"^rank 0.*", text, re.MULTILINE)) <= {"rank 0 lost another rank; that one's error is the cause"}
    box = r"Root Cause.*rank +: 1 .*loss is nan in step 3 \(traceback: \S+error-rank-1.txt\)\n=+\n*$"
    assert re.search(box, output, re.DOTALL)


def test_kill_9_of_a_rank_takes_the_other_down_within_seconds(tmp_path):
    """The survivor is in a gloo collective with both safeguards running; SIGTERM must end it there, not SIGKILL 30 s later."""
    body = """
with FailureReport() as failure, Watchdog(600, folder), Interrupt():
    all_reduce = group()
    all_reduce()
    started()
    if rank == 1:
        time.sleep(600)
    all_reduce()
"""
    process = start(tmp_path, body, ranks=2)
    wait_for(tmp_path / "started-0", tmp_path / "started-1")
    time.sleep(0.3)
    killed_at = time.time()
    os.kill(int((tmp_path / "started-1").read_text()), signal.SIGKILL)
    code, output = finish(process)
    assert code != 0 and time.time() - killed_at < 10
    assert "Traceback" not in own_text(output)
    assert re.search(r"Root Cause.*rank +: 1 .*Signal 9 \(SIGKILL\)", output, re.DOTALL)


# Ctrl-C

LOOP = """
with FailureReport(), Interrupt() as interrupt:
    started()
    while not interrupt.requested: time.sleep(0.01)
    (folder / f"saved-{rank}").write_text("x")
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
print(f"rank {rank} saved", flush=True)
"""


def test_ctrl_c_asks_for_a_save_and_the_second_ends_at_once(tmp_path):
    process = start(tmp_path / "one", LOOP)
    wait_for(tmp_path / "one/started-0")
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 0 and output.endswith("rank 0 saved\n") and "stopping at the next safe point" in output

    process = start(tmp_path / "two", LOOP.replace("float(sys.argv[2]) if len(sys.argv) > 2 else 0", "600"))
    wait_for(tmp_path / "two/started-0")
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "two/saved-0")
    process.send_signal(signal.SIGINT)
    code, output = finish(process, 10)
    assert code == 130 and "stopped at once" in output and "rank 0 saved" not in output


def test_sigterm_ends_at_once_and_leaving_restores_ctrl_c(tmp_path):
    process = start(tmp_path / "term", LOOP)
    wait_for(tmp_path / "term/started-0")
    process.terminate()
    assert finish(process, 10)[0] == -signal.SIGTERM
    body = "with Interrupt(): pass\nwith FailureReport():\n started()\n time.sleep(600)"
    process = start(tmp_path / "after", body)
    wait_for(tmp_path / "after/started-0")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert finish(process, 10) == (130, "interrupted: nothing was saved\n")


TALKING_LOOP = """
with FailureReport(), Interrupt() as interrupt:
    import torch, torch.distributed as dist
    group()()
    started()
    stop = torch.zeros(1)
    while not stop.item():
        stop.fill_(interrupt.requested)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
    print(f"rank {rank} saved", flush=True)
"""


def test_ctrl_c_through_torchrun_and_ranks_whose_torchrun_is_gone(tmp_path):
    """The signal arrives while gloo talks, and both ranks stop in the same round."""
    asked = start(tmp_path / "asked", TALKING_LOOP, ranks=2)
    orphaned = start(tmp_path / "orphaned", LOOP, ranks=2)
    wait_for(*(tmp_path / name / f"started-{rank}" for name in ("asked", "orphaned") for rank in (0, 1)))
    asked.send_signal(signal.SIGINT)
    orphaned.kill()
    for rank in (0, 1):
        assert ended(int((tmp_path / f"orphaned/started-{rank}").read_text()), 10), "an orphan trains on unseen"
    _, output = finish(asked)
    assert sorted(re.findall(r"rank \d saved", output)) == ["rank 0 saved", "rank 1 saved"]
    assert output.count("stopping at the next safe point") == 1


# Stalls


def test_a_stall_in_c_code_shows_phase_and_stacks(tmp_path):
    body = """
import threading
threading.Thread(target=lambda: threading.Event().wait(), daemon=True).start()
def stuck_here(): time.sleep(600)
with FailureReport(), Watchdog(0.5, folder) as watchdog:
    for _ in range(4):
        watchdog.beat("step 7, rollout")
        time.sleep(0.3)
    started()
    stuck_here()
"""
    process = start(tmp_path, body)
    stuck_since = wait_for(tmp_path / "started-0")
    code, output = finish(process)
    assert code == 3 and time.time() - stuck_since < 10
    assert "rank 0: no progress for 1 s in phase 'step 7, rollout' (--run.stall-seconds 0.5)" in output or "for 0 s" in output
    assert "in stuck_here" in output and "in wait" in output, "the stacks of all threads"
    assert "in stuck_here" in (tmp_path / "stall-rank-0.txt").read_text()


def test_a_stall_with_python_locked(tmp_path):
    """The regular expression engine never lets another thread run: no Python code could report."""
    body = """
with FailureReport(), Watchdog(0.5, folder):
    re.match(r"(a+)+$", "a" * 60 + "b")
"""
    code, output = run(tmp_path, body)
    assert code == 1 and "Timeout" in output and "launch.py" in output


def test_a_stall_whose_report_cannot_be_written(tmp_path):
    code, output = run(tmp_path, 'with Watchdog(0.3, folder / "absent"): time.sleep(600)')
    assert code == 3 and "no progress" in output


def test_a_rank_in_a_collective_and_the_stuck_one_it_waits_for(tmp_path):
    body = """
def stuck_here(): time.sleep(600)
with FailureReport() as failure:
    all_reduce = group()
    all_reduce()
    with Watchdog(1.0, folder) as watchdog:
        started()
        if rank == 1:
            watchdog.beat("step 2, rollout")
            stuck_here()
        time.sleep(0.5)
        watchdog.beat("step 2, train")
        all_reduce()
"""
    process = start(tmp_path, body, ranks=2)
    stuck_since = wait_for(tmp_path / "started-0", tmp_path / "started-1")
    code, output = finish(process)
    assert code != 0 and time.time() - stuck_since < 15
    assert "rank 1: no progress for 1 s in phase 'step 2, rollout'" in own_text(output)
    assert "in stuck_here" in (tmp_path / "stall-rank-1.txt").read_text()
    assert re.search(r"Root Cause.*rank +: 1 .*no progress for 1 s in phase 'step 2, rollout'", output, re.DOTALL)
