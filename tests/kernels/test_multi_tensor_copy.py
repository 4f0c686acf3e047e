import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.kernels import multi_tensor_copy
from strop.kernels.cuda import multi_tensor_copy as cuda
from strop.kernels.rectangles import rectangle_pairs

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NOT_CONVERTED = [torch.int64, torch.uint8, torch.float64, torch.int16, torch.float8_e4m3fn, torch.complex128]


def weights(rounded: torch.dtype = torch.bfloat16) -> tuple[list, list]:
    """Random sources and empty destinations as a weight swap meets them. rounded: the narrower type of the destinations."""

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(shape) * 50).to(dtype)

    fused = torch.zeros(96, 64, dtype=rounded)
    experts = torch.zeros(3, 32, 24)
    pairs = [
        (make((64, 64), torch.float32), fused[:64]),  # q, k, v rows of one matrix
        (make((16, 64), torch.float32), fused[64:80]),
        (make((16, 64), torch.bfloat16), fused[80:]),
        (make((40, 32), torch.float16), torch.zeros(40, 96, dtype=rounded)[:, 32:64]),  # a column shard
        (make((3, 8, 24), torch.bfloat16), experts[:, 8:16]),
        (make((7, 9), torch.float32).T, torch.zeros(9, 7, dtype=torch.float16)),
        (make((4, 5, 6), torch.float32)[:, ::2].permute(2, 0, 1), torch.zeros(6, 4, 3)),
        (make((577,), torch.float32), torch.zeros(577, dtype=torch.float16)),
        (make((577,), torch.float32)[1:], torch.zeros(576, dtype=rounded)),  # misaligned
        (make((), torch.float32), torch.zeros(())),
        (make((0, 5), torch.float32), torch.zeros(0, 5)),
        (make((20000,), torch.bfloat16), torch.zeros(20000)),
        (make((3, 9000), torch.float16)[:, :8999], torch.zeros(3, 8999, dtype=rounded)),
    ]
    pairs += [(make((5, 33), dtype)[:, 1:], torch.zeros(5, 32, dtype=dtype)) for dtype in NOT_CONVERTED]
    pairs += [(make((6, 48), dtype), torch.zeros(6, 64, dtype=dtype)[:, 16:]) for dtype in NOT_CONVERTED]
    return [source for source, _ in pairs], [destination for _, destination in pairs]


def memory(tensors: list) -> list:
    """All bytes of the storages: what lies around a destination must not change."""
    return [torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()) for tensor in tensors]


def assert_copied(sources: list, destinations: list, rounded: torch.dtype = torch.bfloat16) -> None:
    """`destinations` were those of `weights` before `sources` were copied into them."""
    expected = weights(rounded)[1]
    for source, destination in zip(sources, expected, strict=True):
        destination.copy_(source)
    torch.testing.assert_close(memory(destinations), memory(expected), rtol=0, atol=0)


def test_reference():
    sources, destinations = weights()
    multi_tensor_copy(sources, destinations)
    assert_copied(sources, destinations)


def test_triton(interpreted):
    """Not to bf16: the interpreter cuts off what a GPU rounds."""
    sources, destinations = interpreted(multi_tensor_copy, *weights(torch.float16))[0]
    assert_copied(sources, destinations, torch.float16)


def test_triton_with_more_rectangles_than_a_launch_takes(interpreted):
    sources = [torch.full((3,), float(i)) for i in range(300)]
    _, destinations = interpreted(multi_tensor_copy, sources, [torch.zeros(3) for _ in sources])[0]
    torch.testing.assert_close(destinations, sources)


def test_cuda(emulated_cuda):
    sources, destinations = weights()
    cuda.multi_tensor_copy(sources, destinations)
    assert_copied(sources, destinations)


def test_cuda_with_more_rectangles_and_items_than_a_launch_and_a_block_take(emulated_cuda):
    sources = [torch.full((3,), float(i)) for i in range(900)] + [torch.arange(100_000.0)]
    destinations = [torch.zeros_like(source).half() for source in sources]
    cuda.multi_tensor_copy(sources, destinations)
    torch.testing.assert_close(destinations, [source.half() for source in sources])


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("destination", FLOATS)
@pytest.mark.parametrize("columns", [1, 64])
def test_cuda_rounds_as_torch(emulated_cuda, source, destination, columns):
    """Ties, halves of the smallest number, overflow, infinities and NaN; element by element and in vectors."""
    values = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-11, 6e-8, 3e-8, 65519.0, 65520.0, 3e38, torch.inf, torch.nan, 0])
    values = torch.cat((values, -values, torch.randn(42) * 1e3))[:, None].expand(64, 64).contiguous()[:, :columns].to(source)
    out = torch.zeros(64, columns, dtype=destination)
    cuda.multi_tensor_copy([values], [out])
    torch.testing.assert_close(out, values.to(destination), rtol=0, atol=0, equal_nan=True)


def test_cuda_refuses_unknown_types(emulated_cuda):
    with pytest.raises(RuntimeError, match="strop_cuda_multi_tensor_copy failed with status 1"):
        cuda.multi_tensor_copy([torch.ones(2, dtype=torch.float64)], [torch.ones(2)])


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_rectangles_cover_every_element_once(shape, data):
    """The pairs of addresses are those of the elements, whatever the strides."""
    def view() -> torch.Tensor:
        steps = [data.draw(st.integers(1, 2)) for _ in shape]
        order = data.draw(st.permutations(range(len(shape))))
        dense = torch.zeros([shape[i] * steps[i] for i in order], dtype=torch.float16)
        return dense.permute([order.index(i) for i in range(len(shape))])[tuple(slice(None, None, s) for s in steps)]

    source, destination = view(), view()
    got = [
        (p.source + 2 * (i * p.source_row_stride + j * p.source_column_stride),
         p.destination + 2 * (i * p.destination_row_stride + j * p.destination_column_stride))
        for p in rectangle_pairs(source, destination) for i in range(p.rows) for j in range(p.columns)
    ]  # fmt: skip
    want = [
        tuple(t.data_ptr() + 2 * sum(i * s for i, s in zip(index, t.stride(), strict=True)) for t in (source, destination))
        for index in itertools.product(*map(range, shape))
    ]
    assert sorted(got) == sorted(want)


def test_joins_what_is_contiguous():
    dense = torch.zeros(4, 5, 6)
    (pair,) = rectangle_pairs(dense, dense.clone())
    assert (pair.rows, pair.columns) == (1, 120)
    (pair,) = rectangle_pairs(torch.zeros(4, 2, 6), dense[:, :2])
    assert (pair.rows, pair.columns, pair.source_row_stride, pair.destination_row_stride) == (4, 12, 12, 30)
    assert len(list(rectangle_pairs(torch.zeros(4, 2, 3), dense[:, :2, :3]))) == 4


def test_is_in_place_without_gradient():
    source, parameter = torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.zeros(3))
    multi_tensor_copy([source], [parameter])
    assert parameter.is_leaf and parameter.requires_grad and torch.equal(parameter, source)
    multi_tensor_copy([], [])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def swap(source, destination):
        multi_tensor_copy([source], [destination])
        return destination * 2

    assert torch.equal(swap(source.detach() * 3, torch.zeros(3)), torch.full((3,), 6.0))


def test_refuses(monkeypatch):
    one = torch.ones(3)
    with pytest.raises(ValueError, match="2 sources but 1 destinations"):
        multi_tensor_copy([one, one], [one])
    with pytest.raises(ValueError, match=r"destinations\[0\] has shape \(2,\): \(3,\) is needed"):
        multi_tensor_copy([one], [torch.ones(2)])
    with pytest.raises(ValueError, match=r"destinations\[1\] is on meta"):
        multi_tensor_copy([one, one], [torch.ones(3), one.to("meta")])
    with pytest.raises(TypeError, match=r"sources\[0\] is torch\.float32, destinations\[0\] torch\.int32"):
        multi_tensor_copy([one], [one.int()])
    with pytest.raises(ValueError, match="holds an element twice"):
        multi_tensor_copy([one], [torch.ones(1).expand(3)])
