"""How long responses get: a lognormal length cut at a limit, from its mean, the limit and its spread.

The tail of this distribution is what a synchronous rollout waits for, so its expected maximum and its survival curve matter as
much as its mean. Lognormal lengths are an assumption, kept because two published numbers (mean and limit) then fix the rest.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..config import InputError

NORMAL = NormalDist()
GRID_POINTS = 1024
"""Of the numerical integrals over the survival curve; the error is below 0.1% of the result."""


@dataclass(frozen=True)
class ResponseLengths:
    """A response has min(X, max_tokens) tokens, log X ~ Normal(log_mean, spread)."""

    log_mean: float
    """Of log X; infinite where every response reaches the limit."""
    spread: float
    """Standard deviation of log X; 0: all responses have the same length."""
    max_tokens: int

    @staticmethod
    def of(mean_tokens: float, max_tokens: int, spread: float) -> "ResponseLengths":
        """The lengths whose mean after the cut is `mean_tokens`.

        Raises InputError where there are none: a mean above the limit or not above 0, a negative spread.
        """
        if max_tokens < 1 or mean_tokens <= 0:
            raise InputError(f"responses of {mean_tokens:g} tokens on average and {max_tokens} at most: both must be above 0")
        if mean_tokens > max_tokens:
            raise InputError(
                f"mean_response_tokens {mean_tokens:g} is above max_response_tokens {max_tokens}, where responses are cut: "
                f"give a mean of at most {max_tokens} or raise the limit"
            )
        if spread < 0:
            raise InputError(f"response_spread {spread:g} is a standard deviation: give 0 (all of one length) or more")
        if mean_tokens == max_tokens:
            return ResponseLengths(math.inf, spread, max_tokens)
        if spread == 0:
            return ResponseLengths(math.log(mean_tokens), 0.0, max_tokens)
        low = math.log(mean_tokens) - spread**2 / 2  # the mean without a cut, which only lowers it
        high = math.log(max_tokens) + 10 * spread
        for _ in range(80):
            middle = (low + high) / 2
            above = ResponseLengths(middle, spread, max_tokens).mean_tokens > mean_tokens
            low, high = (low, middle) if above else (middle, high)
        return ResponseLengths((low + high) / 2, spread, max_tokens)

    @property
    def mean_tokens(self) -> float:
        return self.moment(1)

    def moment(self, power: int) -> float:
        """E[length ** power]: the cut lognormal's in closed form."""
        if math.isinf(self.log_mean):
            return float(self.max_tokens) ** power
        if self.spread == 0:
            return min(math.exp(self.log_mean), self.max_tokens) ** power
        shift, limit = power * self.spread, (math.log(self.max_tokens) - self.log_mean) / self.spread
        below = math.exp(power * self.log_mean + shift**2 / 2) * NORMAL.cdf(limit - shift)
        return below + float(self.max_tokens) ** power * NORMAL.cdf(-limit)

    @property
    def token_weighted_mean_tokens(self) -> float:
        """E[length^2] / E[length]: the length of the response that an average token belongs to."""
        return self.moment(2) / self.moment(1)

    def token_weighted_sample_tokens(self, prompt_tokens: float) -> float:
        """E[length^2] / E[length] of samples, which are a prompt of that many tokens and a response."""
        mean = self.moment(1)
        return (prompt_tokens**2 + 2 * prompt_tokens * mean + self.moment(2)) / (prompt_tokens + mean)

    def survival(self, tokens: NDArray[np.floating]) -> NDArray[np.float64]:
        """Fraction of responses longer than each of `tokens`; 0 from the limit on."""
        tokens = np.asarray(tokens, dtype=float)
        if math.isinf(self.log_mean) or self.spread == 0:
            length = self.max_tokens if math.isinf(self.log_mean) else min(math.exp(self.log_mean), self.max_tokens)
            return (tokens < length).astype(float)
        scores = (np.log(np.maximum(tokens, 1e-9)) - self.log_mean) / self.spread
        longer = np.array([NORMAL.cdf(-score) for score in scores.ravel()]).reshape(scores.shape)
        return np.where(tokens < self.max_tokens, longer, 0.0)

    def quantiles(self, count: int) -> NDArray[np.float64]:
        """`count` lengths that stand for a sample of this size: the middles of equal shares, shortest first."""
        if math.isinf(self.log_mean) or self.spread == 0:
            length = self.max_tokens if math.isinf(self.log_mean) else math.exp(self.log_mean)
            return np.full(count, min(length, self.max_tokens))
        scores = np.array([NORMAL.inv_cdf((index + 0.5) / count) for index in range(count)])
        with np.errstate(over="ignore"):
            return np.minimum(np.exp(self.log_mean + self.spread * scores), self.max_tokens)

    def expected_max_tokens(self, count: float) -> float:
        """Mean length of the longest of `count` independent responses: the integral of 1 - (1 - survival)^count. `count` may be
        a mean, not whole."""
        tokens = np.linspace(0, self.max_tokens, GRID_POINTS)
        return float(np.trapezoid(1 - (1 - self.survival(tokens)) ** count, tokens))
