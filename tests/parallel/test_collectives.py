"""Mesh and collectives over real gloo processes, and the errors of a broken start."""

import os
import time

import pytest
import torch

from strop.engine.config import InputError, Layout
from strop.engine.parallel import collectives
from strop.engine.parallel.mesh import AXIS_DIMS, Mesh, axis_ranks


def exchange(dtype: torch.dtype) -> dict[str, object]:
    mesh = Mesh.start(Layout(), "cpu", timeout_seconds=20)
    rank, size = mesh.rank, mesh.world_size
    ramp = torch.arange(size * 2 * 3, dtype=dtype).view(size * 2, 3)
    summed = ramp * (rank + 1)
    storage = summed.data_ptr()
    block = collectives.reduce_scatter_rows(summed, mesh.dp)
    rows = torch.full((size * 2, 3), float("nan"), dtype=dtype)
    rows[rank * 2 : rank * 2 + 2] = rank
    result = {
        "sum": collectives.all_reduce(torch.full((2,), rank + 1, dtype=dtype), mesh.world),
        "max": collectives.all_reduce(torch.full((2,), rank + 1, dtype=dtype), mesh.zero, "max"),
        "min": collectives.all_reduce(torch.full((2,), rank + 1, dtype=dtype), mesh.dp, "min"),
        "block": block.clone(),
        "block_in_place": block.data_ptr() == storage + rank * 2 * 3 * ramp.element_size(),
        "gathered": collectives.all_gather_rows(rows, mesh.dp),
        "broadcast": collectives.broadcast(torch.full((2,), rank, dtype=dtype), mesh.dp, source=size - 1),
        "objects": collectives.all_gather_objects({"rank": rank}, mesh.world),
        "tp": collectives.all_reduce(torch.full((2,), 7, dtype=dtype), mesh.tp),
        "gloo_size": mesh.new_gloo_group().size(),
        "layout_dp": mesh.layout.dp,
        "coordinates": (mesh.dp.rank, mesh.dp.size, mesh.tp.size, mesh.zero_mesh.size()),
    }
    collectives.barrier(mesh.world)
    mesh.close()
    return result


@pytest.mark.parametrize(("world_size", "dtype"), [(2, torch.float32), (3, torch.bfloat16)])
def test_collectives_give_the_same_right_numbers_on_every_rank(run_ranks, world_size, dtype):
    ramp = torch.arange(world_size * 2 * 3, dtype=dtype).view(world_size * 2, 3)
    total = sum(range(1, world_size + 1))
    for rank, result in enumerate(run_ranks(world_size, exchange, dtype)):
        assert result["sum"].tolist() == [total, total]
        assert result["max"].tolist() == [world_size, world_size]
        assert result["min"].tolist() == [1, 1]
        assert torch.equal(result["block"], ramp[rank * 2 : rank * 2 + 2] * total)
        assert result["block_in_place"]
        assert result["gathered"][:, 0].tolist() == [r for r in range(world_size) for _ in range(2)]
        assert result["broadcast"].tolist() == [world_size - 1, world_size - 1]
        assert result["objects"] == [{"rank": r} for r in range(world_size)]
        assert result["tp"].tolist() == [7, 7]
        assert result["gloo_size"] == world_size
        assert result["layout_dp"] == world_size
        assert result["coordinates"] == (rank, world_size, 1, world_size)


def test_one_process_needs_no_torchrun_and_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    mesh = Mesh.start(Layout(), "cpu")
    rows = torch.ones(4, 2)
    assert (mesh.rank, mesh.world_size, mesh.layout.dp, mesh.device.type) == (0, 1, 1, "cpu")
    assert collectives.reduce_scatter_rows(rows, mesh.dp) is rows
    assert collectives.all_gather_rows(rows, mesh.dp) is rows
    assert collectives.all_gather_objects("x", mesh.world) == ["x"]
    assert mesh.new_gloo_group() is None
    assert not torch.distributed.is_initialized()
    collectives.barrier(mesh.world)
    mesh.close()


def test_axes_partition_the_grid_with_tp_fastest():
    layout = Layout(tp=2, cp=2, pp=2, dp=2)
    assert axis_ranks(layout, "tp", 5) == [4, 5]
    assert axis_ranks(layout, "cp", 5) == [5, 7]
    assert axis_ranks(layout, "pp", 5) == [5, 13]
    assert axis_ranks(layout, "dp", 5) == [1, 5]
    assert axis_ranks(layout, "zero", 5) == [1, 3, 5, 7]
    for axis in AXIS_DIMS:
        groups = {tuple(axis_ranks(layout, axis, rank)) for rank in range(16)}
        assert sorted(rank for group in groups for rank in group) == list(range(16))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is 'not set'"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK 2 but WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is None"),
    ],
)
def test_a_wrong_environment_is_one_clear_error(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        Mesh.start(Layout(), "cpu")


def start_without_a_peer() -> str:
    os.environ.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    with pytest.raises(InputError) as caught:
        Mesh.start(Layout(), "cpu", timeout_seconds=1)
    return str(caught.value)


def test_ranks_that_never_meet_are_one_clear_error(run_ranks):
    message = run_ranks(1, start_without_a_peer)[0]
    assert message.startswith("rank 1 of 2 can't meet the others at 127.0.0.1:1 within 1 s")
    assert "\n" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"--device cuda: torch .* sees no CUDA device, use --device cpu"):
        Mesh.start(Layout(), "cuda")


def test_a_failing_rank_is_reported_with_its_traceback(run_ranks):
    def fail_on_rank_1() -> None:
        mesh = Mesh.start(Layout(), "cpu", timeout_seconds=20)
        if mesh.rank == 1:
            raise ZeroDivisionError("planted")
        collectives.barrier(mesh.world)

    with pytest.raises(RuntimeError, match=r"rank 1 failed:(.|\n)*ZeroDivisionError: planted"):
        run_ranks(2, fail_on_rank_1)


def test_a_dead_rank_and_a_hanging_rank_are_reported(run_ranks, capfd):
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 7"):
        run_ranks(1, os._exit, 7)
    with pytest.raises(TimeoutError, match=r"ranks \[0\] still ran after 0.5 s"):
        run_ranks(1, time.sleep, 30, time_limit=0.5)
    assert "in _rank_main" in capfd.readouterr().err
