"""split_backward in the two halves of torch.distributed.pipelining's backward, with main_grad on."""

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from strop.kernels import linear_logprob, products

TARGETS = torch.tensor([3, 6, 0, 1])


def stage(split: bool, main_grad, bias):
    """(loss, stage input, weights of a last pipeline stage: a layer and the LM head)."""
    torch.manual_seed(0)
    x, layer, weight = torch.randn(4, 5, requires_grad=True), torch.randn(5, 5), torch.randn(7, 5)
    weights = [layer.requires_grad_(), weight.requires_grad_()] + ([bias] if bias is not None else [])
    results = linear_logprob((x @ layer).tanh(), weight, TARGETS, bias=bias, main_grad=main_grad, split_backward=split)
    return (results.logprob * torch.randn(4) - results.entropy.square()).sum(), x, weights


def make_bias(given: bool):
    return torch.linspace(-1, 1, 7).requires_grad_() if given else None


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_both_halves_give_the_whole_gradient_once(accumulate, with_bias):
    whole, x, weights = stage(False, None, make_bias(with_bias))
    expected = torch.autograd.grad(whole, [x, *weights])

    main_grad = torch.ones(7, 5) if accumulate else None
    for micro_batch in range(2):
        loss, x, weights = stage(True, main_grad, make_bias(with_bias))
        (d_x,), param_groups = stage_backward_input([loss], None, [x], iter(weights))
        torch.testing.assert_close(d_x, expected[0])
        if accumulate:  # dX alone touches no weight
            torch.testing.assert_close(main_grad, 1 + micro_batch * expected[2])
        stage_backward_weight(iter(weights), param_groups)
        got = [weight.grad for weight in weights]
        if accumulate:
            assert not got[1].any()
            got[1] = None
        for gradient, want in zip(got, expected[1:], strict=True):
            if gradient is not None:
                torch.testing.assert_close(gradient, want)
    if accumulate:
        torch.testing.assert_close(main_grad, 1 + 2 * expected[2])


def test_one_node_for_both_adds_twice():
    """Why split_backward exists: the unsplit op runs in both halves, and the second one finds no gradient of the weight."""
    loss, x, weights = stage(False, None, None)
    expected = torch.autograd.grad(loss, weights[1])[0]
    main_grad = torch.zeros(7, 5)
    loss, x, weights = stage(False, main_grad, None)
    _, param_groups = stage_backward_input([loss], None, [x], iter(weights))
    torch.testing.assert_close(main_grad, expected)
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        stage_backward_weight(iter(weights), param_groups)
    torch.testing.assert_close(main_grad, 2 * expected)


def test_number_of_products(monkeypatch):
    """10 N H V operations, 8 in one node: five products and four."""
    multiplied = []
    for name in ("multiply", "add_product_"):
        original = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *matrices, original=original: multiplied.append(original(*matrices)))
    for split, expected in ((False, 4), (True, 5)):
        multiplied.clear()
        hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
        linear_logprob(hidden, weight, TARGETS, split_backward=split).entropy.sum().backward()
        assert len(multiplied) == expected


@pytest.mark.parametrize("trained", ["hidden", "weight", "nothing"])
def test_one_gradient_needs_no_second_node(trained):
    hidden, weight = torch.randn(4, 5), torch.randn(7, 5)
    if trained == "nothing":
        assert not linear_logprob(hidden, weight, TARGETS, split_backward=True).logprob.requires_grad
        return
    leaf = (hidden if trained == "hidden" else weight).requires_grad_()
    (got,) = torch.autograd.grad(linear_logprob(hidden, weight, TARGETS, split_backward=True).logprob.sum(), leaf)
    (want,) = torch.autograd.grad(linear_logprob(hidden, weight, TARGETS).logprob.sum(), leaf)
    assert torch.equal(got, want)
