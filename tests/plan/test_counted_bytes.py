"""The bytes that the planner predicts for a step equal those that two real processes send.

Every function of torch.distributed that moves data is wrapped in each rank, so nothing travels uncounted; the engine's two
row collectives say what a message is part of (on a CPU they are exchanges of blocks, each rank sending what a ring would).
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

from strop.engine.batch import Group, Prompt, Sample, Score, Span
from strop.engine.config import Layout
from strop.engine.model.config import ModelConfig
from strop.engine.model.transformer import Transformer
from strop.engine.parallel import collectives, rows
from strop.engine.parallel.mesh import Mesh
from strop.engine.plan.run import PlannedRun, TrainingPlan
from strop.engine.plan.shape import ModelShape
from strop.engine.plan.training import train_step
from strop.engine.train import step as step_module
from strop.engine.train.step import TrainConfig, Trainer
from strop.kernels import METRIC_FIELDS

SEQUENCES, SEQUENCE_TOKENS = 4, 12
TENSOR_CALLS = ("all_reduce", "broadcast", "reduce", "all_gather", "gather", "scatter", "reduce_scatter", "all_to_all",
                "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single",
                "all_to_all_single", "send", "recv", "barrier")  # fmt: skip
"""Beside these, the engine's sends and receives go through batch_isend_irecv, which is counted too."""


@dataclass(frozen=True)
class Call:
    """What one call of torch.distributed moved."""

    function: str
    within: str
    """The engine's collective that it was made for; "" for none."""
    group_size: int
    sent_bytes: int
    """By this rank: of messages, their size; of other collectives, the size of the tensor."""


class Recorder:
    """Counts this process's torch.distributed calls from `start` on."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._within = ""

    def start(self) -> None:
        for name in TENSOR_CALLS:
            if hasattr(dist, name):
                setattr(dist, name, self._counted(getattr(dist, name), lambda tensor: getattr(tensor, "nbytes", 0)))
        dist.all_gather_object = self._counted(dist.all_gather_object, lambda gathered: 0)
        dist.batch_isend_irecv = self._counted(dist.batch_isend_irecv, sent_bytes)
        for module in (rows, step_module):
            for name in ("reduce_scatter_rows", "all_gather_rows"):
                if hasattr(module, name):
                    label = "metrics" if module is step_module else name.removesuffix("_rows")
                    setattr(module, name, self._named(getattr(collectives, name), label))

    def _counted(self, function: Callable, size: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(first, *rest, **named):
            group = first[0].group if function.__name__ == "batch_isend_irecv" else named.get("group")
            self.calls.append(Call(function.__name__, self._within, dist.get_world_size(group), size(first)))
            return function(first, *rest, **named)

        return wrapper

    def _named(self, function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        def wrapper(*arguments):
            self._within = name
            try:
                return function(*arguments)
            finally:
                self._within = ""

        return wrapper


def sent_bytes(operations: list[dist.P2POp]) -> int:
    return sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)


def make_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    model = Transformer(config, dtype=dtype, device="cpu")
    model.init_weights(0)
    return model


def rollout(vocab: int) -> list[Group]:
    """One group of SEQUENCES responses with different rewards."""
    half = SEQUENCE_TOKENS // 2
    prompt, response = torch.arange(half) % vocab, torch.arange(half) % vocab
    span = Span(response, True, 0, torch.full((half,), -3.0), torch.full((half,), -3.0), temperature=1.0)
    samples = tuple(Sample(index, (span,), "stop", text="") for index in range(SEQUENCES))
    scores = tuple(Score(float(index % 2), {}) for index in range(SEQUENCES))
    return [Group(Prompt(id="0", source="made-up", text="?"), prompt, samples, scores)]


def counted(run_ranks: Callable, ranks: int, config: ModelConfig, dtype: torch.dtype) -> list[list[Call]]:
    """Each rank's calls during one real step of one mini-batch; rank 0 has the samples."""

    def on_this_rank() -> list[Call]:
        recorder = Recorder()
        recorder.start()
        mesh = Mesh.start(Layout(), "cpu", timeout_seconds=30)
        trainer = Trainer(make_model(config, dtype), mesh, TrainConfig(steps=1, lr=1e-3, microbatch_tokens=64))
        recorder.calls.clear()
        groups = rollout(config.vocab_size)
        trainer.train_on(groups if mesh.rank == 0 else [], 1, seed=0)
        calls = list(recorder.calls)
        mesh.close()
        return calls

    return run_ranks(ranks, on_this_rank)


CONFIG = ModelConfig(
    family="llama", vocab_size=40, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=12, max_positions=64, tie_embeddings=True, init_std=0.3,
)  # fmt: skip
"""Its tensors' rows divide by 2 and 4."""


def predicted_bytes(config: ModelConfig, dtype: torch.dtype, ranks: int) -> dict[str, float]:
    """Kind -> bytes that one rank sends over dp in an optimizer step."""
    training = TrainingPlan(
        sequence_length_tokens=SEQUENCE_TOKENS, global_batch_sequences=SEQUENCES,
        precision="fp32" if dtype.itemsize == 4 else "bf16", weights_dtype_bytes=dtype.itemsize,
    )  # fmt: skip
    run = PlannedRun.of(ModelShape.from_hf(config.to_hf(), "made-up"), ranks, training=training)
    transfers = train_step(run).transfers
    assert {transfer.axis for transfer in transfers} == {"zero"}, "data-parallel ranks of a dense model talk about nothing else"
    assert len(transfers) == len({transfer.kind for transfer in transfers})
    return {transfer.kind: transfer.bytes_per_rank for transfer in transfers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_byte_of_a_real_step_is_predicted(run_ranks, ranks: int, dtype: torch.dtype) -> None:
    predicted = predicted_bytes(CONFIG, dtype, ranks)
    for calls in counted(run_ranks, ranks, CONFIG, dtype):
        assert {call.group_size for call in calls} == {ranks}
        sent, times = Counter(), Counter()
        for call in calls:
            sent[call.function, call.within] += call.sent_bytes
            times[call.function, call.within] += 1
        assert sent.pop(("batch_isend_irecv", "reduce_scatter")) == predicted["reduce_scatter"]
        assert sent.pop(("batch_isend_irecv", "all_gather")) == predicted["all_gather"]
        # What the planner leaves out: three small messages and the census of the samples, pickled.
        assert sent == {
            ("batch_isend_irecv", "metrics"): (ranks - 1) * 4 * len(METRIC_FIELDS),
            ("all_reduce", ""): 8 + 2 * 8,  # the gradient norm, fp64; counts of micro-batches with and without gradient
            ("all_gather_object", ""): 0,
        }
        assert times["all_reduce", ""] == 2 and times["all_gather_object", ""] == 1


def test_rows_that_do_not_divide_are_padded(run_ranks) -> None:
    """The planner leaves out this engine's padding: at most ranks - 1 rows of each tensor."""
    config = replace(CONFIG, vocab_size=37)
    predicted = predicted_bytes(config, torch.float32, 2)
    for calls in counted(run_ranks, 2, config, torch.float32):
        for kind in ("reduce_scatter", "all_gather"):
            sent = sum(call.sent_bytes for call in calls if call.within == kind)
            assert sent == predicted[kind] + 4 * config.hidden_size / 2, "one row of the embedding, half of it"
