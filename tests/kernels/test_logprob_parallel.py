"""Vocabulary-parallel log-probs over gloo equal those of one rank: values, gradients, uneven shards, targets at their edges."""

import pytest
import torch
import torch.distributed as dist

from strop.kernels import linear_logprob, logprob

IGNORE, VOCAB = -100, 300
EDGES = {2: [0, 299, 300], 4: [0, 1, 71, 200, 300]}
TARGETS = torch.tensor([0, 1, 70, 71, 199, 200, 298, 299, IGNORE])
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
"""fp32: sums over the vocabulary in another order; gradients of a few units."""


def head(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = len(TARGETS)
    shapes = ((rows, 6), (VOCAB, 6), (VOCAB,), (3, rows))
    hidden, weight, bias, upstream = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    keep = torch.rand(rows, VOCAB, generator=generator) > 0.3
    keep[torch.arange(rows), TARGETS] = True
    keep[0, 1:200] = False  # nothing kept on two of the four ranks
    temperature = torch.rand(rows, generator=generator, dtype=dtype) + 0.5
    return hidden, weight, bias, upstream, {"temperature": temperature, "softcap": 3.0}, keep


def results_and_gradients(dtype, bounds=(0, VOCAB), group=None, **options):
    """What this rank's shard gives: 3 results and gradients of hidden, weight, bias; 3 results and d_logits."""
    hidden, weight, bias, upstream, shape, keep = head(dtype)
    columns = slice(*bounds)
    shard = {} if group is None else {"tp_group": group, "vocab_range": bounds}
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight[columns], bias[columns])]
    results = linear_logprob(*leaves[:2], TARGETS, bias=leaves[2], keep_mask=keep[:, columns], **shape, **shard, **options)
    torch.autograd.backward(results, list(upstream))
    leaf = hidden.clone().requires_grad_()
    logits, slopes = leaf @ weight[columns].t(), []
    logits.register_hook(lambda slope: slopes.append(slope.clone()))
    inplace = {"inplace_backward": True} if options else {}
    from_logits = logprob(logits, TARGETS, keep_mask=keep[:, columns], **shape, **shard, **inplace)
    torch.autograd.backward(from_logits, list(upstream))
    found = (*results, *(leaf.grad for leaf in leaves), *from_logits, *slopes)
    return [tensor.detach().clone() for tensor in found]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["reference", "cpu"])
def test_equals_one_rank(run_ranks, ranks, dtype):
    edges = EDGES[ranks]

    def rank_main():
        dist.init_process_group("gloo")
        rank, group = dist.get_rank(), dist.new_group(list(range(ranks)))
        bounds = (edges[rank], edges[rank + 1])
        found = results_and_gradients(dtype, bounds, group)
        split = results_and_gradients(dtype, bounds, dist.group.WORLD, split_backward=True)
        hidden, weight, *_ = head(dtype)
        shard = {"tp_group": group, "vocab_range": bounds}
        beyond = linear_logprob(hidden, weight[slice(*bounds)], TARGETS.masked_fill(TARGETS == 0, 300), **shard).logprob
        dist.destroy_process_group()
        return found, split, beyond

    whole = results_and_gradients(dtype)
    for rank, (found, split, beyond) in enumerate(run_ranks(ranks, rank_main)):
        columns = slice(edges[rank], edges[rank + 1])
        wanted = [*whole[:4], whole[4][columns], whole[5][columns], *whole[6:9], whole[9][:, columns]]
        for got, again, want in zip(found, split, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            torch.testing.assert_close(again, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert beyond.isnan().tolist() == [True] + [False] * 8, "token 300 is on no shard"


def test_compiles(run_ranks):
    """The group enters the graph by its name."""

    def loss(hidden, weight, group, bounds):
        results = linear_logprob(hidden, weight, TARGETS, tp_group=group, vocab_range=bounds)
        return (results.logprob + results.entropy.square()).sum()

    def rank_main():
        dist.init_process_group("gloo")
        bounds = (EDGES[2][dist.get_rank()], EDGES[2][dist.get_rank() + 1])
        gradients = []
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            hidden, weight, *_ = head(torch.float32)
            shard = weight[slice(*bounds)].clone().requires_grad_()
            function(hidden.requires_grad_(), shard, dist.group.WORLD, bounds).backward()
            gradients.append((hidden.grad, shard.grad))
        dist.destroy_process_group()
        return gradients

    for eager, compiled in run_ranks(2, rank_main):
        torch.testing.assert_close(compiled, eager)
