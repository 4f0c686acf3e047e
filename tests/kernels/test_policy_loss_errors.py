"""Every argument that the policy losses, their metrics and group_advantage refuse, by name, value and alternative."""

import math

import pytest
import torch

from strop.kernels import (
    METRIC_FIELDS,
    AdvantageSpec,
    LossSpec,
    combine_metrics,
    group_advantage,
    linear_policy_loss,
    policy_loss,
    sequence_stats,
    summarize_metrics,
)

LP, MASK, ENDS = torch.zeros(4), torch.ones(4, dtype=torch.bool), torch.tensor([0, 2, 4])
HIDDEN, WEIGHT, TARGETS = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 3])
META = torch.zeros(4, device="meta")
DENSE = {name: torch.zeros(2, 2) for name in ("old_logprob", "advantages")} | {"mask": MASK.view(2, 2)}

OF_BOTH = [
    (TypeError, "spec is 'clip', a str: pass a strop.kernels.LossSpec", {"spec": "clip"}),
    (TypeError, "spec is None", {"spec": None}),
    (TypeError, "mask has dtype torch.int64, expected torch.bool", {"mask": MASK.long()}),
    (ValueError, r"mask has shape \(3,\), expected \(4,\): pass one", {"mask": MASK[:3]}),
    (TypeError, "advantages is a NoneType", {"advantages": None}),
    (ValueError, r"advantages has shape \(2,\), expected \(4,\): .*repeat_interleave", {"advantages": LP[:2]}),
    (ValueError, "old_logprob is on meta", {"old_logprob": META}),
    (ValueError, "denominator 0: must be above 0 and finite; pass the step's count of sequences", {"denominator": 0}),
    (ValueError, "denominator -1: must be above 0", {"denominator": -1}),
    (ValueError, "denominator inf: must be above 0 and finite", {"denominator": math.inf}),
    (TypeError, "denominator is a NoneType: pass the step's count", {"denominator": None}),
    (TypeError, "denominator is a str", {"denominator": "2"}),
    (ValueError, r"denominator has shape \(1,\), expected \(\): .*0-dim", {"denominator": torch.ones(1)}),
    (ValueError, "denominator holds -3.0: must be above 0", {"denominator": torch.tensor(-3.0)}),
    (ValueError, "denominator holds 0: must be above 0", {"denominator": torch.tensor(0)}),
    (ValueError, "denominator holds nan", {"denominator": torch.tensor(math.nan)}),
    (ValueError, "denominator holds inf", {"denominator": torch.tensor(math.inf)}),
    (TypeError, "denominator has dtype torch.bool", {"denominator": torch.tensor(True)}),
    (ValueError, "pass cu_seqlens, or dense", {"cu_seqlens": None}),
    (TypeError, "cu_seqlens has dtype torch.float32", {"cu_seqlens": ENDS.float()}),
    (TypeError, "cu_seqlens is a list", {"cu_seqlens": [0, 2, 4]}),
    (ValueError, r"cu_seqlens has shape \(\), expected \[S \+ 1\]: pass 0 and the running", {"cu_seqlens": ENDS[0]}),
    (ValueError, r"cu_seqlens\[0\] is 2, but the first sequence starts at token 0: begin with 0",
     {"cu_seqlens": torch.tensor([2, 3, 4])}),
    (ValueError, r"cu_seqlens\[0\] is -1", {"cu_seqlens": torch.tensor([-1, 4])}),
    (ValueError, r"cu_seqlens\[2\] is 1, but below cu_seqlens\[1\] = 3: pass the running sums",
     {"cu_seqlens": torch.tensor([0, 3, 1, 4])}),
    (ValueError, r"cu_seqlens\[2\] is 9, but there are only 4 tokens", {"cu_seqlens": torch.tensor([0, 3, 9]).int()}),
    (ValueError, "kl_coef 0.1 needs ref_logprob", {"spec": LossSpec(kl_coef=0.1)}),
    (ValueError, "correction 'tis' needs rollout_logprob", {"spec": LossSpec(correction="tis")}),
    (ValueError, "opsm_delta 0.1 needs rollout_logprob", {"spec": LossSpec(opsm_delta=0.1)}),
    (ValueError, r"sequence_stats has shape \(1, 6\), expected \(2, 6\): .* same cu_seqlens",
     {"sequence_stats": torch.zeros(1, 6)}),
    (ValueError, "sequence_stats is given without cu_seqlens",
     {"sequence_stats": torch.zeros(1, 6), "cu_seqlens": None, "spec": LossSpec(aggregation="token-mean")}),
]  # fmt: skip
OF_THE_LOSS = [
    (TypeError, "logprob has dtype torch.bfloat16, expected torch.float32 or torch.float64", {"logprob": LP.bfloat16()}),
    (TypeError, "logprob is a NoneType", {"logprob": None}),
    (ValueError, r"logprob has shape \(\): pass packed", {"logprob": LP[0]}),
    (ValueError, "entropy_coef 0.1 needs entropy", {"spec": LossSpec(entropy_coef=0.1)}),
    (ValueError, "cu_seqlens goes with packed", DENSE | {"logprob": torch.zeros(2, 2)}),
    (ValueError, r"advantages has shape \(2,\), expected \(2, 2\): .*expand \[B, 1\]",
     DENSE | {"logprob": torch.zeros(2, 2), "advantages": LP[:2], "cu_seqlens": None}),
]  # fmt: skip
OF_THE_HEAD = [
    (ValueError, "loss_scale 0: must be above 0 and finite; pass what the loss is multiplied with", {"loss_scale": 0}),
    (ValueError, "loss_scale inf", {"loss_scale": math.inf}),
    (TypeError, "loss_scale is a NoneType: pass", {"loss_scale": None}),
    (ValueError, r"loss_scale has shape \(1,\), expected \(\): pass", {"loss_scale": torch.ones(1)}),
    (ValueError, "loss_scale holds 0.0: must be above 0", {"loss_scale": torch.tensor(0.0)}),
    (ValueError, "loss_scale holds nan", {"loss_scale": torch.tensor(math.nan)}),
    (TypeError, "main_grad has dtype torch.bfloat16", {"main_grad": torch.zeros(5, 3, dtype=torch.bfloat16)}),
    (TypeError, "targets has dtype torch.int32", {"targets": TARGETS.int()}),
    (ValueError, r"targets has shape \(3,\), expected \(4,\): pass one id for each row", {
        "targets": TARGETS[:3], "mask": MASK[:3], "old_logprob": None, "advantages": LP[:3],
        "cu_seqlens": torch.tensor([0, 3]),
    }),
    (TypeError, "hidden has dtype torch.int64", {"hidden": TARGETS}),
    (ValueError, "targets holds 5, not in 0..4", {"targets": TARGETS + 2}),
    (ValueError, r"hidden \(4, 3\) and weight \(3, 5\) don't fit", {"weight": WEIGHT.t()}),
    (TypeError, "temperature is a NoneType", {"temperature": None}),
]  # fmt: skip


def names(cases):
    return [message for _, message, _ in cases]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(("error", "message", "change"), OF_BOTH + OF_THE_LOSS, ids=names(OF_BOTH + OF_THE_LOSS))
def test_policy_loss_refuses(error, message, change, kernels, monkeypatch):
    monkeypatch.setenv("STROP_KERNELS", kernels)
    given = {"logprob": LP, "old_logprob": LP, "advantages": LP, "mask": MASK, "spec": LossSpec(), "cu_seqlens": ENDS}
    with pytest.raises(error, match=message):
        policy_loss(**{**given, "denominator": 2} | change)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(("error", "message", "change"), OF_BOTH + OF_THE_HEAD, ids=names(OF_BOTH + OF_THE_HEAD))
def test_linear_policy_loss_refuses(error, message, change, kernels, monkeypatch):
    monkeypatch.setenv("STROP_KERNELS", kernels)
    given = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "old_logprob": LP, "advantages": LP, "mask": MASK}
    with pytest.raises(error, match=message):
        linear_policy_loss(**{**given, "spec": LossSpec(), "cu_seqlens": ENDS, "denominator": 2} | change)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "spec is 'clip'", {"spec": "clip"}),
        (ValueError, r"cu_seqlens\[1\] is 5, but there are only 4 tokens", {"cu_seqlens": torch.tensor([0, 5])}),
        (ValueError, "sequence_stats needs cu_seqlens", {"cu_seqlens": None}),
    ],
)
def test_sequence_stats_refuses(error, message, change):
    given = {"logprob": LP, "old_logprob": LP, "advantages": LP, "mask": MASK, "spec": LossSpec(aggregation="token-mean")}
    with pytest.raises(error, match=message):
        sequence_stats(**{**given, "cu_seqlens": ENDS} | change)


@pytest.mark.parametrize(
    ("error", "message", "function", "given"),
    [
        (TypeError, "spec is None, a NoneType: pass a strop.kernels.AdvantageSpec", group_advantage, (LP, TARGETS, None)),
        (ValueError, r"group_index has shape \(2,\), expected \(4,\): pass one a reward", group_advantage,
         (LP, TARGETS[:2], AdvantageSpec())),
        (ValueError, "got no tensor: pass the metrics of at least one", combine_metrics, ([],)),
        (TypeError, r"metrics is a Tensor: pass a list, \[metrics\] for one", combine_metrics, (torch.zeros(32),)),
        (ValueError, r"metrics\[1\] has shape \(3,\), expected \(32,\): pass metrics of policy_loss", combine_metrics,
         ([torch.zeros(32), torch.zeros(3)],)),
        (TypeError, r"metrics\[0\] is a dict", combine_metrics, ([{}],)),
        (ValueError, r"metrics has shape \(2, 32\), expected \(32,\)", summarize_metrics, (torch.zeros(2, 32),)),
    ],
)  # fmt: skip
def test_the_others_refuse(error, message, function, given):
    assert len(METRIC_FIELDS) == 32
    with pytest.raises(error, match=message):
        function(*given)


def test_what_is_accepted_beside():
    """Neighbours of the refused: boundaries of empty sequences and padding, one number as any number, a count of 0."""
    given = {"logprob": LP, "old_logprob": LP, "advantages": LP, "mask": MASK, "spec": LossSpec()}
    for ends in ([0], [0, 0, 3], [0, 4, 4]):
        for denominator in (2, 2.5, torch.tensor(2), torch.tensor(2.0, dtype=torch.float64)):
            assert policy_loss(**given, cu_seqlens=torch.tensor(ends), denominator=denominator).loss == 0
    policy_loss(**given | {"mask": ~MASK}, cu_seqlens=ENDS, denominator=torch.tensor(0))
    policy_loss(**given, cu_seqlens=torch.tensor([0]), denominator=torch.tensor(0))  # nothing but padding


def test_values_on_a_device_are_read_in_debug_mode_only(monkeypatch):
    """A meta tensor has no values: whoever reads them fails."""
    monkeypatch.setenv("STROP_KERNELS", "reference")
    tensors = [tensor.to("meta") for tensor in (LP, LP, LP, MASK)]
    keywords = {"cu_seqlens": ENDS.to("meta"), "denominator": torch.ones((), device="meta")}
    monkeypatch.delenv("STROP_KERNELS_DEBUG", raising=False)
    policy_loss(*tensors, LossSpec(), **keywords)
    monkeypatch.setenv("STROP_KERNELS_DEBUG", "1")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        policy_loss(*tensors, LossSpec(), **keywords)
