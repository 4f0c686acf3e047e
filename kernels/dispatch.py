"""Which implementation of an op runs, and how ops are made known to torch.

An op has up to four implementations: `reference` (plain torch, kernels/reference), `triton` (kernels/triton), `cuda` and
`cpu` (csrc, when the library is built). The device of the tensors decides:

    CUDA tensors             cuda, else triton
    CPU tensors              cpu, else reference
    float64, other devices   reference (kernels compute in fp32)

STROP_KERNELS=reference|triton|native overrides that for every op (native: cuda or cpu, as the device says); where the
named implementation cannot run, the op raises instead of choosing another one. STROP_KERNELS=triton with TRITON_INTERPRET=1
runs Triton's interpreter on the CPU. Unset or "auto" overrides nothing.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native

Implementation = Literal["reference", "triton", "cuda", "cpu"]

LIBRARY = torch.library.Library("strop", "FRAGMENT")


def choose(op: str, tensor: Tensor, available: tuple[Implementation, ...]) -> Implementation:
    """The implementation of `op` for `tensor`, one of `available` (which `reference` belongs to always).

    Raises ValueError where STROP_KERNELS names one that `op` doesn't have or that cannot take this tensor, and RuntimeError
    where a CUDA tensor has only the reference although `op` has a kernel for it (triton is not installed).
    """
    return _choose(op, tensor.device, tensor.dtype, available)


def _choose(op: str, device: torch.device, dtype: torch.dtype, available: tuple[Implementation, ...]) -> Implementation:
    asked = native.choice()
    if asked != "auto":
        forced = asked if asked != "native" else "cuda" if device.type == "cuda" else "cpu"
        if reason := _cannot_run(forced, device.type, dtype, available):
            raise ValueError(f"{op}: STROP_KERNELS={asked}, but {reason}; STROP_KERNELS=reference runs everywhere, and unset "
                             "it lets each op take the best form it has")  # fmt: skip
        return forced
    preferred: tuple[Implementation, ...] = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    for implementation in preferred:
        if not _cannot_run(implementation, device.type, dtype, available):
            return implementation
    if device.type == "cuda" and dtype != torch.float64 and "triton" in available:
        raise RuntimeError(f"{op}: no kernel for {device}: {_cannot_run('triton', 'cuda', dtype, available)}; install it, or "
                           "choose the slower plain-torch form with STROP_KERNELS=reference")  # fmt: skip
    return "reference"


# torch.compile takes the answer of the moment it traces as a constant: a graph can neither read the environment nor load a
# library. (What torch.compiler.assume_constant_result does, without its import of torch._dynamo, 0.9 s.)
_choose._dynamo_marked_constant = True


def form(op: str, tensor: Tensor, available: tuple[Implementation, ...]) -> ModuleType:
    """The module kernels/<implementation>/<op>.py that `choose` names; the forms of an op share their function names."""
    return load(choose(op, tensor, available), op)


@functools.cache
def load(implementation: Implementation, op: str) -> ModuleType:
    """The module kernels/<implementation>/<op>.py."""
    return importlib.import_module(f".{implementation}.{op}", __package__)


def _cannot_run(implementation: str, device: str, dtype: torch.dtype, available: tuple[Implementation, ...]) -> str:
    """Why `implementation` can't take a tensor of this device type and dtype; "" when it can."""
    if implementation == "reference":
        return ""
    if implementation not in available:
        return f"it has only {', '.join(available)}"
    if dtype == torch.float64:
        return "the tensor is float64 and kernels compute in float32"
    if implementation == "triton":
        if not _triton_is_installed():
            return "the package triton is not installed"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "the tensor is on the CPU (TRITON_INTERPRET=1, set before triton is imported, interprets kernels there)"
        return "" if device in ("cpu", "cuda") else f"the tensor is on {device}"
    if device != implementation:
        return f"the tensor is on {device}"
    return "" if native.library(implementation) else native.why_missing(implementation)


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def define_op(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    why_no_gradient: str = "it is a backward already: a double backward isn't supported",
) -> Callable[..., Any]:
    """Make `run` the op strop::<schema> on every device; returns the callable.

    fake gives outputs of the right shape, dtype and device for torch.compile. save(ctx, inputs, output) and
    backward(ctx, *gradients) are those of `torch.library.register_autograd`; without them a backward raises RuntimeError
    with `why_no_gradient`. An op whose schema mutates an argument gets no gradient formula at all, but tells autograd that the
    tensor has changed, so that a backward which saved it raises instead of reading the new values. No defaults, no keywords
    and no lists of tensors in a schema that has a formula.

    Forward-mode derivatives (torch.autograd.forward_ad, torch.func.jvp) are a RuntimeError. torch.func.grad and vjp are one
    too, torch's own: they want autograd.Functions of another form. torch.vmap calls the op once for each element.

    `torch.library.custom_op` would do the same at 3 us (5 us when a gradient is wanted) more a call on a 2-core CPU.
    """
    name = schema.partition("(")[0]

    def refuse(ctx, *gradients):
        raise RuntimeError(f"strop::{name} has no gradient: {why_no_gradient}. The formula in plain torch, which can be "
                           "differentiated any number of times, is in strop.kernels.reference")  # fmt: skip

    LIBRARY.define(schema)
    op = getattr(torch.ops.strop, name).default
    LIBRARY.impl(name, _on_own_device(_counting_writes(run, op._schema)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"strop::{name}", fake, lib=LIBRARY)
    if not op._schema.is_mutable:
        LIBRARY.impl(name, _differentiable(op, save, backward or refuse), "Autograd", with_keyset=True)
    return op


def _on_own_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with the GPU of its first tensor as the current one, which is where Triton launches, wherever the tensors are."""

    @functools.wraps(run)
    def guarded(*arguments):
        listed = arguments[0] if isinstance(arguments[0], list) else arguments
        first = next((argument for argument in listed if isinstance(argument, Tensor)), None)
        if first is None or not first.is_cuda or first.device.index == torch.cuda.current_device():
            return run(*arguments)
        with torch.cuda.device(first.device):
            return run(*arguments)

    return guarded


def _counting_writes(run: Callable[..., Any], schema: torch._C.FunctionSchema) -> Callable[..., Any]:
    """`run`, after which autograd knows of the arguments that the schema says are written."""
    written = [place for place, argument in enumerate(schema.arguments) if argument.is_write]
    if not written:
        return run

    @functools.wraps(run)
    def counting(*arguments):
        results = run(*arguments)
        for place in written:
            tensors = arguments[place] if isinstance(arguments[place], list) else [arguments[place]]
            for tensor in tensors:
                if tensor is not None and not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
        return results

    return counting


def _differentiable(
    op: Callable[..., Any], save: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What `torch.library.register_autograd` would register, without its filling in of default arguments, which reads the
    schema once for each argument: 50 us a call of policy_loss."""

    def run_below(keyset: torch._C.DispatchKeySet, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx, *args):
        *args, keyset = args
        output = run_below(keyset, *args)
        if save is not None:
            save(ctx, args, output)
        return output

    def run_backward(ctx, *gradients):
        with_keyset = ctx.needs_input_grad
        ctx.needs_input_grad = with_keyset[:-1]
        try:
            results = backward(ctx, *gradients)
        finally:
            ctx.needs_input_grad = with_keyset  # a retained graph comes here again
        return *(results if isinstance(results, tuple) else (results,)), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(run_backward)}
    node = type(f"strop_{op._opname}", (torch.autograd.Function,), methods)

    def run(keyset: torch._C.DispatchKeySet, *args):
        if forward_ad._current_level >= 0:  # inside torch.func.jvp as well
            refuse_tangents(op._opname, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return node.apply(*args, keyset)
        return run_below(keyset, *args)

    return run


def refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    """RuntimeError for an argument of forward-mode differentiation: the op would drop its tangent, which reads as zero."""
    if any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in arguments):
        raise RuntimeError(f"strop::{name} has no forward-mode derivative (forward_ad, torch.func.jvp): use backward, or the "
                           "formula in plain torch of strop.kernels.reference")  # fmt: skip


def refuse_double_backward(
    name: str, instead: str = "set STROP_KERNELS=reference for the plain-torch form, which has all derivatives"
) -> None:
    """RuntimeError inside a backward under create_graph=True.

    For a backward that returns what the forward stored, or that writes into an argument: those numbers carry no graph, so
    differentiating them again would give zeros instead of an error.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name}: a double backward isn't supported: call backward without create_graph=True, or {instead}")
