"""Inputs of `linear_policy_loss` and the two ops that it fuses; loaded by the fixture `make_case`."""

import math

import torch

from strop.kernels import linear_logprob, linear_policy_loss, policy_loss

CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # sums of up to 300 fp32 terms of order 1, in another order


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
