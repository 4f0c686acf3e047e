"""The chunked and tiled head over compiled row kernels against the plain-torch twin in fp64, for arbitrary heads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import linear_logprob, lm_head, logprob, products
from strop.kernels.head_gradient import HeadGradient
from strop.kernels.reference.softmax import LogitShape

IGNORE = -100
EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@st.composite
def heads(draw):
    """(hidden, weight, targets, options, upstream gradients or None) in fp32, bf16 or fp16."""
    rows, hidden_size = draw(st.sampled_from([0, 1, 5, 33])), draw(st.sampled_from([1, 3, 16]))
    vocab = draw(st.sampled_from([1, 2, 7, 127, 128, 129, 300]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def chance(*shape):
        return torch.rand(*shape, generator=generator)

    targets = torch.randint(0, vocab, (rows,), generator=generator)
    if rows and draw(st.booleans()):
        targets[-1] = vocab - 1
    targets[chance(rows) < draw(st.sampled_from([0, 0.4, 1]))] = IGNORE
    kept = targets.clamp(min=0)
    options = {}
    if draw(st.booleans()):
        options["bias"] = normal(vocab).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
        if vocab > 2 and draw(st.booleans()):
            options["bias"][vocab // 2] = -math.inf
            targets[targets == vocab // 2] = 0
    if draw(st.booleans()):
        options["temperature"] = normal(rows).exp() if draw(st.booleans()) else 0.7
    if draw(st.booleans()):
        options["softcap"] = 1.5
    if draw(st.booleans()):
        options["keep_mask"] = (chance(rows, vocab) > 0.5).index_put((torch.arange(rows), kept), torch.tensor(True))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    hidden = normal(hidden_size, rows).to(dtype).t() if draw(st.booleans()) else normal(rows, hidden_size).to(dtype)
    weight = normal(2 * vocab, hidden_size)[::2] if draw(st.booleans()) else normal(vocab, hidden_size)
    weight = weight.to(draw(st.sampled_from([dtype, torch.float32])))
    upstream = [normal(rows) * (chance(rows) > 0.3) if draw(st.booleans()) else None for _ in range(3)]
    if all(gradient is None for gradient in upstream):
        upstream[0] = normal(rows)
    return hidden, weight, targets, options, upstream


def backward(results, upstream) -> None:
    """With gradients None where `upstream` says so."""
    used = [(result, gradient) for result, gradient in zip(results, upstream, strict=True) if gradient is not None]
    torch.autograd.backward(*zip(*used, strict=True))


def in_fp64(value):
    return value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def close(got, want, eps: float) -> None:
    """Each number to 30 eps of the largest, relative to logits of a few units."""
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=30 * eps * scale)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(head=heads(), accumulate=st.booleans(), split=st.booleans())
def test_any_head_equals_the_twin_in_fp64(head, accumulate, split):
    hidden, weight, targets, options, upstream = head
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]
    main_grad = torch.ones(weight.shape) if accumulate else None
    with pytest.MonkeyPatch.context() as patch:  # chunks of 16 rows, tiles of 5 by 128, casts of 64 weights
        patch.setitem(lm_head.BUFFER_BYTES, "cpu", 4096)
        patch.setitem(lm_head.TILE_ROWS, "cpu", 5)
        patch.setattr(lm_head, "CAST_ELEMENTS", 64)
        if "bias" in options:
            leaves.append(options["bias"].requires_grad_())
        results = linear_logprob(hidden, weight, targets, **options, main_grad=main_grad, split_backward=split)
        backward(results, upstream)

    exact = [in_fp64(leaf).requires_grad_() for leaf in leaves]
    exact_options = {name: in_fp64(value) for name, value in options.items()}
    if "bias" in options:
        exact_options["bias"] = exact[2]
    expected = linear_logprob(*exact[:2], targets, **exact_options)
    backward(expected, [in_fp64(gradient) for gradient in upstream])
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == torch.float32
        close(got, want, EPS[torch.float32])
    for index, (leaf, wide) in enumerate(zip(leaves, exact, strict=True)):
        if index == 1 and accumulate:
            close(main_grad, 1 + wide.grad, EPS[torch.float32])
            assert not split or not leaf.grad.any()
            assert split or leaf.grad is None
        else:
            assert leaf.grad.dtype == leaf.dtype
            close(leaf.grad, wide.grad, EPS[leaf.dtype])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(head=heads(), inplace=st.booleans(), dtype=st.sampled_from(list(EPS)))
def test_any_logits_equal_the_twin_in_fp64(head, inplace, dtype):
    hidden, weight, targets, options, upstream = head
    options.pop("bias", None)
    base = (hidden.float() @ weight.float().t()).to(dtype)
    if base.shape[1] > 1 and not inplace:
        base = base.repeat(1, 2)[:, : base.shape[1]]  # rows further apart than they are long
        base[:, -1] = -math.inf
        targets[targets == base.shape[1] - 1] = 0
        options.pop("keep_mask", None)
    leaf = base.detach().requires_grad_()
    logits, slopes = leaf * 1 if inplace else leaf, []
    logits.register_hook(slopes.append)
    exact = base.detach().double().requires_grad_()
    results = logprob(logits, targets, **options, inplace_backward=inplace)
    backward(results, upstream)
    expected = logprob(exact, targets, **{name: in_fp64(value) for name, value in options.items()})
    backward(expected, [in_fp64(gradient) for gradient in upstream])
    for got, want in zip(results, expected, strict=True):
        close(got, want, EPS[torch.float32])
    assert slopes[0].dtype == dtype
    close(slopes[0], exact.grad, EPS[dtype])
    assert not inplace or slopes[0].data_ptr() == logits.data_ptr() or not logits.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton(interpreted, dtype):
    hidden, weight = torch.randn(2, 3, 8).to(dtype).requires_grad_(), torch.randn(300, 8).to(dtype).requires_grad_()
    targets, upstream = torch.tensor([[0, 299, IGNORE], [7, 8, 9]]), list(torch.randn(3, 2, 3))
    keep = (torch.rand(2, 3, 300) > 0.3).scatter(-1, targets.clamp(min=0)[..., None], True)
    shape = {"temperature": torch.rand(2, 3) + 0.5, "softcap": 4.0, "keep_mask": keep}
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 4e-3}
    interpreted.check(linear_logprob, hidden, weight, targets, upstream=upstream, bias=torch.randn(300), **shape, **tolerance)
    interpreted.check(logprob, (torch.randn(2, 3, 300) * 9).to(dtype).requires_grad_(), targets, upstream=upstream,
                      **shape, **tolerance)  # fmt: skip


@pytest.fixture
def narrow_products(monkeypatch):
    """What CUDA has and a CPU lacks: products that read bf16 or fp16 and write fp32. Chunks of 16 rows, 32 rows wait."""
    monkeypatch.setattr(products, "multiplies_narrow", lambda hidden, weight: hidden.dtype == weight.dtype != torch.float32)
    multiply, add_product_ = products.multiply, products.add_product_
    monkeypatch.setattr(products, "multiply", lambda a, b, out: multiply(a.float(), b.float(), out))
    monkeypatch.setattr(products, "add_product_", lambda total, a, b: add_product_(total, a.float(), b.float()))
    monkeypatch.setitem(lm_head.BUFFER_BYTES, "cpu", 300 * 16 * (4 + 2 * lm_head.HELD_CHUNKS))
    monkeypatch.setitem(lm_head.TILE_ROWS, "cpu", 32)


@pytest.mark.parametrize("ignored", [0, 0.3])
@pytest.mark.parametrize("num_rows", [0, 7, 64, 150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_products(narrow_products, dtype, num_rows, ignored):
    """linear_logprob's tiles and the chunks of gradients computed in the forward, both with dz in the inputs' dtype."""
    hidden, weight = torch.randn(num_rows, 8).to(dtype), torch.randn(300, 8).to(dtype)
    targets = torch.randint(0, 300, (num_rows,)).masked_fill(torch.rand(num_rows) < ignored, IGNORE)
    upstream = torch.randn(3, num_rows)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected = linear_logprob(*exact, targets, temperature=0.7)
    backward(expected, list(upstream.double()))

    rows_of_targets = lm_head.local_targets(targets, IGNORE, 0)
    head = lm_head.LmHead(hidden, weight, None, rows_of_targets, LogitShape(1 / 0.7, None, None), None)
    fused, widths = HeadGradient(head, (True, True, False), None), []
    for rows in head.chunks(rows_of_targets != lm_head.IGNORED):
        logits = head.logits(rows)
        statistics = head.statistics(logits, rows)
        dz = head.gradient_(logits, rows, statistics, *upstream[:, rows])
        assert dz.dtype == dtype
        assert dz.untyped_storage().nbytes() == 300 * 2 * min(32, num_rows), "no more than there are rows"
        widths.append(len(dz))
        fused.add(rows, dz)
    assert len(widths) == -(-int((targets != IGNORE).sum()) // 16)
    in_the_forward = fused.finish()[:2]

    leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]
    results = linear_logprob(*leaves, targets, temperature=0.7)
    backward(results, list(upstream))
    for got, want in zip(results, expected, strict=True):
        close(got, want, EPS[torch.float32])
    for gradients in (in_the_forward, [leaf.grad for leaf in leaves]):
        for got, want in zip(gradients, exact, strict=True):
            assert got.dtype == dtype
            close(got, want.grad, EPS[dtype])


@pytest.fixture
def multiplied(monkeypatch) -> list[tuple[int, int]]:
    """Shape of the left factor of every product of an LM head."""
    shapes = []
    multiply, add_product_ = products.multiply, products.add_product_

    def counted_multiply(a, b, out):
        shapes.append(tuple(a.shape))
        multiply(a, b, out)

    def counted_add_product_(total, a, b):
        shapes.append(tuple(a.shape))
        add_product_(total, a, b)

    monkeypatch.setattr(products, "multiply", counted_multiply)
    monkeypatch.setattr(products, "add_product_", counted_add_product_)
    return shapes


def test_ignored_and_gradientless_rows_cost_nothing_on_a_cpu(multiplied):
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(50, 4)
    targets = torch.full((10,), IGNORE)
    targets[[1, 4, 7]] = torch.tensor([3, 30, 49])
    hidden.data[0] = math.nan  # nobody reads it
    log_p = linear_logprob(hidden, weight, targets).logprob
    assert multiplied == [(3, 4)]
    upstream = torch.randn(10)
    upstream[4], upstream[0] = 0, math.nan
    log_p.backward(upstream)
    assert multiplied[1:] == [(2, 4), (2, 50)]
    assert hidden.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 7]


def test_all_ignored(multiplied):
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    results = linear_logprob(hidden, weight, torch.full((4,), IGNORE))
    torch.autograd.backward(results, [torch.ones(4)] * 3)
    assert multiplied == [] and not torch.stack(results).any() and not hidden.grad.any() and not weight.grad.any()


def test_a_head_keeps_its_buffer_within_its_bytes(monkeypatch):
    """512 x 49152 logits are 100 MB; the buffer of both passes is 4 MB."""
    sizes = []
    make = lm_head.LmHead._buffer

    def watched(self, dtype, rows, columns):
        sizes.append(rows * columns * dtype.itemsize)
        return make(self, dtype, rows, columns)

    monkeypatch.setattr(lm_head.LmHead, "_buffer", watched)
    monkeypatch.setitem(lm_head.BUFFER_BYTES, "cpu", 2**22)
    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(49152, 8, requires_grad=True)
    linear_logprob(hidden, weight, torch.randint(0, 49152, (512,))).logprob.sum().backward()
    assert max(sizes) <= 2**22 and sum(sizes) == 2 * 512 * 49152 * 4


def test_nan_in_a_gradient_reaches_its_row_and_the_weight():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    linear_logprob(hidden, weight, torch.tensor([0, 1, IGNORE])).logprob.backward(torch.tensor([math.nan, 1, 1]))
    assert hidden.grad.isnan().any(1).tolist() == [True, False, False] and weight.grad.isnan().any()


def test_backward_passes_may_wait_for_each_other():
    """As in a pipeline: both forwards before the first backward, which adds to main_grad."""
    hidden, weight, main_grad = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True), torch.zeros(5, 4)
    losses = [linear_logprob(x, weight, torch.tensor([0, 1, 2]), main_grad=main_grad).entropy.sum() for x in hidden]
    for loss in losses:
        loss.backward()
    (wanted,) = torch.autograd.grad(linear_logprob(hidden, weight, torch.tensor([[0, 1, 2]] * 2)).entropy.sum(), weight)
    torch.testing.assert_close(main_grad, wanted)
