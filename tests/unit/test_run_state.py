"""Whole-run checkpoints: bit-exact, beside the training, entire or absent wherever a process dies, clear on a full disk."""

import itertools
import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # DTensor imports it at first use: here once, not in every fork
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from strop.engine.config import InputError
from strop.engine.run.failure import LOST_PEER
from strop.engine.run.folder import saved_steps
from strop.engine.run.state import Checkpoints


def tensors_of(step: int) -> dict:
    """Every dtype and shape that a run saves, with values that name the step; NaN payloads and -0.0 must survive."""
    generator = torch.Generator().manual_seed(step)
    bits = torch.randint(-(2**31), 2**31 - 1, (257,), generator=generator, dtype=torch.int32)
    return {
        "model": {"weight": torch.randn(33, 7, generator=generator), "bf16": torch.randn(5, generator=generator).bfloat16()},
        "optimizer": {"moment": bits.view(torch.float32), "step": torch.tensor(step), "empty": torch.zeros(0, 3)},
        "rng": torch.arange(step, step + 16, dtype=torch.uint8),
    }


def leaves(tensors: dict) -> list[torch.Tensor]:
    return [leaf for value in tensors.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def same_bits(left: dict, right: dict) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))
        for a, b in zip(leaves(left), leaves(right), strict=True)
    )


def blank() -> dict:
    return tensors_of(10**6)


def test_round_trip_prune_and_numbers(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2, settings_digest="d")
    assert checkpoints.latest() is None
    for step in (3, 10, 9000):
        checkpoints.save(step, tensors_of(step), {"cursor": step * 7, "lr": 0.1 + step})
        numbers = checkpoints.finish()
    assert saved_steps(tmp_path / "c") == [10, 9000]
    assert numbers["time/save_background"] >= numbers["time/save_copy"] > 0
    assert numbers["mem/checkpoint_gib"] > sum(t.nbytes for t in leaves(tensors_of(1))) / 2**30
    assert checkpoints.poll() == checkpoints.finish() == {}

    later = Checkpoints(tmp_path / "c", keep=2, settings_digest="d")
    target = blank()
    storage = [leaf.data_ptr() for leaf in leaves(target)]
    assert later.load(later.latest(), target) == {"cursor": 63000, "lr": 9000.1}
    assert same_bits(target, tensors_of(9000))
    assert storage == [leaf.data_ptr() for leaf in leaves(target)], "loading must not replace the tensors of the model"
    before = (tmp_path / "c/step-9000/state.json").stat().st_mtime_ns
    later.save(9000, blank(), {})
    later.finish()
    assert (tmp_path / "c/step-9000/state.json").stat().st_mtime_ns == before, "a step already saved is left alone"


def test_training_goes_on_during_a_save(tmp_path, monkeypatch):
    writing, may_write = threading.Event(), threading.Event()
    real_fsync = os.fsync

    def slow_fsync(descriptor):
        writing.set()
        assert may_write.wait(20)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    checkpoints = Checkpoints(tmp_path, keep=5)
    live = tensors_of(1)
    checkpoints.save(1, live, {})
    assert writing.wait(20)
    for leaf in leaves(live):
        leaf.zero_()  # what the optimizer does meanwhile
    assert checkpoints.poll() == {} and checkpoints.latest() is None
    threading.Timer(0.3, may_write.set).start()
    start = time.perf_counter()
    checkpoints.save(2, tensors_of(2), {})  # waits for the first
    assert time.perf_counter() - start > 0.25
    checkpoints.finish()
    for step in (1, 2):
        target = blank()
        checkpoints.load(step, target)
        assert same_bits(target, tensors_of(step))


def run_until_killed(path: Path, kill_at: int, rank: int = 0, group=None) -> int:
    """Save steps 1, 2, 3 and die by SIGKILL before the `kill_at`-th call that changes the disk. Returns how many there were."""
    calls = itertools.count(1)

    def counted(real):
        def call(*args, **kwargs):
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("rename", "fsync", "mkdir", "rmdir", "unlink", "open"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoints = Checkpoints(path, keep=1, rank=rank, group=group)
    for step in (1, 2, 3):
        checkpoints.save(step, tensors_of(step), {"cursor": step})
        checkpoints.finish()
    return next(calls) - 1


def forked(fn, *args) -> int:
    """Exit status of fn(*args) in a fork."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        try:
            fn(*args)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_what_is_left(path: Path, expected: range) -> int:
    """Whatever remained loads bit for bit, and the next start removes the rest. Returns the newest step (0: none)."""
    again = Checkpoints(path, keep=1)
    assert not [entry.name for entry in path.iterdir() if "partial" in entry.name]
    newest = again.latest() or 0
    assert newest in expected
    for step in saved_steps(path):
        target = blank()
        assert again.load(step, target) == {"cursor": step}
        assert same_bits(target, tensors_of(step))
    return newest


def test_kill_at_every_change_of_the_disk(tmp_path):
    """There is no moment at which SIGKILL leaves a half-written checkpoint, or none where there was one."""
    assert forked(lambda: (tmp_path / "calls").write_text(str(run_until_killed(tmp_path / "whole", 0)))) == 0
    total = int((tmp_path / "calls").read_text())
    assert total > 30, "the three saves with their renames, syncs and removals"
    newest = []
    for kill_at in range(1, total + 1):
        path = tmp_path / str(kill_at)
        assert forked(run_until_killed, path, kill_at) == -signal.SIGKILL
        newest.append(check_what_is_left(path, range(4)))
        shutil.rmtree(path)
    assert newest == sorted(newest), "a later death never leaves an older checkpoint"
    assert set(newest) == {0, 1, 2, 3}


def dtensors_of(step: int, mesh) -> dict:
    """Row shards, uneven (5 rows) and with an empty part (1 row), a scalar, a replicated and a plain tensor."""
    values = {rows: torch.arange(rows * 3, dtype=torch.float32).view(rows, 3) + 100 * step for rows in (8, 5, 1)}
    shards = {f"rows{rows}": distribute_tensor(value, mesh, [Shard(0)]) for rows, value in values.items()}
    scalar = DTensor.from_local(torch.tensor(step * 0.5), mesh, [Replicate()])
    return {"optimizer": shards, "scalar": scalar, "copied": distribute_tensor(values[5], mesh, [Replicate()]),
            "plain": torch.tensor([step, -0.0])}  # fmt: skip


def full(tensors: dict) -> list[torch.Tensor]:
    return [leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for leaf in leaves(tensors)]


def start_two_ranks():
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (size,))
    return rank, mesh, dist.new_group(backend="gloo")


def save_sharded(path: Path) -> tuple[dict[str, float], float]:
    rank, mesh, group = start_two_ranks()
    checkpoints = Checkpoints(path, keep=2, rank=rank, group=group)
    real_fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.05), real_fsync(descriptor))
    work = torch.ones(1)
    for step in (1, 2):
        live = dtensors_of(step, mesh)
        checkpoints.save(step, live, {"rank": rank, "step": step})
        for leaf in leaves(live):
            leaf.zero_()
        for _ in range(100):  # training talks on its own group while the save talks on its
            dist.all_reduce(work, dist.ReduceOp.MAX)
        numbers = checkpoints.finish()
    return numbers, work.item()


def load_sharded(path: Path) -> tuple[dict, bool]:
    rank, mesh, group = start_two_ranks()
    checkpoints = Checkpoints(path, keep=2, rank=rank, group=group)
    target = dtensors_of(77, mesh)
    state = checkpoints.load(checkpoints.latest(), target)
    return state, all(torch.equal(a, b) for a, b in zip(full(target), full(dtensors_of(2, mesh)), strict=True))


def test_two_ranks_save_and_other_numbers_of_ranks_load(tmp_path, run_ranks):
    (numbers, work), (none, _) = run_ranks(2, save_sharded, tmp_path)
    assert numbers["time/save_background"] > numbers["time/save_copy"] and none == {} and work == 1.0
    assert saved_steps(tmp_path) == [1, 2]
    for world_size in (1, 2, 3):
        assert run_ranks(world_size, load_sharded, tmp_path) == [({"rank": 0, "step": 2}, True)] * world_size


def run_two_until_killed(path: Path, kill_at: dict[int, int]) -> int:
    rank, _, group = start_two_ranks()
    return run_until_killed(path, kill_at.get(rank, 0), rank, group)


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_one_of_two_ranks(tmp_path, run_ranks, victim):
    totals = run_ranks(2, run_two_until_killed, tmp_path / "whole", {})
    moments = range(1, totals[victim] + 1, max(1, totals[victim] // 7))
    for kill_at in moments:
        path = tmp_path / str(kill_at)
        with pytest.raises(RuntimeError, match=f"rank {victim} died with exit code -9|{LOST_PEER.pattern}"):
            run_ranks(2, run_two_until_killed, path, {victim: kill_at})
        check_what_is_left(path, range(4))


def save_with_little_space(path: Path, limits: dict[int, int], rank: int = 0, group=None) -> str:
    checkpoints = Checkpoints(path, keep=2, rank=rank, group=group)
    tensors = {"big": torch.ones(50_000) * rank, "small": torch.zeros(3)}
    if group is not None:
        mesh = init_device_mesh("cpu", (group.size(),))
        tensors["big"] = DTensor.from_local(tensors["big"], mesh, [Shard(0)])
    checkpoints.save(1, tensors, {})
    checkpoints.finish()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.get(rank, hard), hard))
    checkpoints.save(2, tensors, {})
    deadline = time.monotonic() + 20
    try:
        while time.monotonic() < deadline:
            checkpoints.poll()
            time.sleep(0.01)
    except InputError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return str(error)
    return "no error"


def save_with_little_space_on(path: Path, limits: dict[int, int]) -> str:
    rank, _, group = start_two_ranks()
    return save_with_little_space(path, limits, rank, group)


@pytest.mark.parametrize("limit", [0, 700, 100_000, 200_500])
def test_no_space_is_one_clear_error(tmp_path, limit):
    """The limit hits the data file's start, torch's zip header, its middle, or only what comes after the tensors."""
    assert forked(lambda: (tmp_path / "told").write_text(save_with_little_space(tmp_path / "c", {0: limit}))) == 0
    told = (tmp_path / "told").read_text()
    assert "step-2: File too large" in told and "200,012 bytes" in told and "step-1 unharmed" in told and "--run.resume" in told
    assert [entry.name for entry in (tmp_path / "c").iterdir()] == ["step-1"], "the half-written one gives its space back"


def test_no_space_on_one_rank_reaches_both(tmp_path, run_ranks):
    told = run_ranks(2, save_with_little_space_on, tmp_path, {1: 100_000})
    assert told[0] == told[1] and "File too large" in told[0] and "step-1 unharmed" in told[0]
    assert saved_steps(tmp_path) == [1]


def damaged(path: Path, name: str, data: bytes) -> Path:
    (path / "step-2" / name).write_bytes(data)
    return path


UNREADABLE = r"step-2 can't be read \(.*\): remove it to go on from step-1"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path, t: t["model"].update(weight=torch.zeros(33, 8)), r"weight is torch.float32 \[33, 7\].*\[33, 8\] in this"),
        (lambda path, t: t["model"].update(bf16=torch.zeros(5)), r"model.bf16 is torch.bfloat16 \[5\].*torch.float32"),
        (lambda path, t: t["model"].update(more=torch.zeros(5)), r"lacks 'model.more', 1 such"),
        (lambda path, t: t["model"].pop("bf16"), r"has an unknown 'model.bf16', 1 such"),
        (lambda path, t: damaged(path, "state.json", b"{"), UNREADABLE),
        (lambda path, t: damaged(path, ".metadata", b"x"), UNREADABLE),
        (lambda path, t: damaged(path, "__0_0.distcp", b"PK" * 999), UNREADABLE),
        (lambda path, t: (path / "step-2/__0_0.distcp").unlink(), UNREADABLE),
    ],
)
def test_load_refuses(tmp_path, change, message):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, tensors_of(step), {})
    checkpoints.finish()
    target = blank()
    change(tmp_path, target)
    with pytest.raises(InputError, match=message):
        Checkpoints(tmp_path, keep=2).load(2, target)


def test_load_refuses_another_runs_checkpoint(tmp_path):
    mine = Checkpoints(tmp_path, keep=2, settings_digest="mine")
    mine.save(1, tensors_of(1), {})
    mine.finish()
    with pytest.raises(InputError, match="another run's"):
        Checkpoints(tmp_path, keep=2, settings_digest="other").load(1, blank())


def test_folder_that_vanished(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").write_text("a file is in the way")
    checkpoints.save(1, tensors_of(1), {})
    with pytest.raises((InputError, RuntimeError), match="step-1"):
        checkpoints.finish()


def test_state_is_json_of_rank_0(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(ValueError, match="JSON compliant"):
        checkpoints.save(1, {"x": torch.zeros(1)}, {"loss": float("nan")})
    checkpoints.save(1, {"x": torch.zeros(1)}, {"values": [0.1, 1e-300, None, "é"]})
    checkpoints.finish()
    stored = json.loads((tmp_path / "step-1/state.json").read_text())
    assert stored["state"] == {"values": [0.1, 1e-300, None, "é"]} and stored["ranks"] == 1
