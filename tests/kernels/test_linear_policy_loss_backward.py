"""The backward of `linear_policy_loss`: autograd's nodes, main_grad, loss scales, hooks, pipelines and torch.compile."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.nn.parallel import DistributedDataParallel

from strop.kernels import LossSpec, native
from strop.kernels.lm_head import LmHead, row_pieces

pytestmark = pytest.mark.skipif(native.library("cpu") is None, reason=f"only composed here: {native.why_missing('cpu')}")

FUSED = LossSpec(clip_low=0.2, clip_high=0.28, aggregation="token-mean", entropy_coef=0.2)
COMPOSED = LossSpec(policy="gspo", clip_low=0.05, clip_high=0.05)
CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # sums of up to 300 fp32 terms of order 1, in another order


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """3 tokens a chunk: their borders fall inside sequences."""
    monkeypatch.setattr(LmHead, "chunks", lambda head, live: row_pieces(live, 3))


def test_main_grad_takes_the_weights_gradient_in_the_forward(make_case):
    case, main_grad = make_case(dtype=torch.bfloat16), torch.ones(40, 6)
    expected = torch.autograd.grad(case.composed(FUSED)[0], case.leaves)
    for _ in range(2):
        loss = case.run(FUSED, main_grad=main_grad, loss_scale=0.5).loss
        before = main_grad.clone()
        (loss * 0.5).backward()
        assert torch.equal(main_grad, before)
    assert case.weight.grad is None
    torch.testing.assert_close(case.hidden.grad, expected[0], rtol=2e-2, atol=1e-3)  # bf16, halves added up
    assert (main_grad - 1 - expected[1].float()).norm() <= 4e-3 * expected[1].float().norm()


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("weight",), ("weight", "bias")])
def test_main_grad_wants_the_announced_loss_scale(make_case, trained):
    case = make_case()
    for name in ("hidden", "weight", "bias"):
        getattr(case, name).requires_grad_(name in trained)
    keywords = {"main_grad": torch.zeros(40, 6), "loss_scale": 8.0}
    with pytest.raises(ValueError, match=r"upstream gradient is 1.0 other than loss_scale 8.0, by which main_grad was scaled"):
        case.run(LossSpec(), **keywords).loss.backward()
    (case.run(LossSpec(), **keywords).loss * 8).backward()
    (case.run(LossSpec(), **keywords | {"loss_scale": torch.tensor(1 / 3)}).loss / 3).backward()
    assert case.weight.grad is None


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**-4, 3.0, torch.tensor(7.0)])
def test_loss_scale_without_main_grad_changes_nothing(make_case, loss_scale):
    case = make_case()
    loss = case.run(FUSED, loss_scale=loss_scale).loss
    want = torch.autograd.grad(case.composed(FUSED)[0], case.leaves)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss, case.leaves, retain_graph=True), want, **CLOSE)


def test_recomputing_adds_to_main_grad_in_backward(make_case):
    case, main_grad = make_case(), torch.zeros(40, 6)
    loss = case.run(COMPOSED, main_grad=main_grad).loss
    assert not main_grad.any()
    (loss * 2).backward()
    expected = torch.autograd.grad(case.composed(COMPOSED)[0], case.weight)[0]
    torch.testing.assert_close(main_grad, 2 * expected, **CLOSE)


@pytest.mark.parametrize("spec", [FUSED, COMPOSED], ids=["fused", "composed"])
@pytest.mark.parametrize("with_main_grad", [True, False])
def test_pipeline_schedules_may_split_the_backward(make_case, spec, with_main_grad):
    """What zero-bubble schedules call: first the gradient of the stage's input, later that of its weights."""
    case = make_case()
    stage = torch.nn.Linear(6, 6)
    x = torch.randn(len(case.mask), 6, requires_grad=True)
    main_grad = torch.zeros(40, 6) if with_main_grad else None
    weights = [*stage.parameters(), case.weight, case.bias]

    def loss():
        return case.run(spec, hidden=stage(x), main_grad=main_grad, split_backward=True).loss

    wanted = torch.autograd.grad(case.run(spec, hidden=stage(x)).loss, [x, *weights])
    for weight in weights:
        weight.grad = None
    for step in (1, 2):
        x.grad = None
        dx, groups = stage_backward_input([loss()], None, [x], iter(weights))
        stage_backward_weight(iter(weights), groups)
        torch.testing.assert_close(dx[0], wanted[0], **CLOSE)
        for weight, want in zip(weights, wanted[1:], strict=True):
            got = main_grad if with_main_grad and weight is case.weight else weight.grad
            torch.testing.assert_close(got, step * want, **CLOSE)


def test_each_tensor_has_a_node_of_its_own(make_case):
    case = make_case()
    nodes, names = [case.run(LossSpec()).loss.grad_fn], []
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert names.count("strop_stored_gradientBackward") == 3


def test_saves_the_gradients_and_nothing_else(make_case):
    case, saved = make_case(hidden_size=30, vocab=50), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.run(LossSpec())
    assert sorted(tuple(t.shape) for t in saved if t.dim()) == sorted(tuple(t.shape) for t in case.leaves)


@pytest.mark.parametrize("spec", [FUSED, COMPOSED], ids=["fused", "composed"])
@pytest.mark.parametrize("with_main_grad", [True, False])
def test_compiles(make_case, spec, with_main_grad):
    case = make_case()
    main_grad = torch.zeros(40, 6) if with_main_grad else None

    def call(hidden, weight, bias, main_grad):
        return case.run(spec, hidden=hidden, weight=weight, bias=bias, main_grad=main_grad)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    trained = (case.hidden, case.bias) if with_main_grad else case.leaves
    results = []
    for function in (call, compiled):
        outputs = function(*case.leaves, main_grad)
        gradients = torch.autograd.grad(outputs.loss, trained)
        results.append((*outputs, *gradients, *(() if main_grad is None else (main_grad.clone(),))))
        if main_grad is not None:
            main_grad.zero_()
    torch.testing.assert_close(results[1], results[0])
    if with_main_grad and spec is FUSED:
        with pytest.raises(RuntimeError, match="upstream gradient is a value other than loss_scale"):
            compiled(*case.leaves, main_grad).loss.mul(2).backward()


def test_double_backward_is_refused(make_case):
    case = make_case()
    with pytest.raises(RuntimeError, match="linear_policy_loss: a double backward isn't supported"):
        torch.autograd.grad(case.run(LossSpec()).loss, case.hidden, create_graph=True)


@pytest.mark.parametrize("loss_scale", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_backward_gave_stays_as_it_was(make_case, dtype, loss_scale):
    """Gradients are multiplied in place only where nothing of an earlier backward can share their memory."""
    case = make_case(dtype=dtype)
    loss = case.run(FUSED, loss_scale=loss_scale).loss
    passes = [torch.autograd.grad(loss * u, case.leaves, retain_graph=True) for u in (1.0, 3.0)]
    kept = [[gradient.clone() for gradient in found] for found in passes]
    last = torch.autograd.grad(loss * 8, case.leaves)
    for found, copies in zip(passes, kept, strict=True):
        assert all(map(torch.equal, found, copies))
    wanted = torch.autograd.grad(case.composed(FUSED)[0], case.leaves)
    tolerance = CLOSE if dtype == torch.float32 else {"rtol": 3 * torch.finfo(dtype).eps, "atol": 1e-3}  # rounded three times
    for u, found in zip((1.0, 3.0, 8.0), (*passes, last), strict=True):
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got / u, want, **tolerance)


def test_another_loss_scale_takes_no_second_copy(make_case):
    """V x H numbers: the gradient that backward hands on is the one that the forward made."""
    case, stored = make_case(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.data_ptr()) or t, lambda t: t):
        loss = case.run(FUSED).loss
    (loss * 3).backward()
    assert {leaf.grad.data_ptr() for leaf in case.leaves} <= set(stored)


def test_main_grad_takes_one_backward(make_case):
    case, main_grad = make_case(), torch.zeros(40, 6)
    loss = case.run(FUSED, main_grad=main_grad).loss
    torch.autograd.grad(loss, case.hidden, retain_graph=True)
    torch.autograd.grad(loss, case.options["bias"], retain_graph=True)  # another node
    with pytest.raises(RuntimeError, match="a second backward adds nothing to main_grad, which the forward has filled"):
        loss.backward()


@pytest.mark.parametrize("spec", [FUSED, COMPOSED], ids=["fused", "composed"])
def test_main_grad_leaves_the_weights_hooks_alone(make_case, spec):
    """Trainers start the reduction of main_grad from them."""
    case, main_grad, seen = make_case(), torch.zeros(40, 6), []
    case.weight.register_post_accumulate_grad_hook(lambda weight: seen.append((weight.grad, main_grad.clone())))
    for step in (1, 2):
        case.run(spec, main_grad=main_grad).loss.backward()
        assert len(seen) == step and seen[-1][0] is None and torch.equal(seen[-1][1], main_grad) and main_grad.any()


def test_main_grad_under_distributed_data_parallel(make_case, run_ranks):
    """DDP waits for the hooks of every parameter: a second step finds the reduction of the first one finished."""
    case = make_case()

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)
            self.weight = torch.nn.Parameter(case.weight.detach().clone())
            self.main_grad = torch.zeros(40, 6)

        def forward(self, x):
            return case.run(FUSED, hidden=self.layer(x), weight=self.weight, bias=None, main_grad=self.main_grad).loss

    def rank_main():
        dist.init_process_group("gloo")
        head, x, steps = Head(), torch.randn(len(case.mask), 6), 2
        wrapped = DistributedDataParallel(head)
        for _ in range(steps):
            wrapped(x).backward()
        plain = case.run(FUSED, hidden=head.layer(x), weight=head.weight, bias=None).loss
        wanted = torch.autograd.grad(plain, [head.weight, head.layer.weight])
        return head.main_grad / steps, wanted[0], head.layer.weight.grad / steps, wanted[1]

    for main_grad, d_weight, layer_grad, d_layer in run_ranks(1, rank_main):
        torch.testing.assert_close((main_grad, layer_grad), (d_weight, d_layer), **CLOSE)


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("spec", [FUSED, COMPOSED], ids=["fused", "composed"])
def test_nan_in_masked_rows_reaches_no_gradient(make_case, monkeypatch, spec, main_grad):
    """With pieces of fixed shapes, as on a GPU, where 0 * NaN would come out of the product over rows."""
    monkeypatch.setattr("strop.kernels.lm_head.row_pieces", fixed_pieces)
    monkeypatch.setattr(LmHead, "chunks", lambda head, live: fixed_pieces(live, 3))
    case, total = make_case(), torch.zeros(40, 6) if main_grad else None
    wanted = torch.autograd.grad(case.composed(spec)[0], case.leaves)
    inside = case.mask & (torch.arange(len(case.mask)) < case.cu_seqlens[-1])
    hidden = case.hidden.detach().masked_fill(~inside[:, None], float("nan")).requires_grad_()
    case.run(spec, hidden=hidden, main_grad=total).loss.backward()
    found = (hidden.grad, total if main_grad else case.weight.grad, case.options["bias"].grad)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def fixed_pieces(live_N, height):
    return [slice(start, min(start + height, len(live_N))) for start in range(0, len(live_N), height)]


def test_numbers_may_change_without_another_graph(make_case):
    """Temperature schedules, token counts, a loss scaler's factor: one graph for the first call's, one for all others."""
    torch._dynamo.reset()
    case, graphs = make_case(), []
    compile_graph = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return compile_graph(graph, inputs)

    def loss(hidden, temperature, denominator, loss_scale):
        options = {"temperature": temperature, "denominator": denominator, "loss_scale": loss_scale}
        return case.run(FUSED, hidden=hidden, **options).loss

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for step in range(10):
        numbers = (0.55 + 0.1 * step, 3.0 + step, 2.0 + step)
        got, want = (torch.autograd.grad(function(case.hidden, *numbers), case.hidden)[0] for function in (compiled, loss))
        torch.testing.assert_close(got, want, **CLOSE)
    assert len(graphs) <= 3
