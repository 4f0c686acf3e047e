"""DistributedAdamW against torch.optim.AdamW, and its state through a distributed checkpoint."""

import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

from strop.engine.config import InputError, Layout
from strop.engine.parallel.mesh import Mesh
from strop.engine.train.optimizer import AdamConfig, DistributedAdamW, square_sum

ADAM = AdamConfig(beta1=0.8, beta2=0.95, weight_decay=0.1)
CLIP = 0.5
STEPS = 5


class Net(nn.Module):
    """Rows that don't divide by 2 or 3, a matrix of one row, vectors, and one matrix used twice (tied)."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"wide": (7, 8), "norm": (7,), "tied": (7, 7), "one_row": (1, 7), "bias": (1,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.also_tied = self.tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x @ self.wide.T) * self.norm
        x = torch.tanh(x @ self.tied.T) @ self.also_tied.T
        return (x @ self.one_row.T + self.bias).float().square().sum()


def data(step: int, share: int) -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(100 * step + share))


def start(dtype: torch.dtype = torch.float32, bucket_bytes: int | None = None) -> tuple[Mesh, Net, DistributedAdamW]:
    mesh = Mesh.start(Layout(), "cpu", timeout_seconds=30)
    net = Net(dtype)
    return mesh, net, DistributedAdamW(net.named_parameters(), mesh, ADAM, CLIP, bucket_bytes)


def train(mesh: Mesh, net: Net, optimizer: DistributedAdamW, steps: range, shares: int = 6) -> list[float]:
    """Each rank backpropagates its part of the step's `shares` batches, one after the other."""
    norms = []
    for step in steps:
        for share in range(mesh.rank, shares, mesh.world_size):
            net(data(step, share).to(net.wide.dtype)).backward()
        norms.append(optimizer.reduce_gradients())
        optimizer.step(lr=0.01 * step)
    return norms


def values(net: Net) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def torch_adamw(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The oracle, on one process: fp32 masters stepped by torch.optim.AdamW, parameters rounded from them."""
    net = Net(dtype)
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    masters = {name: getattr(net, name).detach().float().requires_grad_() for name in names}
    groups = [
        {"params": [masters[name] for name in names if masters[name].ndim > 1], "weight_decay": ADAM.weight_decay},
        {"params": [masters[name] for name in names if masters[name].ndim == 1], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, foreach=False)
    norms = []
    for step in range(1, STEPS + 1):
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for share in range(6):
            net(data(step, share).to(dtype)).backward()
            for name in names:
                masters[name].grad += getattr(net, name).grad.float()
                getattr(net, name).grad = None
        norms.append(float(nn.utils.clip_grad_norm_(masters.values(), CLIP)))
        for group in oracle.param_groups:
            group["lr"] = 0.01 * step
        oracle.step()
        with torch.no_grad():
            for name in names:
                getattr(net, name).copy_(masters[name])
    return values(net), norms


def run_steps(dtype: torch.dtype, bucket_bytes: int) -> tuple[dict[str, torch.Tensor], list[float], bool]:
    mesh, net, optimizer = start(dtype, bucket_bytes)
    pointers = [parameter.data_ptr() for parameter in net.parameters()]
    rollout_view = net.wide.detach()
    norms = train(mesh, net, optimizer, range(1, STEPS + 1))
    in_place = pointers == [p.data_ptr() for p in net.parameters()] and torch.equal(rollout_view, net.wide.detach())
    assert all(parameter.grad is None for parameter in net.parameters())
    mesh.close()
    return values(net), norms, in_place


@pytest.mark.parametrize("bucket_bytes", [0, 2**20], ids=["alone", "together"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_torch_adamw_with_clipping(run_ranks, world_size, dtype, bucket_bytes):
    expected, expected_norms = torch_adamw(dtype)
    assert min(expected_norms) > 2 * CLIP, "the data must make every step clip"
    # A bf16 parameter may fall to the other neighbour where its fp32 master lies between two; that moves the next gradients.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-9}
    for parameters, norms, in_place in run_ranks(world_size, run_steps, dtype, bucket_bytes):
        assert in_place, "a parameter moved: rollouts that alias it would read stale weights"
        assert norms == pytest.approx(expected_norms, rel=1e-6 if dtype == torch.float32 else 2e-2)
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(parameters["frozen"], torch.ones(2, 2))


def test_an_fp32_parameter_is_its_own_master_and_bf16_has_one():
    net = Net()
    optimizer = DistributedAdamW(net.named_parameters(), Mesh.single(), ADAM)
    assert optimizer.state_dict()["master"] == {}
    assert {slot.own.data_ptr() for slot in optimizer._slots} == {p.data_ptr() for p in net.parameters() if p.requires_grad}
    assert all(slot.master is slot.own for slot in optimizer._slots)
    optimizer = DistributedAdamW(Net(torch.bfloat16).named_parameters(), Mesh.single(), ADAM)
    masters = optimizer.state_dict()["master"]
    assert set(masters) == {"wide", "norm", "tied", "one_row", "bias"}
    assert all(master.dtype == torch.float32 for master in masters.values())


def save_after_3_steps(folder: str, dtype: torch.dtype) -> list[tuple[int, ...]]:
    mesh, net, optimizer = start(dtype)
    train(mesh, net, optimizer, range(1, 4))
    state = optimizer.state_dict()
    shards = [tuple(moment.to_local().shape) for moment in state["exp_avg"].values() if isinstance(moment, DTensor)]
    dcp.save({"optimizer": state, "parameters": {n: p.detach() for n, p in net.named_parameters()}}, checkpoint_id=folder)
    mesh.close()
    return shards


def load_and_do_2_steps(folder: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """-> (first moments as loaded, parameters two steps later)."""
    mesh, net, optimizer = start(dtype)
    state = {"optimizer": optimizer.state_dict(), "parameters": {n: p.detach() for n, p in net.named_parameters()}}
    dcp.load(state, checkpoint_id=folder)
    loaded = {name: full(moment).clone() for name, moment in optimizer.state_dict()["exp_avg"].items()}
    train(mesh, net, optimizer, range(4, 6))
    mesh.close()
    return loaded, values(net)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_checkpoint_of_2_ranks_loads_bit_equal_on_1_2_and_3(run_ranks, tmp_path, dtype):
    expected = run_ranks(2, run_steps, dtype, 2**20)[0][0]
    shards = run_ranks(2, save_after_3_steps, str(tmp_path), dtype)
    assert shards[0] == [(4, 8), (4,), (4, 7), (1, 7), (1,)]
    assert shards[1] == [(3, 8), (3,), (3, 7), (0, 7), (0,)]
    resumed = {size: run_ranks(size, load_and_do_2_steps, str(tmp_path), dtype) for size in (1, 2, 3)}
    for name, value in expected.items():
        assert torch.equal(resumed[2][0][1][name], value), f"{name} differs from the uninterrupted run"
        assert torch.equal(resumed[2][1][1][name], value)
    for ranks in resumed.values():
        for name, value in expected.items() if dtype == torch.float32 else ():
            torch.testing.assert_close(ranks[0][1][name], value, rtol=1e-6, atol=1e-6)
        for name, moment in resumed[1][0][0].items():
            assert all(torch.equal(loaded[name], moment) for loaded, _ in ranks), f"moment of {name} changed on the way"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_can_be_dropped(bad):
    net = Net()
    before = values(net)
    optimizer = DistributedAdamW(net.named_parameters(), Mesh.single(), ADAM, CLIP)
    (net(data(1, 0)) * bad).backward()
    assert not math.isfinite(optimizer.reduce_gradients())
    optimizer.zero_grad()
    assert optimizer.reduce_gradients() == 0.0
    assert all(torch.equal(value, before[name]) for name, value in values(net).items())


def test_square_sum_keeps_its_precision_over_millions_of_elements():
    tensor = torch.randn(2**22 + 12_345, generator=torch.Generator().manual_seed(1))
    exact = float(tensor.double().square().sum())
    assert float(square_sum(tensor)) == pytest.approx(exact, rel=1e-7)
    assert float(square_sum(torch.empty(0, 3))) == 0.0


@pytest.mark.parametrize("wrong", [{"beta1": 1.0}, {"beta2": -0.1}, {"eps": 0.0}, {"weight_decay": -1.0}])
def test_wrong_settings_are_refused_by_name(wrong):
    name = next(iter(wrong)).replace("_", "[-_]")
    with pytest.raises(InputError, match=f"--train.adam.{name}"):
        AdamConfig(**wrong)
