"""torch's own F.linear_cross_entropy as an outside oracle of `linear_logprob` under uniform weights: value, dX, dW, dbias.

torch's default path materialises the logits, `LinearCrossEntropyOptions` chooses its chunked one; both are compared.
"""

import pytest
import torch
import torch.nn.functional as F

from strop.kernels import linear_logprob

if not hasattr(F, "linear_cross_entropy"):
    pytest.skip(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)", allow_module_level=True)


@pytest.mark.filterwarnings("error")  # torch warns where it falls back to the path that materialises
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 8, 7), (37, 24, 101), (64, 32, 515)])
def test_negative_logprob_is_the_cross_entropy(shape, reduction, dtype, bound, chunked):
    rows, width, vocab = shape
    inputs = [torch.randn(*size, dtype=dtype).requires_grad_() for size in ((rows, width), (vocab, width), (vocab,))]
    hidden, weight, bias = inputs
    targets = torch.randint(0, vocab, (rows,))
    if rows > 1:
        targets[::5] = -100
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16, chunking_method=None) if chunked else None
    expected = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction=reduction, options=options)
    wanted = torch.autograd.grad(expected, inputs)

    logprob_N = linear_logprob(hidden, weight, targets, bias=bias).logprob
    loss = -logprob_N.sum() / ((targets != -100).sum() if reduction == "mean" else 1)
    gradients = torch.autograd.grad(loss, inputs)
    differences = [((one - other).norm() / other.norm()).item() for one, other in zip(gradients, wanted, strict=True)]
    print(f"{loss.item():.9f}, torch {expected.item():.9f}; gradients differ by {max(differences):.1e}")
    assert loss.item() == pytest.approx(expected.item(), rel=bound)
    assert max(differences) <= bound
