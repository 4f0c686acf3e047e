"""AdamW whose states are divided over the data-parallel ranks (ZeRO stage 1, arXiv 1910.02054), by rows of each parameter.

Rank r of W owns block r of ceil(rows / W) rows of every parameter, as DTensor's Shard(0) cuts it: a rectangle of one
canonical tensor, so a checkpoint can be read back by any number of ranks. Life of a gradient:

    autograd -> fp32 `parameter.main_grad` -> summed over ranks, own rows only -> global norm, clip -> AdamW on the fp32
    master of the own rows -> the parameter's own rows -> gathered into the parameter on every rank

Parameters stay where they are in memory for ever: a rollout engine may alias them. An fp32 parameter is its own master.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

from ..config import InputError
from ..parallel.collectives import all_reduce
from ..parallel.mesh import Mesh
from ..parallel.rows import gather_rows, own_rows, sum_own_rows

BUCKET_BYTES = {"cpu": 2**20, "cuda": 2**26}
"""Parameters with smaller fp32 gradients than this travel together; a larger one travels alone, without a copy. On a CPU
messages of 1 MiB are as fast as larger ones and copies are what costs; NCCL wants tens of MiB for its full bandwidth."""

NORM_BLOCK = 2**14


@dataclass(frozen=True)
class AdamConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Fraction of a matrix that decays in a step, times the learning rate; norms and biases don't decay."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--train.adam.{name} {getattr(self, name)}: must lie in [0, 1)")
        if self.eps <= 0:
            raise InputError(f"--train.adam.eps {self.eps}: must be above 0")
        if self.weight_decay < 0:
            raise InputError(f"--train.adam.weight-decay {self.weight_decay}: must be at least 0")


@dataclass(frozen=True, eq=False)
class _Slot:
    """One parameter and the optimizer's tensors for the rows of it that this rank owns."""

    name: str
    parameter: nn.Parameter
    main_grad: Tensor
    """fp32, shape of the parameter; after `reduce_gradients` only the own rows mean anything."""
    grad: Tensor
    """The own rows of main_grad."""
    own: Tensor
    """The own rows of the parameter, in its storage."""
    master: Tensor
    """The same in fp32; `own` itself for an fp32 parameter."""
    exp_avg: Tensor
    exp_avg_sq: Tensor


class DistributedAdamW:
    """AdamW over (canonical name, parameter) pairs; a tied parameter comes once, frozen ones are left out.

    From construction on, backward passes add into each parameter's `main_grad` and leave its `grad` None. An optimizer
    step is `norm = reduce_gradients()`, a look at the norm, and `step(lr)`; or `zero_grad()`, to drop the gradients.
    All ranks of mesh.zero must hold equal parameters, and call `reduce_gradients` and `step` together.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        mesh: Mesh,
        config: AdamConfig,
        clip_grad_norm: float | None = None,
        bucket_bytes: int | None = None,
    ) -> None:
        """clip_grad_norm: largest global norm of the gradients, None for no clipping. bucket_bytes: None is BUCKET_BYTES."""
        trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        assert trained, "there is no parameter to train"
        self._axis, self._zero_mesh = mesh.zero, mesh.zero_mesh
        self._config, self._clip = config, clip_grad_norm
        self._coefficient = 1.0
        device = trained[0][1].device
        self._main_grads = torch.zeros(sum(parameter.numel() for _, parameter in trained), device=device)
        pieces = self._main_grads.split([parameter.numel() for _, parameter in trained])
        self._slots = [self._make_slot(*pair, piece) for pair, piece in zip(trained, pieces, strict=True)]
        self._buckets = _make_buckets(self._slots, BUCKET_BYTES[device.type] if bucket_bytes is None else bucket_bytes)
        self._steps = torch.zeros((), dtype=torch.int64)

    def _make_slot(self, name: str, parameter: nn.Parameter, main_grad: Tensor) -> _Slot:
        assert parameter.ndim and parameter.is_contiguous(), f"{name}: only contiguous parameters have rows to divide"
        rows = own_rows(len(parameter), self._axis)
        own = parameter.detach()[rows]
        master = own if own.dtype == torch.float32 else own.float()
        main_grad = main_grad.view(parameter.shape)
        parameter.main_grad = main_grad
        parameter.register_post_accumulate_grad_hook(_move_into_main_grad)
        moments = torch.zeros_like(master), torch.zeros_like(master)
        return _Slot(name, parameter, main_grad, main_grad[rows], own, master, *moments)

    def zero_grad(self) -> None:
        self._main_grads.zero_()

    def main_grads(self) -> dict[str, Tensor]:
        """Name -> fp32 gradient, of the parameter's shape, by reference."""
        return {slot.name: slot.main_grad for slot in self._slots}

    @torch.no_grad()
    def reduce_gradients(self) -> float:
        """Sum the gradients over the ranks; returns their global norm before clipping, the same on every rank.

        It is NaN or inf where any rank's gradient is. Parameters are unchanged.
        """
        for bucket in self._buckets:
            sum_own_rows([slot.main_grad for slot in bucket], self._axis)
        squares = torch.stack([square_sum(slot.grad) for slot in self._slots]).sum()
        norm = math.sqrt(all_reduce(squares, self._axis))
        clips = self._clip is not None and norm > self._clip
        self._coefficient = self._clip / (norm + 1e-6) if clips else 1.0  # as torch.nn.utils.clip_grad_norm_
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameters on every rank from the reduced gradients, then set `main_grad` to zero."""
        if self._coefficient != 1.0:
            for slot in self._slots:
                slot.grad.mul_(self._coefficient)
        owned = [slot for slot in self._slots if slot.own.numel()]
        self._update([slot for slot in owned if slot.parameter.ndim > 1], lr, self._config.weight_decay)
        self._update([slot for slot in owned if slot.parameter.ndim == 1], lr, weight_decay=0.0)
        self._steps += 1
        for slot in self._slots:
            if slot.master is not slot.own:
                slot.own.copy_(slot.master)
        for bucket in self._buckets:
            gather_rows([slot.parameter.detach() for slot in bucket], self._axis)
        self.zero_grad()

    def _update(self, slots: list[_Slot], lr: float, weight_decay: float) -> None:
        """One AdamW step, by torch's fused kernel, on the own rows of those slots."""
        steps_done = torch.full((len(slots),), float(self._steps), device=self._main_grads.device)
        adamw(
            [slot.master for slot in slots],
            [slot.grad for slot in slots],
            [slot.exp_avg for slot in slots],
            [slot.exp_avg_sq for slot in slots],
            max_exp_avg_sqs=[],
            state_steps=list(steps_done.unbind()),  # counted up there, each tensor by itself
            fused=True,
            amsgrad=False,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self._config.eps,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """{"steps": int64 [], "exp_avg": {name: tensor}, "exp_avg_sq": {...}, "master": {...}}, by reference: whoever
        overwrites them in place has restored the optimizer.

        Tensors have the parameter's global shape: DTensor with Shard(0) on several ranks, plain on one. "master" holds
        the parameters that aren't fp32; an fp32 parameter is its own master, and the caller saves parameters.
        """
        separate = [slot for slot in self._slots if slot.master is not slot.own]
        return {
            "steps": self._steps,
            "exp_avg": {slot.name: self._global(slot, slot.exp_avg) for slot in self._slots},
            "exp_avg_sq": {slot.name: self._global(slot, slot.exp_avg_sq) for slot in self._slots},
            "master": {slot.name: self._global(slot, slot.master) for slot in separate},
        }

    def _global(self, slot: _Slot, own: Tensor) -> Tensor:
        """The own rows of a parameter-shaped tensor as the whole tensor."""
        if self._zero_mesh is None:
            return own
        shape, stride = slot.parameter.shape, slot.parameter.stride()
        return DTensor.from_local(own, self._zero_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _move_into_main_grad(parameter: nn.Parameter) -> None:
    """Runs in backward as soon as a parameter's gradient is complete."""
    parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


def _make_buckets(slots: list[_Slot], bucket_bytes: int) -> list[list[_Slot]]:
    """Slots whose rows travel in one message: a large parameter alone, runs of small ones of one dtype together."""
    buckets: list[list[_Slot]] = []
    open_buckets: dict[torch.dtype, list[_Slot]] = {}
    for slot in slots:
        dtype, size = slot.parameter.dtype, slot.main_grad.nbytes
        bucket = open_buckets.get(dtype, [])
        if size >= bucket_bytes or not bucket or sum(member.main_grad.nbytes for member in bucket) + size > bucket_bytes:
            bucket = []
            buckets.append(bucket)
        bucket.append(slot)
        if size < bucket_bytes:
            open_buckets[dtype] = bucket
    return buckets


def square_sum(tensor: Tensor) -> Tensor:
    """Sum of the squares of an fp32 tensor, as a 0-dim fp64 tensor.

    By blocks, added in fp64: torch's fp32 norm of 28 million elements is off by 1.5e-3 on a CPU, which would make the
    norm depend on how a tensor is divided.
    """
    flat = tensor.reshape(-1)
    whole = len(flat) // NORM_BLOCK * NORM_BLOCK
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return norms.double().square().sum() + rest.double().square()
