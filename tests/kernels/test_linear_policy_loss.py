"""`linear_policy_loss` against `policy_loss` of `linear_logprob`, in fp32 where the gradients are made in the forward."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import (
    METRIC_FIELDS,
    LossSpec,
    linear_policy_loss,
    native,
    sequence_stats,
    summarize_metrics,
)
from strop.kernels.lm_head import LmHead, row_pieces

pytestmark = pytest.mark.skipif(native.library("cpu") is None, reason=f"only composed here: {native.why_missing('cpu')}")

SPECS = [
    LossSpec(),
    LossSpec(clip_low=0.2, clip_high=0.28, aggregation="token-mean", entropy_coef=0.2),
    LossSpec(dual_clip=3.0, kl_coef=0.1, aggregation="sequence-sum"),
    LossSpec(delta=1.5, kl_coef=0.1, kl_estimator="k2", aggregation="constant"),
    LossSpec(policy="cispo", clip_low=0.2, clip_high=0.3, kl_coef=0.1, kl_gradient="unbiased"),
    LossSpec(policy="cispo", cispo_bound="ratio", clip_high=1.2, entropy_coef=0.1),
    LossSpec(policy="sapo", kl_coef=0.1, kl_gradient="straight-through"),
    LossSpec(policy="reinforce", kl_coef=0.1, kl_estimator="k1", kl_gradient="straight-through"),
    LossSpec(log_ratio_limit=0.3, correction="tis", correction_high=1.1),
    LossSpec(correction="icepop", correction_low=0.8, correction_high=1.2, entropy_coef=0.2),
]
SEQUENCE_CORRECTIONS = [
    LossSpec(correction="mean-mask", correction_low=0.9, correction_high=1.1),
    LossSpec(correction="sequence-truncate", correction_high=1.1, aggregation="token-mean"),
    LossSpec(correction="sequence-mask", correction_low=0.5, correction_high=1.5, entropy_coef=0.2),
]
WHOLE_SEQUENCES = [
    LossSpec(policy="gspo", clip_low=0.05, clip_high=0.05),
    LossSpec(policy="gspo-token", clip_low=0.05, clip_high=0.05, kl_coef=0.1),
    LossSpec(policy="gmpo", entropy_coef=0.1),
    LossSpec(policy="vespo"),
    LossSpec(opsm_delta=0.1),
]
NAMES = {"ids": lambda spec: f"{spec.policy}-{spec.correction}-{spec.aggregation}"}
CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # sums of up to 300 fp32 terms of order 1, in another order


def fused_calls(monkeypatch) -> list[str]:
    """Grows by one with every gradient computed in the forward."""
    calls, add = [], LmHead.gradient_

    def counted(self, *arguments):
        calls.append("chunk")
        return add(self, *arguments)

    monkeypatch.setattr(LmHead, "gradient_", counted)
    return calls


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """3 tokens a chunk: their borders fall inside sequences."""
    monkeypatch.setattr(LmHead, "chunks", lambda head, live: row_pieces(live, 3))


@pytest.mark.parametrize("spec", SPECS + SEQUENCE_CORRECTIONS, **NAMES)
def test_equals_the_composition(make_case, monkeypatch, spec):
    fused = fused_calls(monkeypatch)
    make_case().run(spec)
    assert len(fused) == 4, "11 tokens inside the mask, 3 a chunk"
    make_case().check(spec)


@pytest.mark.parametrize("spec", SPECS[:2] + SPECS[8:], **NAMES)
def test_on_policy_needs_no_old_logprob(make_case, monkeypatch, spec):
    fused = fused_calls(monkeypatch)
    make_case().run(spec, old_logprob=None)
    assert fused
    make_case().check(spec, old_logprob=None)


@pytest.mark.parametrize("spec", WHOLE_SEQUENCES, **NAMES)
def test_specs_that_need_all_log_probs_recompute(make_case, monkeypatch, spec):
    fused = fused_calls(monkeypatch)
    case = make_case()
    case.run(spec)
    assert not fused
    case.check(spec)


@pytest.mark.parametrize("spec", SEQUENCE_CORRECTIONS, **NAMES)
def test_sequence_corrections_without_old_logprob_recompute(make_case, monkeypatch, spec):
    fused = fused_calls(monkeypatch)
    case = make_case()
    case.run(spec, old_logprob=None)
    assert not fused
    case.check(spec, old_logprob=None)


@pytest.mark.parametrize("spec", WHOLE_SEQUENCES + SEQUENCE_CORRECTIONS + SPECS[:1], **NAMES)
def test_given_sequence_stats_every_spec_is_fused(make_case, monkeypatch, spec):
    """As under context parallelism, where the statistics are summed over the ranks before the loss."""
    case = make_case()
    logprob = case.composed(spec)[1]
    needed = {name: case.tokens[name] for name in ("old_logprob", "advantages", "rollout_logprob")}
    stats = sequence_stats(logprob, mask=case.mask, spec=spec, cu_seqlens=case.cu_seqlens, **needed)
    fused = fused_calls(monkeypatch)
    case.run(spec, sequence_stats=2 * stats)
    assert fused
    case.check(spec, sequence_stats=2 * stats)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spec=st.sampled_from(SPECS + SEQUENCE_CORRECTIONS),
    lengths=st.lists(st.integers(0, 7), max_size=5), padding=st.integers(0, 4),
    vocab=st.sampled_from([1, 2, 7, 129]), mask_share=st.sampled_from([0, 0.5, 1]), seed=st.integers(0, 10**6),
    rows=st.sampled_from([1, 3, 64]), with_old=st.booleans(), temperature=st.sampled_from([1.0, 0.6, None]),
    softcap=st.sampled_from([None, 2.0]), keep=st.booleans(), upstream=st.sampled_from([1.0, -3.0]),
)  # fmt: skip
def test_any_batch(
    make_case, spec, lengths, padding, vocab, mask_share, seed, rows, with_old, temperature, softcap, keep, upstream
):  # fmt: skip
    """N = 1, empty batches and sequences, all masked, a vocabulary of one token, any border of chunks."""
    case = make_case(lengths, padding, vocab=vocab, mask_share=mask_share, seed=seed)
    per_token = torch.rand(len(case.mask)) + 0.5
    case.options |= {"temperature": per_token if temperature is None else temperature, "softcap": softcap}
    if keep:
        kept = torch.rand(len(case.mask), vocab) > 0.5
        inside = (case.targets >= 0) & (case.targets < vocab)
        kept[torch.arange(len(kept))[inside], case.targets[inside]] = True
        case.options["keep_mask"] = kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LmHead, "chunks", lambda head, live: row_pieces(live, rows))
        case.check(spec, upstream, **({} if with_old else {"old_logprob": None}))


@pytest.mark.parametrize("mask_share", [0.7, 1])
def test_any_strides(make_case, mask_share):
    """Every second element, columns of a matrix and one number for all tokens, whether chunks are slices or indices."""
    case = make_case(padding=0, mask_share=mask_share)
    assert bool(case.mask.all()) == (mask_share == 1)
    spec = LossSpec(policy="gspo-token", kl_coef=0.1, correction="tis", entropy_coef=0.2)
    case.tokens["advantages"] = torch.full((len(case.mask),), -0.7)
    logprob, tokens = case.composed(SPECS[0])[1], case.tokens
    stats = sequence_stats(
        logprob, tokens["old_logprob"], tokens["advantages"], case.mask, spec, rollout_logprob=tokens["rollout_logprob"],
        cu_seqlens=case.cu_seqlens,
    )  # fmt: skip
    want = case.run(spec, sequence_stats=stats)
    want_gradients = torch.autograd.grad(want.loss, case.leaves)

    def spread(tensor):
        apart = torch.stack([tensor, torch.full_like(tensor, 1)], -1)[..., 0]
        assert not apart.is_contiguous()
        return apart

    strided = {name: spread(tensor) for name, tensor in tokens.items()}
    for name in ("mask", "targets", "cu_seqlens"):
        strided[name] = spread(getattr(case, name))
    one_number = {"advantages": torch.tensor(-0.7).expand(len(case.mask))}
    for changes in (strided, one_number, {"sequence_stats": spread(stats)}, {"sequence_stats": stats.t().contiguous().t()}):
        got = case.run(spec, **{"sequence_stats": stats} | changes)
        torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(got.loss, case.leaves), want_gradients, rtol=0, atol=0)


def test_dense_batches_are_rows_of_sequences(make_case):
    """[B, L] as packed tokens with boundaries every L."""
    case = make_case(lengths=(6, 6, 6), padding=0)
    spec = LossSpec(entropy_coef=0.2, kl_coef=0.1)
    loss, logprob, metrics = case.run(spec)
    dense = {name: tensor.view(3, 6) for name, tensor in case.tokens.items()}
    for name in ("hidden", "targets", "mask"):
        dense[name] = getattr(case, name).view(3, 6, *getattr(case, name).shape[1:])
    rows = case.run(spec, **dense, cu_seqlens=None)
    torch.testing.assert_close((rows.loss, rows.logprob.flatten(), rows.metrics), (loss, logprob, metrics))
    got, want = (torch.autograd.grad(value, case.leaves) for value in (rows.loss, loss))
    torch.testing.assert_close(got, want)


def test_metrics_without_boundaries_count_no_sequences(make_case):
    spec = LossSpec(aggregation="token-mean")
    case = make_case(lengths=(20,), padding=0)
    outputs, expected = case.run(spec, cu_seqlens=None), case.composed(spec, cu_seqlens=None)
    torch.testing.assert_close(outputs.metrics, expected[2], **CLOSE)
    assert summarize_metrics(outputs.metrics)["sequences"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_accumulate_in_fp32(make_case, dtype):
    """Against fp64 over the same rounded inputs: what differs is the rounding of the results."""
    case = make_case(lengths=(30, 20), hidden_size=16, vocab=130, dtype=dtype)
    spec = LossSpec(entropy_coef=0.2, kl_coef=0.1)
    loss, logprob, _ = case.run(spec)
    gradients = torch.autograd.grad(loss, case.leaves)
    exact = make_case(lengths=(30, 20), hidden_size=16, vocab=130, dtype=dtype)
    exact.hidden, exact.weight, exact.bias = (leaf.detach().double().requires_grad_() for leaf in case.leaves)
    exact.options["bias"] = exact.bias
    exact_loss, exact_logprob, _ = exact.run(spec)
    torch.testing.assert_close(loss.double(), exact_loss, **CLOSE)
    torch.testing.assert_close(logprob.double(), exact_logprob, **CLOSE)
    for got, want in zip(gradients, torch.autograd.grad(exact_loss, exact.leaves), strict=True):
        assert got.dtype == dtype and (got.double() - want).norm() <= torch.finfo(dtype).eps * want.norm()


def test_fp64_and_the_reference_are_composed(make_case, monkeypatch):
    case = make_case()
    exact = {name: getattr(case, name).detach().double().requires_grad_() for name in ("hidden", "weight", "bias")}
    fused = fused_calls(monkeypatch)
    assert case.run(LossSpec(), **exact).loss.dtype == torch.float64
    monkeypatch.setenv("STROP_KERNELS", "reference")
    case.check(SPECS[1])
    assert not fused


def test_without_a_gradient_nothing_is_computed_for_one(make_case, monkeypatch):
    case, fused = make_case(), fused_calls(monkeypatch)
    with torch.no_grad():
        outputs = case.run(LossSpec(), main_grad=torch.zeros_like(case.weight))
    assert not fused and not outputs.loss.requires_grad
    torch.testing.assert_close(tuple(outputs), tuple(t.detach() for t in case.composed(LossSpec())), **CLOSE)
    for leaf in case.leaves:
        leaf.requires_grad_(False)
    assert not case.run(LossSpec()).loss.requires_grad and not fused


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(make_case, trained):
    case = make_case()
    wanted = dict(zip(("hidden", "weight", "bias"), torch.autograd.grad(case.composed(SPECS[1])[0], case.leaves), strict=True))
    for name in wanted:
        getattr(case, name).requires_grad_(name == trained)
    case.run(SPECS[1]).loss.backward()
    torch.testing.assert_close(getattr(case, trained).grad, wanted[trained], **CLOSE)


@pytest.mark.parametrize("world", [2, 4])
def test_vocabulary_parallel_equals_one_rank(make_case, run_ranks, world):
    """Uneven shards, one of a single token; sequences cut by chunk borders; the same result on every rank."""
    edges = {2: [0, 1, 40], 4: [0, 13, 14, 33, 40]}[world]
    case, spec = make_case(), SPECS[1]
    kept = torch.rand(len(case.mask), 40, generator=torch.Generator().manual_seed(0)) > 0.3
    inside = case.mask & (case.targets < 40)
    kept[torch.arange(len(kept))[inside], case.targets[inside]] = True
    case.options |= {"temperature": 0.7, "softcap": 3.0, "keep_mask": kept}
    outputs = case.run(spec)
    gradients = torch.autograd.grad(outputs.loss, case.leaves)

    def rank_main():
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        rows = slice(edges[rank], edges[rank + 1])
        weight, bias = (leaf.detach()[rows].clone().requires_grad_() for leaf in (case.weight, case.bias))
        main_grad = torch.zeros_like(weight)
        found = case.run(
            spec, weight=weight, bias=bias, keep_mask=kept[:, rows], tp_group=dist.group.WORLD,
            vocab_range=(rows.start, rows.stop), main_grad=main_grad,
        )  # fmt: skip
        d_hidden, d_bias = torch.autograd.grad(found.loss, (case.hidden, bias))
        return [t.detach() for t in found], d_hidden, main_grad, d_bias

    for rank, (found, d_hidden, d_weight, d_bias) in enumerate(run_ranks(world, rank_main)):
        rows = slice(edges[rank], edges[rank + 1])
        wanted = (*outputs, gradients[0], gradients[1][rows], gradients[2][rows])
        for got, want in zip((*found, d_hidden, d_weight, d_bias), wanted, strict=True):
            torch.testing.assert_close(got, want.detach(), **CLOSE)


def test_triton(make_case, interpreted):
    """Both Triton kernels of the fused form, in one chunk of the size that a GPU takes."""
    case, spec = make_case(lengths=(5, 4)), LossSpec(entropy_coef=0.2, kl_coef=0.1, correction="tis")
    names = ("old_logprob", "advantages")
    interpreted.check(
        linear_policy_loss, *case.leaves[:2], case.targets, *(case.tokens[name] for name in names), case.mask, spec,
        ref_logprob=case.tokens["ref_logprob"], rollout_logprob=case.tokens["rollout_logprob"], cu_seqlens=case.cu_seqlens,
        denominator=3.0, upstream=[torch.tensor(-2.0)], **CLOSE,
    )  # fmt: skip


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[8], WHOLE_SEQUENCES[0]], **NAMES)
def test_a_target_to_ignore_is_outside_the_mask(make_case, spec):
    """In the fused form and in the two ops: neither its loss nor its count."""
    case = make_case()
    chosen = case.mask.nonzero()[:2, 0]
    targets, mask = case.targets.index_fill(0, chosen, -7), case.mask.index_fill(0, chosen, False)
    got, want = case.run(spec, targets=targets, ignore_index=-7), case.run(spec, mask=mask)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(r.loss, case.leaves) for r in (got, want)), rtol=0, atol=0)
    assert not got.logprob[chosen].any()


def test_nothing_trainable_may_be_counted_by_the_denominator(make_case):
    case = make_case(mask_share=0)
    for spec in (SPECS[1], WHOLE_SEQUENCES[0]):
        outputs = case.run(spec, denominator=torch.tensor(0))
        assert outputs.loss == 0 and not any(g.any() for g in torch.autograd.grad(outputs.loss, case.leaves))


def test_metrics_are_those_of_one_call(make_case):
    """Sums, minima, maxima and the count of sequences, none of which knows of chunks."""
    case = make_case(lengths=(9, 8, 0, 7), padding=2)
    spec = replace(SPECS[8], entropy_coef=0.1, kl_coef=0.1)
    got, want = case.run(spec).metrics, case.composed(spec)[2]
    for slot, (name, _) in enumerate(METRIC_FIELDS):
        torch.testing.assert_close(got[slot], want[slot], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    assert summarize_metrics(got)["sequences"] == 3
