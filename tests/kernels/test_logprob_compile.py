"""linear_logprob and logprob under torch.compile, and the checks of torch.library on their flat ops."""

import pytest
import torch

from strop.kernels import linear_logprob, logprob
from strop.kernels.lm_head import IGNORED

IGNORE = -100
KEEP = torch.rand(2, 3, 30, generator=torch.Generator().manual_seed(0)) > 0.3
KEEP[..., :3] = True
TARGETS = torch.tensor([[0, 1, IGNORE], [2, 0, 1]])
EVERYTHING = {"temperature": torch.tensor([[0.5, 1, 2], [1, 1, 0.7]]), "softcap": 3.0, "keep_mask": KEEP}


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()


def scalar(results) -> torch.Tensor:
    return (1.5 * results.logprob - results.entropy.square() + 0.3 * results.logsumexp).sum()


def head_loss(hidden, weight, bias, main_grad, options):
    return scalar(linear_logprob(2 * hidden, weight, TARGETS, bias=bias, main_grad=main_grad, **options))


def logits_loss(hidden, weight, bias, main_grad, options):
    return scalar(logprob(hidden @ weight.t() + bias, TARGETS, **options))


def gradients(loss, options, accumulate):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 8), (30, 8), (30,)))
    main_grad = torch.ones(30, 8) if accumulate else None
    value = loss(hidden, weight, bias, main_grad, options)
    value.backward()
    return value.detach(), hidden.grad, weight.grad, bias.grad, main_grad


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, EVERYTHING], ids=["plain", "number", "everything"])
def test_linear_logprob_is_one_graph(options, accumulate, split):
    options = options | {"split_backward": split}
    compiled = torch.compile(head_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, options, accumulate), gradients(head_loss, options, accumulate))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_logprob_is_one_graph(options, inplace):
    options = options | {"inplace_backward": inplace}
    compiled = torch.compile(logits_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, options, False), gradients(logits_loss, options, False))


@pytest.mark.slow
def test_inductor():
    """C++ code of Inductor around the ops: 15 s on two cores."""
    for loss, options, accumulate in ((head_loss, EVERYTHING, True), (logits_loss, {"inplace_backward": True}, False)):
        compiled = torch.compile(loss, fullgraph=True)
        torch.testing.assert_close(gradients(compiled, options, accumulate), gradients(loss, options, accumulate))


def test_shapes_may_change_without_another_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(hidden, weight, targets):
        return scalar(linear_logprob(hidden, weight, targets))

    compiled, weight = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend), torch.randn(30, 8)
    for rows in (3, 5, 7):
        hidden, targets = torch.randn(rows, 8), torch.randint(0, 30, (rows,))
        assert compiled(hidden, weight, targets) == loss(hidden, weight, targets)
    assert len(graphs) == 1


def test_out_of_range_is_nan_where_no_value_may_be_read():
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="eager")
    results = compiled(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([4, 5]))
    assert results.logprob.isnan().tolist() == [False, True] and results.entropy.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    """Schemas tell the truth about mutation and aliasing, fakes about shapes, and gradients survive AOTAutograd."""
    ops = torch.ops.strop
    hidden, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((4, 3), (9, 3), (9,)))
    targets, keep, rate = torch.tensor([0, 8, IGNORED, 5]), torch.ones(4, 9, dtype=torch.bool), torch.rand(4, dtype=dtype) + 1
    fixed, main_grad = (hidden.detach(), weight.detach(), bias.detach()), torch.zeros(9, 3, dtype=dtype)
    logits = (fixed[0] @ fixed[1].t()).requires_grad_()
    for shape in ((None, 0.5, None, None, None), (rate, 1.0, 2.0, keep, None)):
        statistics = ops.linear_logprob(*fixed, targets, None, *shape)
        upstream = (torch.randn(4, dtype=dtype), None, torch.randn(4, dtype=dtype))
        torch.library.opcheck(ops.linear_logprob.default, (hidden, weight, bias, targets, None, *shape))
        torch.library.opcheck(ops.linear_logprob.default, (hidden, weight, None, targets, main_grad, *shape))
        torch.library.opcheck(ops.linear_logprob_weight_node.default,
                              (weight, bias, fixed[0], targets, *statistics, None, *shape))  # fmt: skip
        for needs, total in (((True, True, True), None), ((False, True, False), main_grad), ((True, False, True), None)):
            arguments = (*upstream, *statistics, *fixed, targets, *needs, total, *shape)
            torch.library.opcheck(ops.linear_logprob_backward.default, arguments)
        torch.library.opcheck(ops.logprob.default, (logits, targets, False, *shape))
        arguments = (*upstream, *ops.logprob(logits.detach(), targets, False, *shape), logits.detach(), targets, *shape)
        torch.library.opcheck(ops.logprob_backward.default, arguments)
        torch.library.opcheck(ops.logprob_backward_.default, arguments)
