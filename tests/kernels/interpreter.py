"""A process in which Triton interprets its kernels on the CPU: `python interpreter.py` serves calls over its standard pipes.

TRITON_INTERPRET is read when a kernel is decorated, so it needs a process of its own. A request is (function, arguments,
keywords, upstream gradients or None); the reply is (outputs, gradients) or the exception.
"""

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor


def call_with_gradients(
    function: Callable, arguments: Sequence[Any], keywords: dict[str, Any], upstream: Sequence[Tensor] | None
) -> tuple[Any, list[Tensor | None]]:
    """(outputs, gradient of each tensor argument that requires one) for `upstream`, one gradient a floating output.

    A function that returns None writes into its arguments: they are the outputs, those given by name last.
    """
    outputs = function(*arguments, **keywords)
    outputs = (*arguments, *keywords.values()) if outputs is None else outputs
    if upstream is None:
        return outputs, []
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    inputs = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    gradients = torch.autograd.grad([o for o in several if o.requires_grad], inputs, upstream, allow_unused=True)
    detached = tuple(o.detach() if isinstance(o, Tensor) else o for o in several)
    return (detached if isinstance(outputs, tuple) else detached[0]), list(gradients)


def send(pipe: BinaryIO, value: Any) -> None:
    """torch.save keeps strides, shared storage and every dtype; tensors pickled by themselves lose float8."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    pickle.dump(buffer.getvalue(), pipe)
    pipe.flush()


def receive(pipe: BinaryIO) -> Any:
    return torch.load(io.BytesIO(pickle.load(pipe)), weights_only=False)


class Interpreter:
    """The parent's side."""

    here = staticmethod(call_with_gradients)

    def __init__(self) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "STROP_KERNELS": "triton"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def __call__(self, function: Callable, *arguments: Any, upstream: Sequence[Tensor] | None = None, **keywords: Any):
        """What `call_with_gradients` returns over there; an exception is raised here again."""
        send(self.process.stdin, (function, arguments, keywords, upstream))
        reply = receive(self.process.stdout)
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def check(
        self, function: Callable, *arguments: Any, upstream: Sequence[Tensor] | None = None,
        rtol: float | None = None, atol: float | None = None, **keywords: Any,
    ) -> None:  # fmt: skip
        """Assert that Triton gives the reference's outputs and gradients."""
        expected, expected_gradients = call_with_gradients(function, arguments, keywords, upstream)
        outputs, gradients = self(function, *arguments, upstream=upstream, **keywords)
        torch.testing.assert_close(outputs, expected, rtol=rtol, atol=atol, equal_nan=True)
        torch.testing.assert_close(gradients, expected_gradients, rtol=rtol, atol=atol, equal_nan=True)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


def serve() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to stderr, not into the replies
    while True:
        try:
            function, arguments, keywords, upstream = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = call_with_gradients(function, arguments, keywords, upstream)
        except Exception as error:
            reply = error
        send(replies, reply)


if __name__ == "__main__":
    serve()
