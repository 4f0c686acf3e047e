"""csrc/cpu's row kernels against the fp64 reference, on each level of vector instructions that this CPU has."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels.cpu import logit_rows as cpu
from strop.kernels.reference import logit_rows as reference
from strop.kernels.reference.softmax import IGNORED

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}
PLAIN = {"inverse_temperature": 1.0, "softcap": None, "bias_V": None, "keep_mask_NV": None}


def scattered(num_rows: int, width: int, dtype: torch.dtype, offset: int, gap: int) -> torch.Tensor:
    """[num_rows, width] whose rows begin at odd addresses, NaN between them."""
    memory = torch.full((offset + num_rows * (width + gap) + 40,), math.nan, dtype=dtype)
    return memory[offset:-40].view(num_rows, width + gap)[:, :width]


def between_rows(tensor: torch.Tensor) -> torch.Tensor:
    """What lies before, between and behind the rows of a `scattered` tensor."""
    memory = tensor._base
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    return memory[outside]


@st.composite
def cases(draw):
    """(logits, targets, options, out): any dtypes, strides and offsets, -inf logits, rows that are ignored or partial."""
    num_rows = draw(st.sampled_from([0, 1, 2, 9]))
    vocab = draw(st.sampled_from([1, 2, 7, 15, 16, 17, 33, 127, 128, 129, 1023, 1024, 1025, 2049]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def chance(*shape):
        return torch.rand(*shape, generator=generator)

    dtype, out_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([None, *FLOATS]))
    offsets, gaps = st.integers(0, 5), st.integers(0, 3)
    logits = scattered(num_rows, vocab, dtype, draw(offsets), draw(gaps))
    logits.copy_(draw(st.sampled_from([0.1, 3.0, 30.0])) * normal(num_rows, vocab))
    if draw(st.booleans()):
        logits.masked_fill_(chance(num_rows, vocab) < 0.3, -math.inf)
        logits[:, vocab // 2] = 1.0  # a softmax has something to keep
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    targets[chance(num_rows) < 0.2] = IGNORED
    targets[chance(num_rows) < 0.2] = draw(st.sampled_from([-1, -(2**40), vocab, 2**40]))
    options = dict(PLAIN)
    options["inverse_temperature"] = draw(st.sampled_from([1.0, 0.7])) if draw(st.booleans()) else chance(num_rows) + 0.5
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 5.0, 30.0]))
    if draw(st.booleans()):
        options["bias_V"] = normal(vocab + 1)[1:].to(draw(st.sampled_from(FLOATS)))
    if draw(st.booleans()):
        keep = scattered(num_rows, vocab, torch.bool, draw(offsets), draw(gaps))
        keep.copy_(chance(num_rows, vocab) < 0.6)
        keep[:, vocab // 2] = True
        options["keep_mask_NV"] = keep
    upstream = [normal(num_rows) * (chance(num_rows) < 0.8) if draw(st.booleans()) else None for _ in range(3)]
    out = logits if out_dtype is None else scattered(num_rows, vocab, out_dtype, draw(offsets), draw(gaps))
    return logits, targets, options, upstream, out


def widened(options: dict) -> dict:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_equals_the_reference(cpu_level, case):
    """1e-6 for the sums, 2e-6 for results, and 2^-24 of the largest z: it is rounded to fp32, so e^z moves by as much."""
    logits, targets, options, upstream, out = case
    wide = logits.double(), targets
    largest_z = 1.5 * (4 + logits.float().nan_to_num(neginf=0).abs().amax().item()) if logits.numel() else 0.0
    tolerance = {"rtol": 2e-6, "atol": 1e-6 + 2**-23 * largest_z}
    whole = reference.logit_statistics(*wide, **widened(options), partial=False)
    torch.testing.assert_close(
        cpu.logit_statistics(logits, targets, **options, partial=False).double(), whole, **tolerance, equal_nan=True
    )
    partial = reference.logit_statistics(*wide, **widened(options), partial=True)
    relative = {"rtol": 2e-6 + 2**-23 * largest_z, "atol": tolerance["atol"]}
    torch.testing.assert_close(cpu.logit_statistics(logits, targets, **options, partial=True).double(), partial, **relative)

    sound = torch.where(whole.isfinite(), whole, 0.5)  # of the whole vocabulary: a partial row's come from all shards
    expected = torch.empty(logits.shape, dtype=torch.float64)
    wide_upstream = [None if gradient is None else gradient.double() for gradient in upstream]
    reference.logit_gradient(*wide, sound, *wide_upstream, **widened(options), out_NV=expected)
    cpu.logit_gradient(logits, targets, sound.float(), *upstream, **options, out_NV=out)
    rounding = ROUNDING[out.dtype]
    # logsumexp comes as fp32, by half a unit of which every log p may be off, absolutely: h p (log p + H) is 0 where p = 1.
    atol = tolerance["atol"] + (2**-25 if out.dtype == torch.float16 else 0)
    close = {"rtol": rounding + 2**-22 * largest_z + 4e-6, "atol": atol}
    torch.testing.assert_close(out.double(), expected, **close)
    assert between_rows(out).isnan().all()


def test_rows_without_any_token_and_without_numbers(cpu_level):
    """As in the reference: nothing kept gives logsumexp -inf and no entropy; a NaN or +inf logit makes its row NaN only."""
    logits = torch.randn(4, 1500)
    logits[0] = -math.inf
    logits[1, 700], logits[2, 1400] = math.nan, math.inf
    targets = torch.tensor([3, 3, 3, 3])
    statistics = cpu.logit_statistics(logits, targets, **PLAIN, partial=False)
    assert statistics[2, 0] == -math.inf and statistics[:2, 0].isnan().all()
    assert statistics[:, 1:3].isnan().all() and statistics[:, 3].isfinite().all()
    assert cpu.logit_statistics(logits, targets, **PLAIN, partial=True)[:3, 0].tolist() == [-math.inf, 0, 0]
    masked = {**PLAIN, "keep_mask_NV": torch.zeros(4, 1500, dtype=torch.bool)}
    ones = torch.ones(4)
    cpu.logit_gradient(logits, targets, statistics, ones, ones, ones, **masked, out_NV=logits)
    assert not logits.any(), "a token outside the mask has gradient 0 whatever its row holds"


def test_upstream_gradients(cpu_level):
    """NaN reaches the row; zeros and ignored rows write 0 over whatever was there."""
    logits, out = torch.randn(4, 70), torch.full((4, 70), math.nan)
    logits[3] = math.nan
    targets = torch.tensor([5, 5, 5, IGNORED])
    statistics = cpu.logit_statistics(logits, targets, **PLAIN, partial=False)
    g = torch.tensor([math.nan, 0.0, 1.0, math.nan])
    cpu.logit_gradient(logits, targets, statistics, g, None, None, **PLAIN, out_NV=out)
    assert out[0].isnan().all() and not out[1].any() and out[2].isfinite().all() and not out[3].any()
    assert not statistics[:, 3].any()


def test_a_vocabulary_of_150000_loses_nothing(cpu_level):
    """Sums within 1e-6: a lane adds at most 256 terms in fp32 (64 with AVX-512), everything above that in fp64."""
    vocab = 151_936
    logits = torch.zeros(3, vocab)
    logits[1] = torch.randn(vocab)
    logits[2] = 10 * torch.randn(vocab)
    targets = torch.tensor([0, 1, vocab - 1])
    total, weighted = cpu.logit_statistics(logits, targets, **PLAIN, partial=True)[1:3].double()
    _, wanted_total, wanted_weighted = reference.logit_statistics(logits.double(), targets, **PLAIN, partial=True)[:3]
    torch.testing.assert_close(total, wanted_total, rtol=1e-6, atol=0)
    torch.testing.assert_close(weighted, wanted_weighted, rtol=1e-6, atol=0)
    got = cpu.logit_statistics(logits, targets, **PLAIN, partial=False)
    wanted = reference.logit_statistics(logits.double(), targets, **PLAIN, partial=False)
    torch.testing.assert_close(got.double(), wanted, rtol=3e-7, atol=1e-6)


def test_bad_arguments_are_refused(cpu_level):
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="strop_cpu_logit_statistics failed with status 1"):
        cpu.logit_statistics(torch.zeros(2, 0), targets, **PLAIN, partial=False)
    with pytest.raises(RuntimeError, match="strop_cpu_logit_statistics failed with status 1"):
        cpu.logit_statistics(torch.zeros(2, 3), targets, **{**PLAIN, "softcap": -1.0}, partial=False)
