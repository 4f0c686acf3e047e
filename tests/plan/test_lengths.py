"""Lengths of responses: the cut lognormal against samples drawn from it."""

import numpy as np
import pytest

from strop.engine.config import InputError
from strop.engine.plan.lengths import ResponseLengths

CASES = [(1019, 4096, 0.8), (3203, 4096, 0.8), (700, 1430, 0.5), (8000, 32768, 1.2), (50, 64, 0.3)]


@pytest.mark.parametrize("mean, limit, spread", CASES)
def test_moments_and_maximum_match_a_drawn_sample(mean, limit, spread):
    lengths = ResponseLengths.of(mean, limit, spread)
    normal = np.random.default_rng(0).standard_normal((4000, 64))
    drawn = np.minimum(np.exp(lengths.log_mean + spread * normal), limit)
    assert lengths.mean_tokens == pytest.approx(mean, rel=1e-9)
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert (drawn**2).mean() == pytest.approx(lengths.moment(2), rel=0.02)
    samples = 500 + drawn
    weighted = (samples**2).mean() / samples.mean()  # a sample's length, of each of its tokens
    assert weighted == pytest.approx(lengths.token_weighted_sample_tokens(500), rel=0.01)
    assert drawn.max(axis=1).mean() == pytest.approx(lengths.expected_max_tokens(64), rel=0.01)
    assert (drawn == limit).mean() == pytest.approx(lengths.survival(np.nextafter(limit, 0)), abs=0.005)


@pytest.mark.parametrize("mean, limit, spread", CASES)
def test_survival_falls_from_one_to_zero_and_integrates_to_the_mean(mean, limit, spread):
    lengths = ResponseLengths.of(mean, limit, spread)
    tokens = np.linspace(0, limit, 5000)
    survival = lengths.survival(tokens)
    assert survival[0] == 1 and survival[-1] == 0 and (np.diff(survival) <= 0).all()
    assert np.trapezoid(survival, tokens) == pytest.approx(mean, rel=2e-3)


def test_quantiles_stand_for_the_distribution():
    lengths = ResponseLengths.of(1019, 4096, 0.8)
    quantiles = lengths.quantiles(256)
    assert (np.diff(quantiles) >= 0).all() and quantiles.mean() == pytest.approx(1019, rel=0.01)


def test_maximum_grows_with_the_sample_and_stays_below_the_limit():
    lengths = ResponseLengths.of(500, 4096, 0.6)
    maxima = [lengths.expected_max_tokens(count) for count in (1, 4, 16, 64, 1024)]
    assert maxima[0] == pytest.approx(500, rel=2e-3) and maxima == sorted(maxima) and maxima[-1] < 4096


@pytest.mark.parametrize("spread", [0.0, 0.8])
def test_lengths_without_variation(spread):
    everything_cut = ResponseLengths.of(4096, 4096, spread)
    assert everything_cut.mean_tokens == everything_cut.quantiles(3)[0] == 4096
    assert everything_cut.survival(np.nextafter(4096, 0)) == 1
    one_length = ResponseLengths.of(1000, 4096, 0.0)
    assert one_length.mean_tokens == pytest.approx(1000) == one_length.quantiles(3)[2]
    assert one_length.expected_max_tokens(1000) == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize(
    "mean, limit, spread, message",
    [(5000, 4096, 0.8, "mean of at most 4096"), (0, 4096, 0.8, "above 0"), (100, 0, 0.8, "above 0"), (10, 20, -1, "deviation")],
)
def test_impossible_lengths_are_refused(mean, limit, spread, message):
    with pytest.raises(InputError, match=message):
        ResponseLengths.of(mean, limit, spread)
