"""csrc/cpu and threads: one pool with torch's, the same bits from any number, no pool needed for one."""

import os
import re
import threading
from pathlib import Path

import pytest
import torch

from strop.kernels import LossSpec, native
from strop.kernels.cpu import logit_rows, policy_loss
from strop.kernels.loss_code import encode

PLAIN = {"inverse_temperature": 1.0, "softcap": None, "bias_V": None, "keep_mask_NV": None}


@pytest.fixture(autouse=True)
def compiled_for_cpu():
    if native.library("cpu") is None:
        pytest.skip(native.why_missing("cpu"))


@pytest.fixture
def threads():
    """`threads(n)` sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything() -> list[torch.Tensor]:
    """The results of each kernel, on work that is worth several threads."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(70, 3001, generator=generator)
    targets = torch.randint(0, 3001, (70,), generator=generator)
    statistics = logit_rows.logit_statistics(logits, targets, **PLAIN, partial=False)
    g, h = torch.randn(2, 70, generator=generator)
    logit_rows.logit_gradient(logits, targets, statistics, g, h, None, **PLAIN, out_NV=logits)
    tokens = 0.1 * torch.randn(4, 30_011, generator=generator)
    logprob, old, rollout, advantages = tokens
    spec = LossSpec(policy="gspo", correction="tis")
    mask = torch.rand(30_011, generator=generator) < 0.7
    cu_seqlens = torch.tensor([0, 7, 7, 12_000, 12_001, 29_000])
    loss, metrics, d_logprob, _ = policy_loss.policy_loss(
        encode(spec), logprob, old, advantages, mask, None, rollout, None, cu_seqlens, None, torch.tensor(5.0)
    )
    return [statistics, logits, loss, metrics, d_logprob]


def test_the_number_of_threads_changes_no_bit(threads):
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(everything())
    for others in results[1:]:
        for one, many in zip(results[0], others, strict=True):
            assert torch.equal(one.view(torch.int32), many.view(torch.int32))


def test_a_new_thread_takes_as_many_threads_as_torch(threads):
    """torch has not told OpenMP their number there, unless it is asked."""
    library = native.library("cpu")
    threads(1)
    logits, targets, seen = torch.zeros(2, 5), torch.tensor([1, 2]), []

    def in_new_thread() -> None:
        logit_rows.logit_statistics(logits, targets, **PLAIN, partial=False)
        seen.append(library.omp_get_max_threads())

    worker = threading.Thread(target=in_new_thread)
    worker.start()
    worker.join()
    assert seen == [1]


def test_torch_and_the_kernels_share_one_openmp(threads):
    """Two would each keep threads that wait spinning, on the same cores."""
    threads(2)
    everything()
    mapped = Path("/proc/self/maps").read_text()
    runtimes = set(re.findall(r"/\S*lib(?:gomp|iomp5|omp)[-.\w]*\.so\S*", mapped))
    assert len(runtimes) == 1, runtimes


def test_a_forked_process_needs_no_pool(threads, run_ranks):
    """The parent's pool doesn't exist in a fork, where waiting for it takes forever; run_ranks sets torch to 1 thread."""
    threads(2)
    expected = everything()

    def in_fork() -> tuple[bool, int]:
        same = all(torch.equal(*pair) for pair in zip(everything(), expected, strict=True))
        return same, len(os.listdir("/proc/self/task"))

    assert run_ranks(2, in_fork, time_limit=30) == [(True, 1)] * 2
