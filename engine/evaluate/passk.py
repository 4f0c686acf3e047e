"""Estimators over n samples of one question."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples is right, estimated without bias from n samples of which c are right.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1), as a sum of logarithms: binomials overflow
    at n = 10^4, and 1 minus a ratio near 1 loses digits. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n {n}, c {c}, k {k}")
    if n - c < k:
        return 1.0
    return -math.expm1(sum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def cons_at_k(answers: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """1.0 where the most frequent answer is right, else 0.0: cons@k of the R1 paper, k = len(answers).

    None is a sample without an answer, and has no vote. Of equally frequent answers the one sampled first wins.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    winner = votes.most_common(1)[0][0]  # insertion order breaks ties
    return float(right[answers.index(winner)])
