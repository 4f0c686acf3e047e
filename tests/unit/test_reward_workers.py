"""Workers that hang, die, lie or are killed cost one counted score; none outlives its pool or its parent."""

import base64
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from strop.engine.reward.pool import MAX_REPLY_BYTES, Job, Outcome, WorkerPool

# Speaks the workers' protocol and misbehaves as the job's gold says.
FAKE_WORKER = """
import json, os, subprocess, sys, time
def say(**message): print(json.dumps(message), flush=True)
say(id=0, ready=True)
for line in sys.stdin:
    job = json.loads(line)
    deed, where = job["arguments"]["gold"], job["arguments"]["answer"]
    say(id=job["id"], started=True, missing="no such package" if deed == "missing" else "")
    if deed == "missing":
        continue
    if deed == "die" or (deed == "die once" and not os.path.exists(where)):
        open(where, "w").close()
        os.kill(os.getpid(), 9)
    if deed == "hang with child":
        with open(where, "w") as file:
            file.write(str(subprocess.Popen(["sleep", "1000"]).pid))
        time.sleep(1000)
    if deed == "slow":
        time.sleep(float(where))
    if deed == "garbage":
        print("Segmentation fault (not really)", flush=True)
    if deed == "flood":
        while True:
            print("x" * 1000, end="", flush=True)
    if deed == "stranger":
        say(id=job["id"] + 1, status="ok", value=1.0, detail="")
    say(id=job["id"], status="ok", value=float(where) if deed == "echo" else 1.0, detail="")
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(FAKE_WORKER)
    pools = []

    def start(workers=2, limit_s=1.0, **options):
        pools.append(WorkerPool(workers, limit_s, 1024, command=[sys.executable, "-S", str(script)], **options))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def real():
    pool = WorkerPool(2, 2.0, 2048)
    yield pool
    pool.close()


def job(deed, where=""):
    return Job("math", {"gold": deed, "answer": str(where)})


def children():
    """Pids whose parent is this process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.append(int(status.parent.name))
    return set(found)


def gone_within(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_outcomes_keep_the_order_of_the_jobs(fake):
    outcomes = fake(workers=3).run([job("echo", number) for number in range(50)])
    assert [outcome.value for outcome in outcomes] == list(range(50))


def test_a_long_run_beats_after_each_job_and_not_only_at_the_end(fake):
    beats = []
    pool = fake(workers=2, limit_s=20, beat=lambda: beats.append(time.monotonic()))
    outcomes = pool.run([job("slow", 0.5)] * 6)
    assert [outcome.status for outcome in outcomes] == ["ok"] * 6
    assert len(beats) == 6
    assert time.monotonic() - beats[0] > 0.8, "three rounds of 0.5 s: the first beat comes two before the end"


def test_hung_workers_are_killed_with_their_children_and_never_block_longer(fake, tmp_path):
    pool = fake(workers=2, limit_s=1.0)
    start = time.monotonic()
    outcomes = pool.run([job("hang with child", tmp_path / f"{number}") for number in range(4)] + [job("fine")])
    assert time.monotonic() - start < 1.0 * 3 + 15, "limit * ceil(5 / 2), and starts of 0.05 s on an idle machine"
    assert [outcome.status for outcome in outcomes] == ["timeout"] * 4 + ["ok"]
    assert all(outcome.value == 0.0 for outcome in outcomes[:4])
    for number in range(4):
        assert gone_within(int((tmp_path / f"{number}").read_text()), 10), "the grandchild survived"


def test_a_dead_worker_is_replaced_and_its_job_tried_once_more(fake, tmp_path):
    outcomes = fake().run([job("die once", tmp_path / "a"), job("die", tmp_path / "b"), job("fine")])
    assert [outcome.status for outcome in outcomes] == ["ok", "crash", "ok"]
    assert outcomes[1] == Outcome("crash", 0.0, "the worker died")


@pytest.mark.parametrize("deed", ["garbage", "flood", "stranger"])
def test_what_is_no_reply_is_no_score(fake, deed):
    outcomes = fake(workers=1).run([job(deed), job("fine")])
    assert [outcome.status for outcome in outcomes] == ["crash", "ok"]
    assert "no reply" in outcomes[0].detail


def test_a_job_larger_than_a_pipe_arrives_whole(fake):
    assert fake(limit_s=10).run([job("fine", "x" * (20 * MAX_REPLY_BYTES))])[0].status == "ok"


def test_what_no_worker_can_do_is_an_error_not_a_score(fake, tmp_path):
    with pytest.raises(RuntimeError, match=r"no such package.*strop\[train\]"):
        fake().run([job("missing")])
    dies_at_first = "import os, sys; flag = sys.argv[1]; os.path.exists(flag) or (open(flag, 'w'), os.kill(os.getpid(), 9));"
    command = [sys.executable, "-c", dies_at_first + f"exec({FAKE_WORKER!r})", str(tmp_path / "flag")]
    unlucky = WorkerPool(1, 1.0, 1024, command=command)
    assert unlucky.run([job("fine")])[0].status == "ok", "what kills a starting worker may be the machine"
    unlucky.close()
    broken = WorkerPool(1, 1.0, 1024, command=[sys.executable, "-c", "import sys; sys.exit('boom 42')"])
    with pytest.raises(RuntimeError, match="boom 42"):
        broken.run([job("fine")])
    broken.close()


def test_close_ends_every_worker_even_a_busy_one(fake):
    before = children()
    pool = fake(workers=2, limit_s=100)
    pool.run([job("fine")] * 2)
    failures = []

    def run():
        try:
            pool.run([job("hang with child", os.devnull)])
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.3)
    assert children() - before
    pool.close()
    thread.join(20)
    assert not thread.is_alive()
    assert failures, "a closed pool must say so, not score"
    assert children() == before


def test_expressions_without_end_time_out_and_the_others_are_scored(real):
    hostile = ["9^{9^{9^9}}", "1000000!", "(" * 500 + "1" + ")" * 500]
    jobs = [Job("math", {"gold": "7", "answer": text}) for text in hostile]
    jobs += [Job("math", {"gold": "x^2+2x+1", "answer": "(x+1)^2"}), Job("math", {"gold": "\\sqrt{2}", "answer": "1.5"})]
    start = time.monotonic()
    outcomes = real.run(jobs)
    assert time.monotonic() - start < 2.0 * 3 + 30, "and three imports of 0.7 s on an idle machine"
    assert [outcome.status for outcome in outcomes] == ["timeout"] * 3 + ["ok"] * 2
    assert [outcome.value for outcome in outcomes] == [0.0, 0.0, 0.0, 1.0, 0.0]


def test_a_worker_killed_between_jobs_is_not_missed(real):
    question = Job("math", {"gold": "\\frac{\\pi}{2}", "answer": "\\pi/2"})
    assert real.run([question])[0].value == 1.0
    for pid in children():
        if b"strop.engine.reward.workers" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    assert [outcome.value for outcome in real.run([question] * 3)] == [1.0] * 3


def test_a_stopped_worker_is_a_hung_worker(real):
    question = Job("math", {"gold": "\\frac{\\pi}{2}", "answer": "\\pi/2"})
    assert [outcome.value for outcome in real.run([question] * 20)] == [1.0] * 20
    for pid in children():
        if b"strop.engine.reward.workers" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGSTOP)
    statuses = [outcome.status for outcome in real.run([question] * 10)]
    assert 1 <= statuses.count("timeout") <= 2, "one for each stopped worker"
    assert statuses.count("ok") == 10 - statuses.count("timeout")


def spiral(answer, gold="1 2 3"):
    """A question to spiral_matrix, whose scorer calls eval on the answer."""
    item = base64.b64encode(pickle.dumps({"question": "?", "answer": gold, "metadata": {}})).decode()
    return Job("reasoning-gym", {"family": "spiral_matrix", "options": {}, "item": item, "answer": answer})


def test_an_answer_that_is_evaluated_can_not_hang_eat_memory_or_touch_the_machine(real, tmp_path):
    touched = tmp_path / "touched"
    outcomes = real.run([
        spiral(f"[open({str(touched)!r}, 'w').write('x')]"),
        spiral(f"[__import__('os').system('touch {touched}')]"),
        spiral(f"[__import__('subprocess').run(['touch', {str(touched)!r}])]"),
        spiral("[0] * 10**10"),
        spiral("[x for x in iter(int, 1)]"),
        spiral("print('{\"id\": 1}') or [1, 2, 3]"),
        spiral("1 2 3"),
    ])
    assert not touched.exists()
    assert [outcome.status for outcome in outcomes] == ["ok"] * 4 + ["timeout"] + ["ok"] * 2
    assert [outcome.value for outcome in outcomes] == [0.0] * 6 + [1.0], "0.1 for a Python list is no full credit"


def test_reasoning_gym_scores_are_all_or_nothing(real):
    def ask(family, answer, gold, **metadata):
        item = base64.b64encode(pickle.dumps({"question": "?", "answer": gold, "metadata": metadata})).decode()
        return Job("reasoning-gym", {"family": family, "options": {}, "item": item, "answer": answer})

    cases = [
        (ask("chain_sum", "7.00", "7"), "ok", 1.0),
        (ask("chain_sum", "3 + 4 = 7", "7"), "ok", 0.0),  # pays 1/9
        (ask("game_of_life_halting", "anything", "False"), "ok", 0.0),  # pays 1.0
        (ask("game_of_life_halting", "False", "False"), "ok", 1.0),
        (ask("propositional_logic", "no", None, premises=["A"], variables=["A"]), "ok", 0.0),  # pays junk 0.25
        (ask("prime_factorization", "it is 2 x 2", "2 × 2", number=4, factors=[2, 2]), "error", 0.0),  # raises
    ]
    outcomes = real.run([question for question, _, _ in cases])
    assert [(outcome.status, outcome.value) for outcome in outcomes] == [(status, value) for _, status, value in cases]


PARENT = """
import os, signal, sys, threading, time
from strop.engine.reward.pool import Job, WorkerPool
pool = WorkerPool(1, 1.0, 2048)
pool.run([Job("math", {"gold": "x", "answer": "x"})])
pid = next(iter(pool._alive))._process.pid
print(pid, flush=True)
if sys.argv[1] == "busy":
    threading.Thread(target=pool.run, args=([Job("math", {"gold": "7", "answer": "9^{9^{9^9}}"})],)).start()
    time.sleep(0.5)
if sys.argv[1] == "stopped":
    os.kill(pid, signal.SIGSTOP)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("state", ["idle", "busy", "stopped"])
def test_workers_leave_when_their_parent_is_killed(state):
    parent = subprocess.run([sys.executable, "-c", PARENT, state], capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    assert gone_within(int(parent.stdout), 20)


def test_a_worker_loads_neither_torch_nor_transformers():
    code = (
        "import sys, strop.engine.reward.workers; from strop.engine.reward import verifiers;"
        "[verifiers.load(name) for name in ('math', 'reasoning-gym')];"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
