"""Top-k, top-p and min-p: which tokens of a row may be drawn.

The order is Hugging Face's: temperature, then top-k, then top-p of what is left (renormalised), then min-p. Each of the
three keeps a prefix of one ranking - decreasing logit, ties by increasing token id - so together they keep the shortest of
the three prefixes, and a row's whole truncation is one number: how many tokens of the ranking survive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocols import Sampling

_CANDIDATES = (128, 2048)
"""How many of a row's largest logits are ranked before the whole row is (32 rows of 49152 on one core: 3, 16, 96 ms)."""
_NO_LIMIT = 1 << 62
"""A prefix longer than any vocabulary."""


@dataclass(frozen=True)
class Truncation:
    """The settings of the R rows that are cut."""

    rows: Tensor
    """int64 [R]: indices in the batch."""
    temperature: Tensor
    """fp64 [R, 1]."""
    top_k: Tensor
    """int64 [R, 1]; 0 keeps the whole vocabulary."""
    top_p: Tensor
    """fp64 [R, 1]; 1 keeps the whole vocabulary."""
    min_p: Tensor
    """fp64 [R, 1]; 0 keeps the whole vocabulary."""
    candidates: tuple[int, ...]
    """How many of the largest logits to rank, first try, second try."""

    @staticmethod
    def of(samplings: Sequence[Sampling], device: torch.device) -> "Truncation | None":
        """None when no row is cut. Greedy rows never are: the largest logit survives every setting."""
        rows = [i for i, s in enumerate(samplings) if s.temperature and (s.top_k or s.top_p < 1 or s.min_p)]
        if not rows:
            return None
        cut = [samplings[row] for row in rows]

        def column(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        top_ks = [s.top_k for s in cut]
        # One more than top-k, to see whether the next logit ties with the last one kept.
        candidates = (max(top_ks) + 1,) if all(top_ks) else tuple(max(n, max(top_ks) + 1) for n in _CANDIDATES)
        return Truncation(
            rows=torch.tensor(rows, device=device),
            temperature=column([s.temperature for s in cut], torch.float64),
            top_k=column(top_ks, torch.int64),
            top_p=column([s.top_p for s in cut], torch.float64),
            min_p=column([s.min_p for s in cut], torch.float64),
            candidates=candidates,
        )

    def kept(self, logits_RV: Tensor, mass_R1: Tensor) -> Tensor:
        """bool [R, V]: the surviving tokens; never one of logit -inf.

        logits_RV: fp32, before temperature. mass_R1: fp64, sum over the row of exp((logit - largest logit) / temperature).
        """
        last_R1, length_R1, tied_R = self._ends(logits_RV, mass_R1)
        kept_RV = logits_RV >= last_R1.clamp(min=torch.finfo(torch.float32).min)
        for row in tied_R.nonzero().squeeze(1).tolist():
            ties_V = logits_RV[row] == last_R1[row]
            surplus = kept_RV[row].sum() - length_R1[row]
            kept_RV[row] &= ~ties_V | (ties_V.cumsum(0) <= ties_V.sum() - surplus)
        return kept_RV

    def _ends(self, logits_RV: Tensor, mass_R1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each row the last surviving logit, the number of survivors, and whether the next logit ties with the last.

        Rows whose prefix doesn't end within the first candidates are ranked again with more.
        """
        num_rows, vocab_size = logits_RV.shape
        last_R1, length_R1 = logits_RV.new_empty(num_rows, 1), mass_R1.new_empty(num_rows, 1, dtype=torch.int64)
        tied_R = torch.zeros(num_rows, dtype=torch.bool, device=logits_RV.device)
        open_rows = torch.arange(num_rows, device=logits_RV.device)
        for num_candidates in (*self.candidates, vocab_size):
            ranked_RN = _largest(logits_RV if len(open_rows) == num_rows else logits_RV[open_rows], num_candidates)
            length = self._prefix_length(ranked_RN, mass_R1[open_rows], open_rows)
            ends_inside = (length < ranked_RN.shape[1]) | (ranked_RN.shape[1] == vocab_size)
            length = length.clamp(1, ranked_RN.shape[1])
            last = ranked_RN.gather(1, length - 1)
            following = ranked_RN.gather(1, length.clamp(max=ranked_RN.shape[1] - 1))
            last_R1[open_rows], length_R1[open_rows] = last, length
            tied_R[open_rows] = ((following == last) & (length < ranked_RN.shape[1])).squeeze(1)
            open_rows = open_rows[~ends_inside.squeeze(1)]
            if len(open_rows) == 0:
                break
        return last_R1, length_R1, tied_R

    def _prefix_length(self, ranked_RN: Tensor, mass_R1: Tensor, which: Tensor) -> Tensor:
        """int64 [R, 1]: the survivors, given the N largest logits in decreasing order; N or more when these don't tell."""
        num_candidates = ranked_RN.shape[1]
        weights_RN = ((ranked_RN - ranked_RN[:, :1]) / self.temperature[which]).exp()
        cumulative_RN = weights_RN.cumsum(1)
        top_k, top_p, min_p = self.top_k[which], self.top_p[which], self.min_p[which]
        top_k = torch.where(top_k > 0, top_k, _NO_LIMIT)
        mass_R1 = torch.where(
            top_k <= num_candidates, cumulative_RN.gather(1, top_k.clamp(max=num_candidates) - 1), mass_R1
        )
        by_top_p = torch.where(top_p < 1, (cumulative_RN < top_p * mass_R1).sum(1, keepdim=True) + 1, _NO_LIMIT)
        by_min_p = (weights_RN >= min_p).sum(1, keepdim=True)
        return top_k.minimum(by_top_p).minimum(by_min_p)


def _largest(logits_RV: Tensor, count: int) -> Tensor:
    if count < logits_RV.shape[1]:
        return logits_RV.topk(count, dim=1).values
    return logits_RV.sort(dim=1, descending=True).values
