"""What `linear_policy_loss` and `policy_loss` cost on a CPU, in time and in memory, against plain torch in the same run."""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from strop.kernels import LossSpec, linear_policy_loss, native, policy_loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.library("cpu") is None, reason=f"plain torch here: {native.why_missing('cpu')}"),
]
SPEC = LossSpec(entropy_coef=0.01)
SEQUENCE = 256


class Head:
    def __init__(self, num_tokens: int, hidden_size: int, vocab: int):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return scale * torch.randn(*shape, generator=generator)

        self.hidden = normal(num_tokens, hidden_size).requires_grad_()
        self.weight = normal(vocab, hidden_size, scale=0.05).requires_grad_()
        self.targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
        self.advantages = normal(num_tokens)
        self.old = normal(num_tokens, scale=0.1) - 11
        self.mask = torch.ones(num_tokens, dtype=torch.bool)
        self.cu_seqlens = torch.arange(0, num_tokens + 1, SEQUENCE)

    def fused(self) -> None:
        linear_policy_loss(
            self.hidden, self.weight, self.targets, self.old, self.advantages, self.mask, SPEC, cu_seqlens=self.cu_seqlens,
            denominator=8.0,
        ).loss.backward()  # fmt: skip

    def eager(self) -> None:
        """The same loss, without metrics, by autograd over whole logits."""
        log_p = torch.log_softmax(self.hidden @ self.weight.t(), -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        ratio = (log_p.gather(1, self.targets[:, None]).squeeze(1) - self.old).exp()
        objective = torch.min(ratio * self.advantages, ratio.clamp(0.8, 1.2) * self.advantages)
        per_token = -objective - SPEC.entropy_coef * entropy
        (per_token.view(-1, SEQUENCE).mean(1).sum() / 8).backward()

    @torch.no_grad()
    def bare_products(self) -> None:
        logits = torch.mm(self.hidden, self.weight.t())
        torch.mm(logits, self.weight)
        torch.mm(logits.t(), self.hidden)

    def drop_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def medians(repeats: int, *functions: Callable[[], None]) -> tuple[list[float], float]:
    """(seconds, the functions in turn, so that whatever else the machine does slows all of them; cores that the second of
    them had on average)."""
    seconds, cores = [[] for _ in functions], []
    for _ in range(repeats):
        for function, own in zip(functions, seconds, strict=True):
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            own.append(time.perf_counter() - start)
            if function is functions[1]:
                cores.append((time.process_time() - cpu_start) / own[-1])
    return [statistics.median(own[1:]) for own in seconds], statistics.median(cores)


def test_time_against_bare_products_and_eager_torch(set_threads):
    """N 2048, H 576, V 49152 (SmolLM2-135M), 2 threads, forward and backward with entropy."""
    head = Head(2048, 576, 49152)
    set_threads(2)

    def freed(function):
        return lambda: (function(), head.drop_gradients())

    (fused, bare, eager), cores = medians(6, freed(head.fused), head.bare_products, freed(head.eager))
    if cores < 1.8:  # products alone keep two threads busy
        pytest.skip(f"needs two idle cores: other processes left {cores:.1f}")
    assert fused <= 1.2 * bare, f"{fused:.2f} s, the three products alone {bare:.2f} s"
    assert eager >= 1.5 * fused, f"{fused:.2f} s, eager {eager:.2f} s"


def test_policy_loss_is_five_times_faster_than_plain_torch(monkeypatch, set_threads):
    """32768 tokens, forward, backward and all metrics, 1 thread: a call of 1 ms is too short to wait for a second core."""
    set_threads(1)
    num_tokens = 32768
    logprob, entropy = (torch.randn(num_tokens, requires_grad=True) for _ in range(2))
    old, ref, rollout = (logprob.detach() + 0.1 * torch.randn(num_tokens) for _ in range(3))
    advantages, mask = torch.randn(num_tokens), torch.rand(num_tokens) > 0.1
    spec = LossSpec(correction="tis", kl_coef=0.01, entropy_coef=0.01)
    cu_seqlens = torch.arange(0, num_tokens + 1, SEQUENCE)

    def run(choice: str) -> None:
        monkeypatch.setenv("STROP_KERNELS", choice)
        loss, _ = policy_loss(
            logprob, old, advantages, mask, spec, ref_logprob=ref, rollout_logprob=rollout, entropy=entropy,
            cu_seqlens=cu_seqlens, denominator=8.0,
        )  # fmt: skip
        torch.autograd.grad(loss, (logprob, entropy))

    (kernel, plain), _ = medians(100, lambda: run("native"), lambda: run("reference"))
    assert plain >= 5 * kernel, f"{kernel * 1e6:.0f} us, plain torch {plain * 1e6:.0f} us"


def peak_extra_megabytes(form: str, *shape: int) -> float:
    """Largest resident set of a fresh process during one call, beyond its inputs and the gradients of hidden and weight."""
    arguments = [str(size) for size in shape]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, __file__, form, *arguments]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return int(re.search(rf"{field}:\s*(\d+) kB", status.read())[1]) * 1024


def measure(form: str, *shape: int) -> None:
    small = Head(SEQUENCE, 64, 300)
    getattr(small, form)()  # starts threads, allocates the libraries' buffers
    head = Head(*shape)
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # VmHWM starts anew
    getattr(head, form)()
    gradients = head.hidden.grad.nbytes + head.weight.grad.nbytes
    print((resident("VmHWM") - before - gradients) / 2**20)


@pytest.mark.parametrize("num_tokens", [8192, 32768])
def test_peak_memory_does_not_grow_with_the_logits(num_tokens):
    """H 1024, V 32000: whole logits would be 1 and 4 GB."""
    assert peak_extra_megabytes("fused", num_tokens, 1024, 32000) <= 300


def test_peak_memory_is_a_tenth_of_eager_torchs():
    shape = (2048, 576, 49152)
    assert 10 * peak_extra_megabytes("fused", *shape) <= peak_extra_megabytes("eager", *shape)


if __name__ == "__main__":
    measure(sys.argv[1], *map(int, sys.argv[2:]))
