"""What to say when a loss or a gradient isn't finite: which rank, micro-batch and samples, and which tensors."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..parallel.collectives import all_gather_objects
from ..parallel.mesh import Mesh
from .microbatches import MicroBatch
from .optimizer import DistributedAdamW

SHOWN = 5


class NonFiniteError(FloatingPointError):
    """NaN or infinity where training needs numbers. Raised on every rank, before the update changes any parameter."""


def raise_nonfinite(
    what: str, microbatches: Sequence[MicroBatch], run: Callable[[MicroBatch], Tensor], optimizer: DistributedAdamW, mesh: Mesh
) -> NoReturn:
    """Run every micro-batch again, alone, and raise the same NonFiniteError on every rank with what each of them gave.

    Collective. what: the step, and the numbers that were not finite. run: forward and backward, returning the loss.
    """
    findings = []
    for index, microbatch in enumerate(microbatches):
        optimizer.zero_grad()
        inputs = ("advantages", "rollout_logprob", "old_logprob", "ref_logprob")
        tensors = {name: tensor for name in inputs if (tensor := getattr(microbatch.batch, name)) is not None}
        tensors["loss"] = run(microbatch)
        tensors |= {f"gradient of {name}": gradient for name, gradient in optimizer.main_grads().items()}
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad:
            findings.append(f"rank {mesh.rank}, micro-batch {index}, samples {_some(microbatch.sample_ids)}: {_some(bad)}")
    optimizer.zero_grad()
    everywhere = [finding for part in all_gather_objects(findings, mesh.world) for finding in part]
    causes = "; ".join(everywhere) or "every micro-batch alone is finite, their sum overflows fp32"
    raise NonFiniteError(f"{what}; no parameter was changed by this update. {causes}")


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more
