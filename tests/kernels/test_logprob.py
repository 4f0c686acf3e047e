"""`linear_logprob` and `logprob` against softmax over whole logits in fp64, with random upstream gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import strop.kernels.reference.linear_logprob as tiled
from strop.kernels import LossSpec, linear_logprob, linear_policy_loss, logprob, policy_loss

IGNORE = -100


def eager(logits, targets, temperature=1.0, softcap=None, keep_mask=None):
    """(logprob, entropy, logsumexp) by autograd over whole logits; 0 where the target is ignored."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = z / (temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature)
    if keep_mask is not None:
        z = z.masked_fill(~keep_mask, -math.inf)
    kept = targets != IGNORE
    lse = z.logsumexp(-1)
    p = (z - lse[..., None]).exp()
    entropy = lse - (p * torch.where(p > 0, z, 0)).sum(-1)
    log_p = z.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) - lse
    return tuple(torch.where(kept, values, 0) for values in (log_p, entropy, lse))


def weighted(results, upstream):
    """A scalar whose gradients with respect to the three outputs are `upstream`."""
    return sum((values * gradient).sum() for values, gradient in zip(results, upstream, strict=True))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 3 rows and 128 tokens, so that small tests cross tile borders."""
    monkeypatch.setitem(tiled.TILE_ROWS, "cpu", 3)
    monkeypatch.setitem(tiled.TILE_ELEMENTS, "cpu", 1)


@st.composite
def heads(draw):
    """Inputs of linear_logprob in fp64, with any of its options."""
    rows, hidden_size, vocab = draw(st.integers(0, 8)), draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 7, 128, 129, 300]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < draw(st.sampled_from([0, 0.4, 1]))] = IGNORE
    if rows and draw(st.booleans()):
        targets[-1] = vocab - 1  # the last row of the last block
    options = {}
    if draw(st.booleans()):
        options["bias"] = normal(vocab)
        if vocab > 2 and draw(st.booleans()):
            options["bias"][vocab // 2] = -math.inf
            targets[targets == vocab // 2] = 0
    if draw(st.booleans()):
        options["temperature"] = normal(rows).exp() if draw(st.booleans()) else 0.7
    if draw(st.booleans()):
        options["softcap"] = 1.5
    if draw(st.booleans()):
        keep = torch.rand(rows, vocab, generator=generator) > 0.5
        keep[torch.arange(rows), targets.clamp(min=0)] = True
        keep[targets == IGNORE] = False  # a row without any kept token, as padding may have
        options["keep_mask"] = keep
    hidden = normal(hidden_size, rows).t() if draw(st.booleans()) else normal(rows, hidden_size)  # strided or not
    weight = normal(2 * vocab, hidden_size)[::2] if draw(st.booleans()) else normal(vocab, hidden_size)
    upstream = [normal(rows) * draw(st.sampled_from([0, 1])) for _ in range(3)]
    return hidden, weight, targets, options, upstream


@settings(max_examples=150, deadline=None, derandomize=True)
@given(head=heads())
def test_any_head_equals_whole_logits(head):
    hidden, weight, targets, options, upstream = head
    leaves = [t.requires_grad_() for t in (hidden, weight, options.get("bias")) if t is not None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiled.TILE_ROWS, "cpu", 3)
        patch.setitem(tiled.TILE_ELEMENTS, "cpu", 1)
        results = linear_logprob(hidden, weight, targets, **options)
        grads = torch.autograd.grad(weighted(results, upstream), leaves)
    logits = hidden @ weight.t() + options["bias"] if "bias" in options else hidden @ weight.t()
    rest = {name: value for name, value in options.items() if name != "bias"}
    live = targets != IGNORE
    if "keep_mask" in rest:
        rest["keep_mask"] = rest["keep_mask"] | ~live[:, None]  # eager has no use for a row without tokens
    expected = eager(logits, targets, **rest)
    wanted = torch.autograd.grad(weighted(expected, upstream), leaves, allow_unused=True, materialize_grads=True)
    for got, want in zip((*results, *grads), (*expected, *wanted), strict=True):
        torch.testing.assert_close(got, torch.nan_to_num(want), rtol=1e-10, atol=1e-11)

    whole = logits.detach().requires_grad_()
    results = logprob(whole, targets, **rest)
    (d_logits,) = torch.autograd.grad(weighted(results, upstream), whole)
    if len(targets):
        (want,) = torch.autograd.grad(weighted(eager(whole, targets, **rest), upstream), whole)
        torch.testing.assert_close(d_logits, torch.nan_to_num(want), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(small_tiles, temperature, softcap):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (130, 3), (130,)))
    targets = torch.tensor([0, 129, IGNORE, 64])
    keep = torch.rand(4, 130) > 0.2
    keep[torch.arange(4), targets.clamp(min=0)] = True
    options = {"temperature": temperature, "softcap": softcap, "keep_mask": keep}
    assert torch.autograd.gradcheck(lambda h, w, b: linear_logprob(h, w, targets, bias=b, **options), (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets, temperature=temperature), (hidden, weight))
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    targets = targets.clamp(max=8)
    assert torch.autograd.gradcheck(lambda z: logprob(z, targets, temperature=temperature, softcap=softcap), (logits,))


def test_gradcheck_of_the_fused_loss():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (7, 4)))
    targets, mask = torch.randint(0, 7, (2, 3)), torch.tensor([[True, True, False], [False, True, True]])
    old, ref, advantages = (torch.randn(2, 3, dtype=torch.float64) * s for s in (0.1, 1, 1))
    old = old + linear_logprob(hidden, weight, targets).logprob.detach()
    spec = LossSpec(kl_coef=0.1, entropy_coef=0.3)

    def loss(hidden, weight):
        return linear_policy_loss(hidden, weight, targets, old, advantages, mask, spec, ref_logprob=ref, denominator=2.0).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    fused = linear_policy_loss(hidden, weight, targets, old, advantages, mask, spec, ref_logprob=ref, denominator=2.0)
    parts = linear_logprob(hidden, weight, targets)
    apart = policy_loss(
        parts.logprob, old, advantages, mask, spec, ref_logprob=ref, entropy=parts.entropy, denominator=2.0
    )
    assert fused.loss == apart.loss and torch.equal(fused.metrics, apart.metrics)
    assert torch.equal(fused.logprob, parts.logprob.detach() * mask) and not fused.logprob.requires_grad


def test_fp32_is_exact_where_probabilities_saturate():
    """Logits of 1e4 and a target of probability 1 - 4.5e-5: no overflow, no cancelled entropy, a slope of g (1 - p)."""
    logits = torch.tensor([[1e4, 0, -1e4], [1e4, 1e4, -1e4], [10, 0, -90]], requires_grad=True)
    log_p, entropy, lse = logprob(logits, torch.tensor([1, 0, 0]))
    assert log_p[:2].tolist() == pytest.approx([-1e4, -math.log(2)], rel=1e-6)
    assert lse.tolist() == pytest.approx([1e4, 1e4 + math.log(2), math.log(math.exp(10) + 1)], rel=1e-6)
    p = 1 / (1 + math.exp(10))  # of the token that is not the target
    assert entropy.tolist() == pytest.approx([0, math.log(2), -p * math.log(p) - (1 - p) * math.log1p(-p)], rel=1e-3)
    (slopes,) = torch.autograd.grad(log_p.sum() + entropy.sum() * 0, logits)
    assert slopes[0].tolist() == [-1, 1, 0]
    (slopes,) = torch.autograd.grad(logprob(logits, torch.tensor([1, 0, 0])).logprob[2], logits)
    assert slopes[2, 0].item() == pytest.approx(p, rel=2e-3)


def test_logits_of_minus_infinity_have_no_probability_and_no_gradient():
    logits = torch.tensor([[-math.inf, 1.0, 0.0], [0.0, -math.inf, -math.inf]], requires_grad=True)
    results = logprob(logits, torch.tensor([1, 0]))
    assert results.logprob.tolist() == pytest.approx([-math.log1p(math.exp(-1)), 0])
    (slopes,) = torch.autograd.grad(weighted(results, torch.randn(3, 2)), logits)
    assert slopes.isfinite().all() and slopes[0, 0] == 0 and (slopes[1, 1:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_accumulate_in_fp32(small_tiles, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 16).to(dtype), torch.randn(300, 16).to(dtype)
    targets = torch.randint(0, 300, (2, 5))
    upstream = torch.randn(3, 2, 5)
    results = {}
    for kind, (h, w) in {"ours": (hidden, weight), "exact": (hidden.double(), weight.double())}.items():
        h, w = h.requires_grad_(), w.requires_grad_()
        outputs = linear_logprob(h, w, targets) if kind == "ours" else eager(h @ w.t(), targets)
        results[kind] = (*outputs, *torch.autograd.grad(weighted(outputs, upstream), (h, w)))
    assert results["ours"][0].dtype == torch.float32 and results["ours"][4].dtype == dtype
    for got, want in zip(results["ours"][:3], results["exact"][:3], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    # bf16, fp16: the results' own rounding. fp32: a logit of 16 is off by 8 eps and its probability with it; eager torch has
    # 3 to 6 eps here, over six seeds.
    eps = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 4)
    for got, want in zip(results["ours"][3:], results["exact"][3:], strict=True):
        assert (got.double() - want).norm() <= eps * want.norm()


def test_main_grad_accumulates_in_fp32_and_leaves_grad_alone(small_tiles):
    torch.manual_seed(0)
    hidden = torch.randn(7, 4, dtype=torch.bfloat16)
    weight = torch.randn(200, 4, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 200, (7,))
    main_grad = torch.ones(200, 4)
    for _ in range(2):
        linear_logprob(hidden, weight, targets, main_grad=main_grad).logprob.sum().backward()
    assert weight.grad is None
    exact = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(2 * eager(hidden.double() @ exact.t(), targets)[0].sum(), exact)
    torch.testing.assert_close(main_grad.double(), 1 + expected, rtol=1e-5, atol=1e-5)


def test_logits_may_be_overwritten_in_backward():
    torch.manual_seed(0)
    base = torch.randn(5, 9, requires_grad=True)
    targets, upstream = torch.tensor([0, 8, IGNORE, 3, 3]), torch.randn(3, 5)
    (wanted,) = torch.autograd.grad(weighted(logprob(base, targets), upstream), base)
    logits = base * 1
    (got,) = torch.autograd.grad(weighted(logprob(logits, targets, inplace_backward=True), upstream), logits)
    assert got.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(got, wanted)


def test_overwritten_logits_are_not_read_again():
    """Autograd knows of the write: a later backward that saved the same logits raises, where it would read gradients."""
    base, targets = torch.randn(5, 9, requires_grad=True), torch.tensor([0, 8, IGNORE, 3, 3])

    def score(logits):
        return logprob(logits, targets, inplace_backward=True).logprob.sum()

    logits = base * 1
    again, squares, other = score(logits), logits.square().sum(), score(2 * base)
    again.backward(retain_graph=True)
    for loss in (again, squares, score(logits) + score(logits)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    other.backward()


def test_inplace_backward_refuses_a_leaf():
    """Its gradient would be the leaf itself."""
    leaf, targets = torch.randn(2, 3, 9, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    for logits, own in ((leaf, targets), (leaf.view(6, 9), targets.view(6)), (leaf[0], targets[0])):
        with pytest.raises(ValueError, match="inplace_backward would overwrite a leaf that requires grad"):
            logprob(logits, own, inplace_backward=True)
        with torch.no_grad():
            logprob(logits, own, inplace_backward=True)
    logprob(leaf.detach(), targets, inplace_backward=True)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_ignored_rows_are_not_read(kernels, monkeypatch):
    """Padding may hold anything: NaN in hidden, logits, and what arrives from the loss."""
    monkeypatch.setenv("STROP_KERNELS", kernels)
    targets, upstream = torch.tensor([1, IGNORE, 2]), torch.tensor([1.0, math.nan, 2.0])
    hidden, weight, logits = (torch.randn(shape) for shape in ((3, 4), (5, 4), (3, 5)))
    hidden[1] = logits[1] = math.nan
    hidden, weight, logits = (tensor.requires_grad_() for tensor in (hidden, weight, logits))
    for results, leaves in ((linear_logprob(hidden, weight, targets), (hidden, weight)), (logprob(logits, targets), (logits,))):
        grads = torch.autograd.grad(results, leaves, [upstream] * 3)
        for tensor in (*results, grads[0]):
            assert tensor.isfinite().all() and not tensor[1].any()
        assert all(grad.isfinite().all() and grad.any() for grad in grads)
