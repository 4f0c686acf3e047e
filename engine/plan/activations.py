"""Activation memory, tensor by tensor: what each layer keeps for its backward pass and what that pass needs while it runs.

The list is that of a Megatron / Transformer Engine layer with flash attention, which the engine's own layers follow: every
product keeps its input (in FP8 where it multiplies FP8), a norm its input and its output, attention q, k, v, its output and the
log-sum-exp, SwiGLU the output of the product before it. Of a GPT layer's 34 bytes a token and hidden element (Korthikanti et
al., arXiv 2205.05198) two are dropout masks, which are gone, and four come for q and k, kept rotated beside the projection's
output. Checked against measured peaks: benchmarks/planner_memory_rows.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .in_flight import most_held_bytes
from .run import PlannedRun, RecomputePart, Stage
from .states import alike_layers

LSE_BYTES = 4
ROUTER_BYTES = 9
"""A token and expert: fp32 logits and probabilities, and the map of who goes where."""
FUSED_LOGITS_BYTES = 512 * 2**20
"""What strop.kernels lets logits and their gradient take on a GPU (BUFFER_BYTES of kernels/lm_head.py)."""
LOGIT_BYTES = {"in-place": 2, "materialized": 8, "eager": 12, "retained": 16}
"""A logit, at the moment that holds most. in-place: 16 bits, the gradient takes their place. materialized: the 16-bit logits,
the fp32 softmax that becomes their gradient, and that gradient in 16 bits (Megatron-LM, core/tensor_parallel/cross_entropy.py).
eager: the fp32 log-softmax, its gradient and the logits' gradient; retained: the fp32 logits beside them."""
SPLIT_LOGIT_BYTES = 4
"""More of eager and retained over tensor-parallel ranks: log-softmax, one-hot gradient, softmax and their sum are all fp32
(PyTorch, torch/distributed/tensor/parallel/loss.py)."""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that one layer keeps of one micro-batch on one rank until its backward pass has used it."""

    name: str
    size_bytes: float
    recomputed_by: frozenset[RecomputePart]
    """It isn't kept if any of these parts is recomputed."""


def saved_tensors(run: PlannedRun, layer: int) -> tuple[SavedTensor, ...]:
    """All tensors of one layer (or MTP module), as if nothing were recomputed."""
    mlp = _dense_mlp(run) if run.shape.kind(layer) == "dense" else _moe(run)
    attention = _grouped_query_attention(run) if run.shape.mla is None else _latent_attention(run)
    return (*_norms(run, layer), *attention, *mlp)


def kept_bytes(run: PlannedRun, layer: int, recompute: bool = True) -> float:
    """Bytes of one layer and micro-batch that wait for the backward pass; recompute: TrainingPlan.recompute holds for it."""
    recomputed = set(run.training.recompute) if recompute else set()
    kept = sum(tensor.size_bytes for tensor in saved_tensors(run, layer) if not tensor.recomputed_by & recomputed)
    if "every_second_product" in recomputed:  # it keeps the down projection's output, although nothing needs it
        kept += run.tokens_outside * run.shape.hidden_size * run.training.element_bytes
    return kept


def rank_kept_bytes(run: PlannedRun) -> list[float]:
    """Of all layers and micro-batches in flight on each pipeline rank, and the last norm's input and output.

    Where the exchange of experts is hidden behind another micro-batch, that one's forward pass is a layer ahead of what the
    backward pass has freed (DualPipe counts it in its pp + 1).
    """
    recomputed, kept_by_sort = run.recomputed_layers(), {}

    def kept(layer: int) -> float:
        sort = run.shape.kind(layer), layer in recomputed
        if sort not in kept_by_sort:
            kept_by_sort[sort] = kept_bytes(run, layer, layer in recomputed)
        return kept_by_sort[sort]

    of_chunks = [[] for _ in range(run.layout.pp)]
    for layers, ranks in zip(run.chunks(), run.ranks_of_chunk(), strict=True):
        for rank in ranks:
            of_chunks[rank].append(sum(map(kept, layers)))
    is_ahead = run.pairs_passes and run.layout.schedule not in ("dualpipe", "dualpipev")
    last_norm = 2 * run.tokens_outside * run.shape.hidden_size * run.training.element_bytes
    return [
        float(held) + (max(map(kept, stage.layers), default=0.0) if is_ahead else 0.0) + stage.has_head * last_norm
        for held, stage in zip(most_held_bytes(run, np.array(of_chunks)), run.stages(), strict=True)
    ]


def layer_working_bytes(run: PlannedRun, stage: Stage) -> float:
    """While the backward pass is in one layer: what it has computed again there, and gradients on their way; the worst layer.

    Gradients: of the MLP's or the attention's wide tensors, whichever are larger, and of the hidden state, whole where sequence
    parallelism gathers it; with experts also the dispatched tokens' gradient beside its send buffer. A gradient as wide as a
    saved tensor that its making sets free isn't counted (SwiGLU's output).
    """
    worst = 0.0
    for alike in alike_layers(run, stage):
        again = kept_bytes(run, alike.example, recompute=False) - kept_bytes(run, alike.example, alike.recomputed)
        worst = max(worst, again + _gradient_bytes(run, alike.example))
    return worst


def head_working_bytes(run: PlannedRun, stage: Stage) -> tuple[float, float]:
    """While the backward pass is in the head: (bytes of logits and their gradient, bytes of anything else); 0 without a head.

    Logits are split over the tensor-parallel ranks, once more for each MTP module. Anything else: the hidden state gathered,
    and its gradient.
    """
    if not stage.has_head:
        return 0.0, 0.0
    shape, training, tokens = run.shape, run.training, run.microbatch_tokens
    rows = shape.vocab_size / run.layout.tp
    hidden = 2 * tokens * shape.hidden_size * run.training.element_bytes
    if training.logits == "fused":
        return min(FUSED_LOGITS_BYTES, LOGIT_BYTES["materialized"] * tokens * rows), hidden
    split_eager = training.logits in ("eager", "retained") and run.layout.tp > 1
    logit_bytes = LOGIT_BYTES[training.logits] + (SPLIT_LOGIT_BYTES if split_eager else 0)
    return logit_bytes * tokens * rows * (1 + shape.num_mtp_layers), hidden


def _product_input_bytes(run: PlannedRun) -> int:
    """Of an element kept as a product's input alone: Transformer Engine keeps it in FP8 if the product is."""
    return 1 if run.training.precision.startswith("fp8") else run.training.element_bytes


def _keeps_fp8(run: PlannedRun) -> bool:
    """DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3.3): where SwiGLU is recomputed, its input waits in FP8 too, and the
    attention's output in 12 bits (E5M6) once for both who need it."""
    return run.training.precision == "fp8-blockwise" and "activation" in run.training.recompute


def _gate_and_up_bytes(run: PlannedRun) -> int:
    return 1 if _keeps_fp8(run) else run.training.element_bytes


def _is_ulysses(run: PlannedRun) -> bool:
    return run.layout.cp > 1 and run.layout.cp_kind == "ulysses"


def _tensor(name: str, size: float, *recomputed_by: RecomputePart) -> SavedTensor:
    return SavedTensor(name, size, frozenset(("layer", "every_second_product", *recomputed_by)))


def _kept_by_every_second(name: str, size: float, *recomputed_by: RecomputePart) -> SavedTensor:
    """One that every_second_product keeps: the output of an odd product, or of attention."""
    return SavedTensor(name, size, frozenset(("layer", *recomputed_by)))


def _norms(run: PlannedRun, layer: int) -> Iterator[SavedTensor]:
    state = run.tokens_outside * run.shape.hidden_size
    moe = run.shape.kind(layer) == "moe"  # the router reads 16 bits
    yield SavedTensor("layer input", state * run.training.element_bytes, frozenset())
    yield _tensor("attention norm output", state * _product_input_bytes(run), "norms")
    yield _tensor("state after attention", state * run.training.element_bytes)
    yield _tensor("mlp norm output", state * (run.training.element_bytes if moe else _product_input_bytes(run)), "norms")


def _grouped_query_attention(run: PlannedRun) -> Iterator[SavedTensor]:
    """Heads are split over tensor-parallel ranks. v is a view of the projection's output, which it keeps alive as a whole; q
    and k were rotated into tensors of their own. An all-to-all over heads (Ulysses) makes a new v too, and keeps copied heads'
    k and v as often as it copies them."""
    shape, tokens, element = run.shape, run.microbatch_tokens, run.training.element_bytes
    heads = shape.num_heads / run.layout.tp
    query = tokens * heads * shape.head_dim * element
    key = tokens * run.attended_kv_heads * shape.head_dim * element
    if _is_ulysses(run):
        yield _tensor("v", key)
    else:
        yield _kept_by_every_second("q and v projections' output", query + key)
        yield _tensor("k projection's output", key)
    yield _tensor("q", query)
    yield _tensor("k", key)
    if shape.qk_norm:
        yield _tensor("q norm input", query)  # a copy: heads of one group are not contiguous in the projection's output
    yield from _attention_output(run, query, heads)


def _latent_attention(run: PlannedRun) -> Iterator[SavedTensor]:
    """MLA in its training form: compressed vectors on every rank, up-projected heads split."""
    shape, mla, tokens, element = run.shape, run.shape.mla, run.microbatch_tokens, run.training.element_bytes
    heads = shape.num_heads / run.layout.tp
    compressed = run.tokens_outside * (mla.q_rank + mla.kv_rank)
    yield _kept_by_every_second(
        "compressed q and kv, shared key", compressed * element + run.tokens_outside * mla.rope_dim * element
    )
    yield _tensor("compressed norms' output", compressed * _product_input_bytes(run), "norms")
    yield _tensor("q", tokens * heads * (mla.nope_dim + mla.rope_dim) * element, "mla_up_projection")
    yield _tensor("k", tokens * heads * (mla.nope_dim + mla.rope_dim) * element, "mla_up_projection")
    yield _tensor("v", tokens * heads * mla.value_dim * element, "mla_up_projection")
    yield from _attention_output(run, tokens * heads * mla.value_dim * element, heads)


def _attention_output(run: PlannedRun, size: float, heads: float) -> Iterator[SavedTensor]:
    """One tensor for attention and the projection behind it; two where that one reads FP8, or where an all-to-all over heads
    (Ulysses) lies between them."""
    yield _kept_by_every_second("attention output", size * 12 / 16 if _keeps_fp8(run) else size)
    if run.training.precision.startswith("fp8") and not _keeps_fp8(run):
        yield _tensor("output projection input", size / 2)
    elif _is_ulysses(run):
        yield _tensor("output projection input", size)
    yield _kept_by_every_second("log-sum-exp", run.microbatch_tokens * heads * LSE_BYTES, "core_attention")


def _dense_mlp(run: PlannedRun) -> Iterator[SavedTensor]:
    width = run.microbatch_tokens * run.shape.dense_intermediate_size / run.layout.tp
    yield _kept_by_every_second("gate", width * _gate_and_up_bytes(run), "dense_mlp")
    yield _tensor("up", width * _gate_and_up_bytes(run), "dense_mlp")
    yield _tensor("SwiGLU output", width * _product_input_bytes(run), "activation", "dense_mlp")


def _moe(run: PlannedRun) -> Iterator[SavedTensor]:
    """Expert tensors are those of the busiest rank. The router's probabilities multiply the SwiGLU output, so that the second
    product's output need not be kept (Megatron, moe_permute_fusion)."""
    shape, moe, tokens = run.shape, run.shape.moe, run.tokens_outside
    copies, width = run.expert_token_copies, moe.expert_intermediate_size / run.layout.etp
    yield _tensor("router", tokens * moe.num_experts * ROUTER_BYTES, "experts")
    yield _tensor("dispatched tokens", copies * shape.hidden_size * _product_input_bytes(run), "experts")
    yield _tensor("experts' gate and up", 2 * copies * width * _gate_and_up_bytes(run), "experts")
    yield _tensor("experts' SwiGLU output", copies * width * _product_input_bytes(run), "activation", "experts")
    if moe.shared_intermediate_size:
        shared = run.microbatch_tokens * moe.shared_intermediate_size / run.layout.tp
        yield _tensor("shared experts' gate and up", 2 * shared * _gate_and_up_bytes(run), "experts")
        yield _tensor("shared experts' SwiGLU output", shared * _product_input_bytes(run), "activation", "experts")


def _gradient_bytes(run: PlannedRun, layer: int) -> float:
    shape, tokens, element = run.shape, run.microbatch_tokens, run.training.element_bytes
    tp = run.layout.tp
    if shape.kind(layer) == "dense":
        mlp = 2 * tokens * shape.dense_intermediate_size / tp
    else:
        copies = run.expert_token_copies
        mlp = 2 * copies * (shape.moe.expert_intermediate_size / run.layout.etp + shape.hidden_size)
    widths = (shape.mla.nope_dim + shape.mla.rope_dim, shape.mla.value_dim) if shape.mla else (shape.head_dim, shape.head_dim)
    attention = tokens * (shape.num_heads / tp + run.attended_kv_heads) * sum(widths)
    return (max(mlp, attention) + 2 * tokens * shape.hidden_size) * element
