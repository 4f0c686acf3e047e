"""csrc/cuda/logit_rows.cu through the emulation, and on a GPU where there is one, against the fp64 reference."""

import math

import pytest
import torch

from strop.kernels.cuda import logit_rows as cuda
from strop.kernels.reference import logit_rows as reference
from strop.kernels.reference.softmax import IGNORED

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}
PLAIN = {"inverse_temperature": 1.0, "softcap": None, "bias_V": None, "keep_mask_NV": None}


def rows_of(num_rows: int, vocab: int, dtype: torch.dtype, *, offset: int = 0, gap: int = 0) -> torch.Tensor:
    """Random logits that begin `offset` elements behind an aligned address and lie vocab + gap apart; NaN around them."""
    memory = torch.full((offset + num_rows * (vocab + gap),), math.nan, dtype=dtype)
    logits = memory[offset:].view(num_rows, vocab + gap)[:, :vocab]
    logits.copy_(3 * torch.randn(num_rows, vocab))
    return logits


def some_targets(num_rows: int, vocab: int) -> torch.Tensor:
    """One in three ignored, elsewhere (in a row that is partial), the first column, the last, or anywhere."""
    targets = torch.randint(0, vocab, (num_rows,))
    targets[::7] = IGNORED
    targets[1::7], targets[2::7] = 0, vocab - 1
    return targets


def options_of(num_rows: int, vocab: int, targets: torch.Tensor, bias_dtype: torch.dtype) -> dict:
    """Bias, softcap, a temperature a row, and a mask that keeps each target but leaves the ignored rows empty."""
    keep = torch.rand(num_rows, vocab) > 0.4
    keep[torch.arange(num_rows), targets.clamp(0, vocab - 1)] = True
    keep[targets == IGNORED] = False
    bias = torch.randn(vocab + 1)[1:].to(bias_dtype)
    return {"inverse_temperature": torch.rand(num_rows) + 0.5, "softcap": 4.0, "bias_V": bias, "keep_mask_NV": keep}


def widened(options: dict) -> dict:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }


def check(logits: torch.Tensor, targets: torch.Tensor, options: dict, out_dtype: torch.dtype | None = None) -> None:
    """Statistics, whole and partial, and the gradient under random upstream gradients; in place where out_dtype is None.

    fp32: 3e-6 absolute and relative, from sums of thousands, exponents of up to 30 whose product with log2 e rounds (30 * 2^-24
    = 2e-6), and logsumexp as a float near 10 (1e-6). Narrower outputs are rounded once more.
    """
    wide = logits.double(), targets
    whole = reference.logit_statistics(*wide, **widened(options), partial=False)
    got = cuda.logit_statistics(logits, targets, **options, partial=False)
    torch.testing.assert_close(got.double(), whole, rtol=3e-6, atol=3e-6, equal_nan=True)
    shard = cuda.logit_statistics(logits, targets, **options, partial=True)
    wanted = reference.logit_statistics(*wide, **widened(options), partial=True)
    torch.testing.assert_close(shard.double(), wanted, rtol=5e-6, atol=3e-6)

    upstream = [torch.randn(len(targets)) for _ in range(3)]
    for gradient in upstream:
        gradient[3::7] = 0
    out = logits if out_dtype is None else rows_of(*logits.shape, out_dtype, offset=1, gap=2)
    expected = torch.empty_like(logits, dtype=torch.float64)
    reference.logit_gradient(*wide, whole, *(g.double() for g in upstream), **widened(options), out_NV=expected)
    cuda.logit_gradient(logits, targets, got, *upstream, **options, out_NV=out)
    rounding = ROUNDING[out.dtype]
    tolerance = {"rtol": rounding + 1e-5, "atol": 1e-6 + (2**-25 if out.dtype == torch.float16 else 0)}
    torch.testing.assert_close(out.double(), expected, **tolerance)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 129, 2048, 2051, 9001])
def test_plain_rows(emulated_cuda, dtype, vocab):
    """A warp a row and a block a row; vectors, and single logits before and behind them at each offset."""
    num_rows = 9
    for offset in range(0, 16 // dtype.itemsize, 3):
        logits = rows_of(num_rows, vocab, dtype, offset=offset, gap=offset % 2)
        check(logits, some_targets(num_rows, vocab), PLAIN | {"inverse_temperature": 1 / 0.7})


@pytest.mark.parametrize("bias_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", [7, 130, 2100])
def test_bias_softcap_temperature_and_mask(emulated_cuda, dtype, bias_dtype, vocab):
    targets = some_targets(12, vocab)
    options = options_of(12, vocab, targets, bias_dtype)
    check(rows_of(12, vocab, dtype, offset=1, gap=1), targets, options)
    for alone in ("softcap", "bias_V", "keep_mask_NV", "inverse_temperature"):
        check(rows_of(12, vocab, dtype), targets, PLAIN | {alone: options[alone]})


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", [50, 2060])
def test_gradient_into_another_tensor(emulated_cuda, dtype, out_dtype, vocab):
    """Of another type, whose rows lie at odd addresses; what is around it stays."""
    logits, targets = rows_of(5, vocab, dtype), some_targets(5, vocab)
    check(logits, targets, PLAIN, out_dtype)
    out = torch.full((5, vocab + 3), 7.0, dtype=out_dtype)
    statistics = cuda.logit_statistics(logits, targets, **PLAIN, partial=False)
    cuda.logit_gradient(logits, targets, statistics, torch.ones(5), None, None, **PLAIN, out_NV=out[:, 1 : vocab + 1])
    assert (out[:, 0] == 7).all() and (out[:, vocab + 1 :] == 7).all() and (out[:, 1 : vocab + 1] != 7).all()


def test_rows_are_found_where_temperatures_and_masks_are_views(emulated_cuda):
    """Transposed tensors, every other row, rows that are one row."""
    vocab, targets = 40, some_targets(8, 40)
    logits = rows_of(16, vocab, torch.float32)[::2]
    mask = torch.rand(16, 64) > 0.3
    mask[::2][torch.arange(8), targets.clamp(0, vocab - 1)] = True
    options = PLAIN | {"keep_mask_NV": mask[::2, :vocab], "inverse_temperature": (torch.rand(8, 2) + 1)[:, 0]}
    check(logits, targets, options)
    repeated = rows_of(1, vocab, torch.bfloat16).expand(8, vocab)
    check(repeated, targets, PLAIN, torch.bfloat16)


def test_no_rows_and_one_row(emulated_cuda):
    empty = torch.empty(0, 9)
    assert cuda.logit_statistics(empty, torch.empty(0, dtype=torch.int64), **PLAIN, partial=True).shape == (5, 0)
    cuda.logit_gradient(empty, torch.empty(0, dtype=torch.int64), torch.empty(3, 0), None, None, None, **PLAIN, out_NV=empty)
    check(rows_of(1, 7, torch.float32), torch.tensor([3]), PLAIN)
    check(rows_of(1, 3000, torch.bfloat16), torch.tensor([2999]), PLAIN)


@pytest.mark.parametrize("vocab", [33, 2500])
def test_ignored_rows_are_not_read(emulated_cuda, vocab):
    logits = torch.full((3, vocab), math.nan)
    targets = torch.full((3,), IGNORED)
    assert not cuda.logit_statistics(logits, targets, **PLAIN, partial=False).any()
    partial = cuda.logit_statistics(logits, targets, **PLAIN, partial=True)
    assert (partial[0] == -math.inf).all() and not partial[1:].any()
    nothing = torch.full((3, 3), math.nan)
    cuda.logit_gradient(logits, targets, nothing, *nothing, **PLAIN, out_NV=logits)
    assert not logits.any()


@pytest.mark.parametrize("vocab", [11, 2500])
def test_extreme_logits(emulated_cuda, vocab):
    """1e4 in every place, p -> 1 and p -> 0, -inf, targets among them."""
    logits = torch.randn(8, vocab)
    targets = torch.zeros(8, dtype=torch.int64)
    logits[0, 0], logits[1, 0], logits[2, 1] = 1e4, 25.0, 1e4
    logits[3] += 1e4
    logits[4] -= 1e4
    logits[5, 1:] = -math.inf
    logits[6, vocab // 2 :] = -math.inf
    logits[7] = torch.where(torch.arange(vocab) % 2 == 0, 1e4, -1e4)
    statistics = cuda.logit_statistics(logits, targets, **PLAIN, partial=False)
    expected = reference.logit_statistics(logits.double(), targets, **PLAIN, partial=False)
    torch.testing.assert_close(statistics.double(), expected, rtol=3e-6, atol=3e-6)
    upstream = [torch.randn(8) for _ in range(3)]
    wanted, out = torch.empty_like(logits, dtype=torch.float64), torch.empty_like(logits)
    reference.logit_gradient(logits.double(), targets, expected, *(u.double() for u in upstream), **PLAIN, out_NV=wanted)
    cuda.logit_gradient(logits, targets, statistics, *upstream, **PLAIN, out_NV=out)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)


def test_nan_shows(emulated_cuda):
    """In the logits of a row, in its upstream gradient, and as the log-prob of a target that no shard holds."""
    for column in (0, 5, 2400):
        logits = torch.randn(2, 2500)
        logits[0, column] = math.nan
        statistics = cuda.logit_statistics(logits, torch.tensor([1, 2]), **PLAIN, partial=False)
        assert statistics[:, 0].isnan().all() and statistics[:, 1].isfinite().all()
    logits, targets = torch.randn(3, 20), torch.tensor([1, 20, -1])
    statistics = cuda.logit_statistics(logits, targets, **PLAIN, partial=False)
    assert statistics[0].isnan().tolist() == [False, True, True] and statistics[1:].isfinite().all()
    for position in range(3):
        upstream = [torch.zeros(3) for _ in range(3)]
        upstream[position][0] = math.nan
        out = torch.empty_like(logits)
        cuda.logit_gradient(logits, targets, statistics, *upstream, **PLAIN, out_NV=out)
        assert out[0].isnan().all() and not out[1:].any()


def test_shards_join_to_the_whole(emulated_cuda):
    """Uneven vocabulary shards, as tensor parallelism has them; the gradient's columns need nothing but whole statistics."""
    logits, targets = torch.randn(6, 100) * 4, torch.tensor([0, 29, 30, 99, 64, IGNORED])
    shards = [(0, 30), (30, 37), (37, 100)]
    local = [torch.where(targets == IGNORED, IGNORED, targets - start) for start, _ in shards]
    parts = [
        cuda.logit_statistics(logits[:, start:stop], own, **PLAIN, partial=True)
        for (start, stop), own in zip(shards, local, strict=True)
    ]
    maximum = torch.stack([part[0] for part in parts]).amax(0)
    shifts = [part[0] - maximum for part in parts]
    total = sum(part[1] * shift.exp() for part, shift in zip(parts, shifts, strict=True))
    assert sum(part[4] for part in parts).tolist() == [1, 1, 1, 1, 1, 0]
    whole = cuda.logit_statistics(logits, targets, **PLAIN, partial=False)
    torch.testing.assert_close((maximum + total.log())[:5], whole[2, :5])
    torch.testing.assert_close((sum(part[3] for part in parts) - maximum - total.log())[:5], whole[0, :5])
    upstream, out, wanted = [torch.randn(6) for _ in range(3)], torch.empty_like(logits), torch.empty_like(logits)
    cuda.logit_gradient(logits, targets, whole, *upstream, **PLAIN, out_NV=wanted)
    for (start, stop), own in zip(shards, local, strict=True):
        cuda.logit_gradient(logits[:, start:stop], own, whole, *upstream, **PLAIN, out_NV=out[:, start:stop])
    # Not the same bits: without the target, log p is logit - logsumexp, which rounds elsewhere (2^-24 of sizes up to 16).
    torch.testing.assert_close(out, wanted, rtol=3e-6, atol=1e-7)


def test_bad_arguments_are_refused(emulated_cuda):
    logits, targets = torch.randn(2, 5), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="strop_cuda_logit_statistics failed with status 1"):
        cuda.logit_statistics(logits, targets, **PLAIN | {"softcap": -1.0}, partial=True)
    with pytest.raises(RuntimeError, match="strop_cuda_logit_gradient failed with status 1"):
        cuda.logit_gradient(logits, targets, torch.ones(3, 2), None, None, None, **PLAIN | {"softcap": math.nan}, out_NV=logits)


def at_odd_addresses(logits: torch.Tensor) -> torch.Tensor:
    """The same rows in other memory, one element behind an aligned address and at a stride of one more."""
    copy = torch.empty(len(logits), logits.shape[1] + 1, dtype=logits.dtype, device=logits.device)[:, 1:]
    return copy.copy_(logits)


def large_rows(num_rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets on the GPU."""
    logits = 3 * torch.randn(num_rows, vocab, device="cuda").to(dtype)
    return at_odd_addresses(logits), some_targets(num_rows, vocab).cuda()


def gradient_of(logits, targets, options: dict, upstream: list, out: torch.Tensor) -> torch.Tensor:
    """Statistics, then the gradient into `out`; returns the statistics."""
    statistics = cuda.logit_statistics(logits, targets, **options, partial=False)
    cuda.logit_gradient(logits, targets, statistics, *upstream, **options, out_NV=out)
    return statistics


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_options", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize(("num_rows", "vocab"), [(64, 128_256), (300, 49_152), (100_000, 7), (512, 2048)])
def test_on_a_gpu(cuda_library, num_rows, vocab, dtype, with_options):
    """In place, against the reference in fp64 on the GPU, and to the same bits in every run.

    Tolerances as in `check`; 1e-5 for sums of 128,256 terms and 2^x to 2^-22.
    """
    logits, targets = large_rows(num_rows, vocab, dtype)
    options = PLAIN | {"inverse_temperature": 1 / 0.7}
    if with_options:
        options = options_of(num_rows, vocab, targets.cpu(), torch.bfloat16)
        options = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    upstream = [torch.randn(num_rows, device="cuda") for _ in range(3)]
    wide, wanted = logits.double(), torch.empty(num_rows, vocab, dtype=torch.float64, device="cuda")
    whole = reference.logit_statistics(wide, targets, **widened(options), partial=False)
    reference.logit_gradient(wide, targets, whole, *(u.double() for u in upstream), **widened(options), out_NV=wanted)
    runs = []
    for _ in range(2):
        out = at_odd_addresses(logits)
        runs.append((gradient_of(out, targets, options, upstream, out), out))
    (statistics, out), (statistics_again, out_again) = runs
    assert torch.equal(statistics, statistics_again) and torch.equal(out, out_again)
    torch.testing.assert_close(statistics.double(), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), wanted, rtol=ROUNDING[dtype] + 2e-5, atol=2e-6)


@pytest.mark.gpu
def test_offsets_beyond_32_bits_on_a_gpu(cuda_library):
    """2.2 billion bf16 logits: the last rows lie beyond 2^31 elements."""
    num_rows, vocab = 17_000, 131_072
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    logits = torch.zeros(num_rows, vocab, dtype=torch.bfloat16, device="cuda")
    targets = torch.full((num_rows,), 5, device="cuda")
    logits[-1, 5] = 3.0
    ones = torch.ones(num_rows, device="cuda")
    statistics = gradient_of(logits, targets, PLAIN, [ones, None, None], logits)
    total = vocab - 1 + math.exp(3)
    assert statistics[0, 0].item() == pytest.approx(-math.log(vocab), rel=1e-5)
    assert statistics[0, -1].item() == pytest.approx(3 - math.log(total), rel=1e-5)
    assert logits[-1, 5].item() == pytest.approx(1 - math.exp(3) / total, rel=2**-8)
    assert logits[-1, 6].item() == pytest.approx(-1 / total, rel=2**-8)


@pytest.mark.gpu
def test_graph_capture(cuda_library):
    static, targets = large_rows(40, 32_000, torch.bfloat16)
    upstream, out = [torch.randn(40, device="cuda") for _ in range(3)], torch.empty_like(static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradient_of(static, targets, PLAIN, upstream, out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        statistics = gradient_of(static, targets, PLAIN, upstream, out)
    for _ in range(2):
        static.copy_(3 * torch.randn_like(static))
        graph.replay()
        wanted = torch.empty_like(static)
        assert torch.equal(gradient_of(static, targets, PLAIN, upstream, wanted), statistics)
        assert torch.equal(out, wanted)
