"""Sizes at which something breaks: more than 2^31 logits in a tensor, and the memory that a fused LM head exists to save."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strop.kernels import LossSpec, linear_logprob, linear_policy_loss, logprob, moe_permute, rms_norm
from strop.kernels.moe_permute import expert_order

pytestmark = pytest.mark.gpu

MIB = 2**20


def needs_gib(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


def extra_memory(run: Callable[[], tuple[Tensor, ...]]) -> float:
    """MiB at the peak of a call, beyond what was there before and what it returns. The second call: libraries have their
    workspaces."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    return (torch.cuda.max_memory_allocated() - before - sum(x.untyped_storage().nbytes() for x in results)) / MIB


def test_logprob_beyond_two_to_the_31_elements():
    """The last rows lie behind element 2^31; each is compared with the same row alone."""
    rows, vocab = 16_640, 131_072  # 1.016 * 2^31
    needs_gib(16)
    generator = torch.Generator(device="cuda").manual_seed(0)
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16, generator=generator)
    targets = torch.randint(vocab, (rows,), device="cuda", generator=generator)
    last = logits[-4:].clone().requires_grad_()
    expected = logprob(last, targets[-4:])
    upstream = torch.ones(3, 4, device="cuda").unbind()
    (expected_gradient,) = torch.autograd.grad(tuple(expected), last, upstream)
    logits = logits * torch.ones((), device="cuda", requires_grad=True)  # computed, which in place asks for
    got = logprob(logits, targets, inplace_backward=True)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours[-4:], theirs, rtol=1e-6, atol=1e-6)
    zeros = torch.zeros(rows - 4, device="cuda")
    (gradient,) = torch.autograd.grad(tuple(got), logits, [torch.cat([zeros, one]) for one in upstream])
    assert gradient.data_ptr() == logits.data_ptr(), "in place"
    assert torch.equal(gradient[-4:], expected_gradient)
    assert not gradient[:-4].any(), "rows without an upstream gradient"


def test_layer_ops_beyond_two_to_the_31_elements():
    needs_gib(20)
    rows, width = 524_544, 4096
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-6)[-1], rms_norm(x[-1:], weight, 1e-6)[0])
    ids = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
    assert torch.equal(moe_permute(x, expert_order(ids, 1))[-1], x[-1])


@pytest.mark.parametrize("rows", [8192, 32768])
def test_linear_logprob_keeps_no_logits(rows):
    """Forward: a buffer and a few numbers a token. Backward: beside it d_weight in fp32 before it is rounded."""
    hidden_size, vocab = 1024, 65_536
    hidden = torch.randn(rows, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocab, (rows,), device="cuda")
    assert rows * vocab * 2 >= 1024 * MIB, "the logits alone would show"

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(linear_logprob(hidden, weight, targets))

    def with_backward() -> tuple[Tensor, ...]:
        result = linear_logprob(hidden, weight, targets)
        return torch.autograd.grad((result.logprob.sum() + result.entropy.sum()), (hidden, weight))

    assert extra_memory(forward) <= 560
    assert extra_memory(with_backward) <= 560 + vocab * hidden_size * 4 / MIB + rows * hidden_size * 4 / MIB


@pytest.mark.parametrize("rows", [8192, 32768])
def test_linear_policy_loss_takes_half_a_gigabyte(rows):
    """At most 0.5 GiB beside d_hidden and 128 bytes a token, with d_weight going into fp32 main_grad; d_hidden is summed in
    fp32 before it is rounded."""
    hidden_size, vocab = 1024, 65_536
    hidden = torch.randn(rows, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    main_grad = torch.zeros(vocab, hidden_size, device="cuda")
    targets = torch.randint(vocab, (rows,), device="cuda")
    advantages, mask = torch.randn(rows, device="cuda"), torch.ones(rows, dtype=torch.bool, device="cuda")
    spec = LossSpec(aggregation="token-mean", entropy_coef=0.01)

    def step() -> tuple[Tensor, ...]:
        result = linear_policy_loss(
            hidden, weight, targets, None, advantages, mask, spec, denominator=float(rows), main_grad=main_grad
        )
        return torch.autograd.grad(result.loss, (hidden,))

    assert extra_memory(step) <= 512 + rows * (hidden_size * 4 + 128) / MIB
    assert main_grad.abs().sum() > 0
