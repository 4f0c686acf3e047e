"""`linear_policy_loss` against `policy_loss` of `linear_logprob`, in fp32 where the gradients are made in the forward."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from strop.kernels import (
    METRIC_FIELDS,
    LossSpec,
    linear_logprob,
    linear_policy_loss,
    native,
    policy_loss,
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


class Case:
    """Inputs of one call: some sequences empty, some fully masked; padding and tokens outside the mask hold garbage."""

    def __init__(
        self, lengths=(5, 0, 7, 1, 4), padding=3, hidden_size=6, vocab=40, seed=0, mask_share=0.7, dtype=torch.float32
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return scale * torch.randn(*shape, generator=generator)

        total = sum(lengths) + padding
        self.hidden = normal(total, hidden_size).to(dtype).requires_grad_()
        self.weight = normal(vocab, hidden_size).to(dtype).requires_grad_()
        self.bias = normal(vocab).to(dtype).requires_grad_()
        self.targets = torch.randint(0, vocab, (total,), generator=generator)
        self.cu_seqlens = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])
        self.mask = torch.rand(total, generator=generator) < mask_share
        with torch.no_grad():
            scored = linear_logprob(self.hidden, self.weight, self.targets, bias=self.bias).logprob
        self.tokens = {
            "old_logprob": scored + normal(total, scale=0.3), "advantages": normal(total),
            "ref_logprob": scored + normal(total, scale=0.3), "rollout_logprob": scored + normal(total, scale=0.3),
        }  # fmt: skip
        for tensor in self.tokens.values():
            tensor[~self.mask] = math.nan
        self.targets[~self.mask] = -7
        self.mask[sum(lengths) :] = True  # padding: outside every sequence, whatever its mask says
        self.targets[sum(lengths) :] = 10**9
        self.options = {"bias": self.bias}

    @property
    def leaves(self):
        return self.hidden, self.weight, self.bias

    def run(self, spec, **changes):
        given = {
            "hidden": self.hidden, "weight": self.weight, "targets": self.targets, "mask": self.mask, "spec": spec,
            "cu_seqlens": self.cu_seqlens, "denominator": 3.0, **self.tokens, **self.options,
        }  # fmt: skip
        return linear_policy_loss(**given | changes)

    def composed(self, spec, **changes):
        """(loss, log-probs, metrics) of the two ops, each called as its documentation says."""
        inside = self.mask & (torch.arange(len(self.mask)) < self.cu_seqlens[-1])
        scores = linear_logprob(self.hidden, self.weight, self.targets.masked_fill(~inside, -100), **self.options)
        given = {**self.tokens, "cu_seqlens": self.cu_seqlens, "denominator": 3.0} | changes
        loss, metrics = policy_loss(scores.logprob, mask=self.mask, spec=spec, entropy=scores.entropy, **given)
        return loss, scores.logprob.detach(), metrics

    def check(self, spec, upstream=1.0, **changes):
        """Assert that the fused form gives the composition's loss, log-probs, metrics and gradients."""
        outputs, expected = self.run(spec, **changes), self.composed(spec, **changes)
        for got, want in zip(outputs, expected, strict=True):
            torch.testing.assert_close(got, want, **CLOSE)
        got, want = (torch.autograd.grad(r[0] * upstream, self.leaves) for r in (outputs, expected))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("spec", SPECS + SEQUENCE_CORRECTIONS, **NAMES)
def test_equals_the_composition(monkeypatch, spec):
    fused = fused_calls(monkeypatch)
    Case().run(spec)
    assert len(fused) == 4, "11 tokens inside the mask, 3 a chunk"
    Case().check(spec)


@pytest.mark.parametrize("spec", SPECS[:2] + SPECS[8:], **NAMES)
def test_on_policy_needs_no_old_logprob(monkeypatch, spec):
    fused = fused_calls(monkeypatch)
    Case().run(spec, old_logprob=None)
    assert fused
    Case().check(spec, old_logprob=None)


@pytest.mark.parametrize("spec", WHOLE_SEQUENCES, **NAMES)
def test_specs_that_need_all_log_probs_recompute(monkeypatch, spec):
    fused = fused_calls(monkeypatch)
    case = Case()
    case.run(spec)
    assert not fused
    case.check(spec)


@pytest.mark.parametrize("spec", SEQUENCE_CORRECTIONS, **NAMES)
def test_sequence_corrections_without_old_logprob_recompute(monkeypatch, spec):
    fused = fused_calls(monkeypatch)
    case = Case()
    case.run(spec, old_logprob=None)
    assert not fused
    case.check(spec, old_logprob=None)


@pytest.mark.parametrize("spec", WHOLE_SEQUENCES + SEQUENCE_CORRECTIONS + SPECS[:1], **NAMES)
def test_given_sequence_stats_every_spec_is_fused(monkeypatch, spec):
    """As under context parallelism, where the statistics are summed over the ranks before the loss."""
    case = Case()
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
def test_any_batch(spec, lengths, padding, vocab, mask_share, seed, rows, with_old, temperature, softcap, keep, upstream):
    """N = 1, empty batches and sequences, all masked, a vocabulary of one token, any border of chunks."""
    case = Case(lengths, padding, vocab=vocab, mask_share=mask_share, seed=seed)
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
def test_any_strides(mask_share):
    """Every second element, columns of a matrix and one number for all tokens, whether chunks are slices or indices."""
    case = Case(padding=0, mask_share=mask_share)
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


def test_dense_batches_are_rows_of_sequences():
    """[B, L] as packed tokens with boundaries every L."""
    case = Case(lengths=(6, 6, 6), padding=0)
    spec = LossSpec(entropy_coef=0.2, kl_coef=0.1)
    loss, logprob, metrics = case.run(spec)
    dense = {name: tensor.view(3, 6) for name, tensor in case.tokens.items()}
    for name in ("hidden", "targets", "mask"):
        dense[name] = getattr(case, name).view(3, 6, *getattr(case, name).shape[1:])
    rows = case.run(spec, **dense, cu_seqlens=None)
    torch.testing.assert_close((rows.loss, rows.logprob.flatten(), rows.metrics), (loss, logprob, metrics))
    got, want = (torch.autograd.grad(value, case.leaves) for value in (rows.loss, loss))
    torch.testing.assert_close(got, want)


def test_metrics_without_boundaries_count_no_sequences():
    spec = LossSpec(aggregation="token-mean")
    case = Case(lengths=(20,), padding=0)
    outputs, expected = case.run(spec, cu_seqlens=None), case.composed(spec, cu_seqlens=None)
    torch.testing.assert_close(outputs.metrics, expected[2], **CLOSE)
    assert summarize_metrics(outputs.metrics)["sequences"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_accumulate_in_fp32(dtype):
    """Against fp64 over the same rounded inputs: what differs is the rounding of the results."""
    case = Case(lengths=(30, 20), hidden_size=16, vocab=130, dtype=dtype)
    spec = LossSpec(entropy_coef=0.2, kl_coef=0.1)
    loss, logprob, _ = case.run(spec)
    gradients = torch.autograd.grad(loss, case.leaves)
    exact = Case(lengths=(30, 20), hidden_size=16, vocab=130, dtype=dtype)
    exact.hidden, exact.weight, exact.bias = (leaf.detach().double().requires_grad_() for leaf in case.leaves)
    exact.options["bias"] = exact.bias
    exact_loss, exact_logprob, _ = exact.run(spec)
    torch.testing.assert_close(loss.double(), exact_loss, **CLOSE)
    torch.testing.assert_close(logprob.double(), exact_logprob, **CLOSE)
    for got, want in zip(gradients, torch.autograd.grad(exact_loss, exact.leaves), strict=True):
        assert got.dtype == dtype and (got.double() - want).norm() <= torch.finfo(dtype).eps * want.norm()


def test_fp64_and_the_reference_are_composed(monkeypatch):
    case = Case()
    exact = {name: getattr(case, name).detach().double().requires_grad_() for name in ("hidden", "weight", "bias")}
    fused = fused_calls(monkeypatch)
    assert case.run(LossSpec(), **exact).loss.dtype == torch.float64
    monkeypatch.setenv("STROP_KERNELS", "reference")
    case.check(SPECS[1])
    assert not fused


def test_without_a_gradient_nothing_is_computed_for_one(monkeypatch):
    case, fused = Case(), fused_calls(monkeypatch)
    with torch.no_grad():
        outputs = case.run(LossSpec(), main_grad=torch.zeros_like(case.weight))
    assert not fused and not outputs.loss.requires_grad
    torch.testing.assert_close(tuple(outputs), tuple(t.detach() for t in case.composed(LossSpec())), **CLOSE)
    for leaf in case.leaves:
        leaf.requires_grad_(False)
    assert not case.run(LossSpec()).loss.requires_grad and not fused


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained):
    case = Case()
    wanted = dict(zip(("hidden", "weight", "bias"), torch.autograd.grad(case.composed(SPECS[1])[0], case.leaves), strict=True))
    for name in wanted:
        getattr(case, name).requires_grad_(name == trained)
    case.run(SPECS[1]).loss.backward()
    torch.testing.assert_close(getattr(case, trained).grad, wanted[trained], **CLOSE)


def test_main_grad_takes_the_weights_gradient_in_the_forward():
    case, main_grad = Case(dtype=torch.bfloat16), torch.ones(40, 6)
    expected = torch.autograd.grad(case.composed(SPECS[1])[0], case.leaves)
    for _ in range(2):
        loss = case.run(SPECS[1], main_grad=main_grad, loss_scale=0.5).loss
        before = main_grad.clone()
        (loss * 0.5).backward()
        assert torch.equal(main_grad, before)
    assert case.weight.grad is None
    torch.testing.assert_close(case.hidden.grad, expected[0], rtol=2e-2, atol=1e-3)  # bf16, halves added up
    assert (main_grad - 1 - expected[1].float()).norm() <= 4e-3 * expected[1].float().norm()


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("weight",), ("weight", "bias")])
def test_main_grad_wants_the_announced_loss_scale(trained):
    case = Case()
    for name in ("hidden", "weight", "bias"):
        getattr(case, name).requires_grad_(name in trained)
    keywords = {"main_grad": torch.zeros(40, 6), "loss_scale": 8.0}
    with pytest.raises(ValueError, match=r"upstream gradient is 1.0 other than loss_scale 8.0, by which main_grad was scaled"):
        case.run(LossSpec(), **keywords).loss.backward()
    (case.run(LossSpec(), **keywords).loss * 8).backward()
    (case.run(LossSpec(), **keywords | {"loss_scale": torch.tensor(1 / 3)}).loss / 3).backward()
    assert case.weight.grad is None


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**-4, 3.0, torch.tensor(7.0)])
def test_loss_scale_without_main_grad_changes_nothing(loss_scale):
    case = Case()
    loss = case.run(SPECS[1], loss_scale=loss_scale).loss
    want = torch.autograd.grad(case.composed(SPECS[1])[0], case.leaves)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss, case.leaves, retain_graph=True), want, **CLOSE)


def test_recomputing_adds_to_main_grad_in_backward():
    case, main_grad = Case(), torch.zeros(40, 6)
    loss = case.run(WHOLE_SEQUENCES[0], main_grad=main_grad).loss
    assert not main_grad.any()
    (loss * 2).backward()
    expected = torch.autograd.grad(case.composed(WHOLE_SEQUENCES[0])[0], case.weight)[0]
    torch.testing.assert_close(main_grad, 2 * expected, **CLOSE)


@pytest.mark.parametrize("spec", [SPECS[1], WHOLE_SEQUENCES[0]], **NAMES)
@pytest.mark.parametrize("with_main_grad", [True, False])
def test_pipeline_schedules_may_split_the_backward(spec, with_main_grad):
    """What zero-bubble schedules call: first the gradient of the stage's input, later that of its weights."""
    case = Case()
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


def test_each_tensor_has_a_node_of_its_own():
    case = Case()
    nodes, names = [case.run(LossSpec()).loss.grad_fn], []
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert names.count("strop_stored_gradientBackward") == 3


def test_saves_the_gradients_and_nothing_else():
    case, saved = Case(hidden_size=30, vocab=50), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.run(LossSpec())
    assert sorted(tuple(t.shape) for t in saved if t.dim()) == sorted(tuple(t.shape) for t in case.leaves)


@pytest.mark.parametrize("world", [2, 4])
def test_vocabulary_parallel_equals_one_rank(run_ranks, world):
    """Uneven shards, one of a single token; sequences cut by chunk borders; the same result on every rank."""
    edges = {2: [0, 1, 40], 4: [0, 13, 14, 33, 40]}[world]
    case, spec = Case(), SPECS[1]
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


@pytest.mark.parametrize("spec", [SPECS[1], WHOLE_SEQUENCES[0]], **NAMES)
@pytest.mark.parametrize("with_main_grad", [True, False])
def test_compiles(spec, with_main_grad):
    case = Case()
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
    if with_main_grad and spec is SPECS[1]:
        with pytest.raises(RuntimeError, match="upstream gradient is a value other than loss_scale"):
            compiled(*case.leaves, main_grad).loss.mul(2).backward()


def test_triton(interpreted):
    """Both Triton kernels of the fused form, in one chunk of the size that a GPU takes."""
    case, spec = Case(lengths=(5, 4)), LossSpec(entropy_coef=0.2, kl_coef=0.1, correction="tis")
    names = ("old_logprob", "advantages")
    interpreted.check(
        linear_policy_loss, *case.leaves[:2], case.targets, *(case.tokens[name] for name in names), case.mask, spec,
        ref_logprob=case.tokens["ref_logprob"], rollout_logprob=case.tokens["rollout_logprob"], cu_seqlens=case.cu_seqlens,
        denominator=3.0, upstream=[torch.tensor(-2.0)], **CLOSE,
    )  # fmt: skip


def test_double_backward_is_refused():
    case = Case()
    with pytest.raises(RuntimeError, match="linear_policy_loss: a double backward isn't supported"):
        torch.autograd.grad(case.run(LossSpec()).loss, case.hidden, create_graph=True)


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[8], WHOLE_SEQUENCES[0]], **NAMES)
def test_a_target_to_ignore_is_outside_the_mask(spec):
    """In the fused form and in the two ops: neither its loss nor its count."""
    case = Case()
    chosen = case.mask.nonzero()[:2, 0]
    targets, mask = case.targets.index_fill(0, chosen, -7), case.mask.index_fill(0, chosen, False)
    got, want = case.run(spec, targets=targets, ignore_index=-7), case.run(spec, mask=mask)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(r.loss, case.leaves) for r in (got, want)), rtol=0, atol=0)
    assert not got.logprob[chosen].any()


def test_nothing_trainable_may_be_counted_by_the_denominator():
    case = Case(mask_share=0)
    for spec in (SPECS[1], WHOLE_SEQUENCES[0]):
        outputs = case.run(spec, denominator=torch.tensor(0))
        assert outputs.loss == 0 and not any(g.any() for g in torch.autograd.grad(outputs.loss, case.leaves))


def test_metrics_are_those_of_one_call():
    """Sums, minima, maxima and the count of sequences, none of which knows of chunks."""
    case = Case(lengths=(9, 8, 0, 7), padding=2)
    spec = replace(SPECS[8], entropy_coef=0.1, kl_coef=0.1)
    got, want = case.run(spec).metrics, case.composed(spec)[2]
    for slot, (name, _) in enumerate(METRIC_FIELDS):
        torch.testing.assert_close(got[slot], want[slot], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    assert summarize_metrics(got)["sequences"] == 3
