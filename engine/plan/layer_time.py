"""What one pipeline rank computes for one micro-batch, operation by operation, in seconds.

A layer is a list of `Operation`s in the order of its forward pass. Matrix products go by their sizes on this rank after
tp / sp / cp / ep / etp; everything else goes by the bytes it reads and writes. The weight gradient of a product [m, k] x [k, n]
is [n, m] x [m, k] and its input gradient [m, n] x [n, k].
"""

from dataclasses import dataclass

from .devices import DeviceFacts
from .efficiency import Precision, attention_seconds, gemm_seconds, grouped_gemm_seconds, memory_bound_seconds
from .facts import attention_core_flops_per_token
from .run import Dispatcher, PlannedRun, RecomputePart
from .shape import MoeShape


@dataclass(frozen=True)
class QuantizeBytes:
    """Moved per element to make the FP8 forms of a product's operands; on Hopper weight gradients need transposed ones."""

    forward: float
    """Of the input, before the forward product."""
    backward_input: float
    """Of the output's gradient, before the input gradient."""
    weight_input: float = 0.0
    """Of the kept input, before the weight gradient."""
    weight_gradient: float = 0.0
    """Of the output's gradient, before the weight gradient."""


QUANTIZE_BYTES = {
    # Transformer Engine: one reading for the largest value, another that writes the tensor and its transpose.
    "fp8-tensorwise": QuantizeBytes(forward=6, backward_input=6),
    # DeepSeek-V3 (arXiv 2412.19437, section 3.3.2): read 2 and write 1. Tiles of 1x128 are not tiles of the transpose: the kept
    # FP8 input is read and written once more, and the gradient is quantised a second time.
    "fp8-blockwise": QuantizeBytes(forward=3, backward_input=3, weight_input=2, weight_gradient=3),
}
FUSED_PASSES = 2.6
"""Seconds of element-wise operations as training libraries fuse them over those of the fewest bytes that they could move:
layout copies, fp32 intermediates, kernels below the memory's bandwidth. Fitted on rows (benchmarks/planner.py --fit)."""
EAGER_PASSES = 4.0
"""The same of operations run one by one. Counted, a norm moves 9 times the fewest bytes (its fp32 copy, square, mean, product,
cast, scale), a rotation 4, a SwiGLU 1.7, a residual 1: 3.1 in a Llama layer; times 1.3 for layout copies."""
FLASH2_SECONDS: dict[bool, float] = {False: 1.75, True: 1.6}
"""Forward (False) and backward (True) of FlashAttention 2 over 3 on Hopper: 1.5-2.0 and 1.5-1.75 (arXiv 2407.08608, abstract
and section 4)."""
PRODUCT_LAUNCHES = 3
"""Kernels' worth of CPU time of one linear module (Transformer Engine's Python beside its one product); a module of several
experts launches a product for each of them."""
ROUTER_KERNELS = 30
"""Of a router beside its product: scores, top-k, normalisation, counts, map, auxiliary loss (Megatron core's router)."""
EXCHANGE_KERNELS: dict[Dispatcher, int] = {"alltoall": 16, "deepep": 8, "hybridep": 6}
"""Of sending tokens to their experts or back: counts, layouts, the transfer, sorting."""


@dataclass(frozen=True)
class Operation:
    """One step of a layer on one rank for one micro-batch."""

    name: str
    forward_seconds: float
    backward_input_seconds: float
    backward_weight_seconds: float = 0.0
    forward_kernels: int = 1
    backward_kernels: int = 1
    recomputed_with: tuple[RecomputePart, ...] = ()
    """The settings of TrainingPlan.recompute, beside "layer", that run its forward pass again."""
    second_product_share: float = 1.0
    """The share of it that "every_second_product" runs again."""


@dataclass(frozen=True)
class Work:
    """Sizes that all operations of a run share."""

    run: PlannedRun
    device: DeviceFacts

    @property
    def tokens(self) -> int:
        """Of a micro-batch, before tensor-parallel ranks divide anything."""
        return self.run.microbatch_tokens

    @property
    def tokens_outside(self) -> float:
        return self.run.tokens_outside

    @property
    def routed_rows(self) -> float:
        """Token copies that this rank's experts see."""
        return self.run.expert_token_copies

    @property
    def element_bytes(self) -> int:
        return self.run.training.element_bytes

    @property
    def unquantized(self) -> Precision:
        """Of attention, router and head, which no precision makes FP8."""
        return "fp32" if self.run.training.precision == "fp32" else "bf16"

    @property
    def passes(self) -> float:
        return FUSED_PASSES if self.run.training.compiled else EAGER_PASSES

    def product(
        self,
        name: str,
        m: float,
        n: float,
        k: float,
        *parts: RecomputePart,
        groups: int = 1,
        precision: Precision | None = None,
        second_product_share: float = 0.0,
    ) -> Operation:
        """`groups` products [m, k] x [k, n] and what quantising their inputs and gradients costs."""
        precision = precision or self.run.training.precision
        forward, gradient, weight = (self._seconds(groups, *sizes, precision) for sizes in ((m, n, k), (m, k, n), (n, k, m)))
        accumulated_bytes = 2 * self.run.training.gradient_dtype_bytes * groups * n * k
        weight = max(weight, memory_bound_seconds(self.device, accumulated_bytes + self.element_bytes * groups * m * (n + k)))
        casts = QUANTIZE_BYTES.get(precision)
        cast_kernels = 0
        if casts is not None:
            cast_kernels = groups
            elements = groups * m
            forward += memory_bound_seconds(self.device, casts.forward * elements * k)
            gradient += memory_bound_seconds(self.device, casts.backward_input * elements * n)
            weight += memory_bound_seconds(self.device, elements * (casts.weight_input * k + casts.weight_gradient * n))
        launches = PRODUCT_LAUNCHES - 1 + groups
        return Operation(
            name,
            forward,
            gradient,
            weight,
            launches + cast_kernels,
            2 * (launches + cast_kernels),
            parts,
            second_product_share,
        )

    def _seconds(self, groups: int, m: float, n: float, k: float, precision: Precision) -> float:
        if groups == 1:
            return gemm_seconds(self.device, m, n, k, precision)
        return grouped_gemm_seconds(self.device, groups, m, n, k, precision)

    def elementwise(
        self,
        name: str,
        forward_elements: float,
        backward_elements: float,
        *parts: RecomputePart,
        forward_kernels: int = 1,
        backward_kernels: int = 1,
        fixed: bool = False,
    ) -> Operation:
        """An operation that reads and writes this many elements; `fixed`: eager code moves no more of them."""
        passes = FUSED_PASSES if fixed else self.passes
        more = 1.0 if self.run.training.compiled or fixed else EAGER_PASSES / FUSED_PASSES
        kernels = [round(count * more) for count in (forward_kernels, backward_kernels)]
        forward, backward = (
            memory_bound_seconds(self.device, self.element_bytes * elements * passes, count)
            for elements, count in zip((forward_elements, backward_elements), kernels, strict=True)
        )
        return Operation(name, forward, backward, 0.0, *kernels, parts)


def layer_operations(work: Work, layer: int) -> list[Operation]:
    """Operations of a layer; layer >= num_layers: of an MTP module, without its head."""
    shape = work.run.shape
    hidden = shape.hidden_size * work.tokens_outside
    operations = []
    if layer >= shape.num_layers:
        operations.append(work.elementwise("mtp_norms", 4 * hidden, 8 * hidden, forward_kernels=3, backward_kernels=3))
        operations.append(work.product("mtp_projection", work.tokens_outside, shape.hidden_size, 2 * shape.hidden_size))
    operations.append(_norm(work, "attention_norm"))
    operations += _latent_attention(work, layer) if shape.mla is not None else _grouped_attention(work, layer)
    operations += [_residual(work, "attention_residual"), _norm(work, "mlp_norm")]
    operations += _experts(work, shape.moe) if shape.kind(layer) == "moe" else _dense_mlp(work)
    operations.append(_residual(work, "mlp_residual"))
    return operations


def _norm(work: Work, name: str) -> Operation:
    elements = work.run.shape.hidden_size * work.tokens_outside
    return work.elementwise(name, 2 * elements, 3 * elements, "norms", backward_kernels=2)


def _residual(work: Work, name: str) -> Operation:
    """x + f(x); backward, two gradients are added."""
    elements = work.run.shape.hidden_size * work.tokens_outside
    return work.elementwise(name, 3 * elements, 3 * elements)


def _grouped_attention(work: Work, layer: int) -> list[Operation]:
    shape, tp = work.run.shape, work.run.layout.tp
    query = shape.num_heads // tp * shape.head_dim
    key = max(1, shape.num_kv_heads // tp) * shape.head_dim  # copied to every rank where there are fewer heads than ranks
    rotated = work.tokens * (query + key)
    # Rotating, splitting and laying out q, k, v; the norms of q and k before.
    forward, backward = (2 + 2 * shape.qk_norm) * rotated, (2 + 3 * shape.qk_norm) * rotated
    copied = 2 * work.tokens * (query + 2 * key)
    return [
        work.product("qkv", work.tokens, query + 2 * key, shape.hidden_size, second_product_share=key / (query + 2 * key)),
        work.elementwise(
            "qkv_layout", forward + copied, backward + copied, forward_kernels=5 + 2 * shape.qk_norm, backward_kernels=5
        ),
        _core_attention(work, layer, shape.head_dim),
        work.product("attention_output", work.tokens, shape.hidden_size, query, second_product_share=1.0),
    ]


def _latent_attention(work: Work, layer: int) -> list[Operation]:
    """DeepSeek-V2's attention as trained: keys and values of every head are made from the compressed vector."""
    shape, mla, tp = work.run.shape, work.run.shape.mla, work.run.layout.tp
    heads, hidden, outside = shape.num_heads // tp, shape.hidden_size, work.tokens_outside
    query, width = heads * (mla.nope_dim + mla.rope_dim), heads * (mla.nope_dim + mla.value_dim)
    compressed = outside * (mla.q_rank + mla.kv_rank)
    operations = [work.product("kv_down", outside, mla.kv_rank + mla.rope_dim, hidden)]
    if mla.q_rank:
        operations.append(work.product("q_down", outside, mla.q_rank, hidden))
        operations.append(work.product("q_up", work.tokens, query, mla.q_rank, "mla_up_projection"))
    else:
        operations.append(work.product("q", work.tokens, query, hidden, "mla_up_projection"))
    laid_out = 2 * work.tokens * (2 * query + heads * mla.value_dim)
    return [
        *operations,
        work.elementwise("latent_norms", 2 * compressed, 3 * compressed, "norms", forward_kernels=2, backward_kernels=4),
        work.product("kv_up", work.tokens, width, mla.kv_rank, "mla_up_projection"),
        work.elementwise("qkv_layout", laid_out, laid_out, "mla_up_projection", forward_kernels=6, backward_kernels=6),
        _core_attention(work, layer, mla.nope_dim + mla.rope_dim),
        work.product("attention_output", work.tokens, hidden, heads * mla.value_dim, second_product_share=1.0),
    ]


def _core_attention(work: Work, layer: int, head_dim: int) -> Operation:
    sequence = work.run.training.attention_length_tokens
    flops = work.tokens / work.run.layout.tp * attention_core_flops_per_token(work.run.shape, layer, sequence)
    slower = work.run.training.attention_kernel == "flash2" and work.device.architecture != "ampere"  # whose curve is of it
    forward, backward = (
        attention_seconds(work.device, flops, backward, head_dim, sequence, work.unquantized)
        * (FLASH2_SECONDS[backward] if slower else 1.0)
        for backward in (False, True)
    )
    return Operation("core_attention", forward, backward, 0.0, 2, 4, ("core_attention",), 0.0)


def _dense_mlp(work: Work) -> list[Operation]:
    shape, tp = work.run.shape, work.run.layout.tp
    return _mlp(work, "dense", work.tokens, shape.hidden_size, shape.dense_intermediate_size / tp, "dense_mlp")


def _mlp(
    work: Work, name: str, rows: float, hidden: int, width: float, part: RecomputePart, groups: int = 1
) -> list[Operation]:
    """SwiGLU: `rows` a group through [hidden, 2 width], the activation and [width, hidden]."""
    gated = groups * rows * width
    return [
        work.product(f"{name}_gate_up", rows, 2 * width, hidden, part, groups=groups, second_product_share=0.5),
        work.elementwise(f"{name}_activation", 3 * gated, 5 * gated, "activation", part),
        work.product(f"{name}_down", rows, hidden, width, part, groups=groups),
    ]


def _experts(work: Work, moe: MoeShape) -> list[Operation]:
    """Router, dispatch, experts and the shared expert. The transfers are `layer_exchange`'s."""
    shape, layout, training = work.run.shape, work.run.layout, work.run.training
    hidden, rows, outside = shape.hidden_size, work.routed_rows, work.tokens_outside
    local_experts = moe.num_experts // layout.ep
    scores = outside * moe.num_experts
    # Sorting tokens by expert and summing them again; an all-to-all of copies is sorted on both of its sides.
    sorted_elements = 2 * rows * hidden + (2 * rows * hidden if training.dispatcher == "alltoall" and layout.ep > 1 else 0)
    kernels = EXCHANGE_KERNELS[training.dispatcher]
    operations = [
        work.product("router", outside, moe.num_experts, hidden, "experts", precision=work.unquantized),
        work.elementwise("routing", 12 * scores, 12 * scores, "experts", forward_kernels=ROUTER_KERNELS, backward_kernels=8),
    ]
    if moe.shared_intermediate_size:
        width = moe.shared_intermediate_size / layout.tp
        operations += _mlp(work, "shared", work.tokens, hidden, width, "experts")
    width = moe.expert_intermediate_size / layout.etp
    return [
        *operations,
        work.elementwise(
            "permute",
            sorted_elements,
            sorted_elements,
            "experts",
            forward_kernels=kernels,
            backward_kernels=kernels,
            fixed=True,
        ),
        *_mlp(work, "experts", rows / local_experts, hidden, width, "experts", groups=local_experts),
        work.elementwise(
            "unpermute",
            sorted_elements,
            sorted_elements,
            "experts",
            forward_kernels=kernels,
            backward_kernels=kernels,
            fixed=True,
        ),
    ]


def embedding_operations(work: Work) -> list[Operation]:
    elements = work.tokens_outside * work.run.shape.hidden_size
    return [work.elementwise("embedding", 2 * elements, 4 * elements, forward_kernels=2, backward_kernels=2)]


LOGIT_BYTES_MOVED: dict[str, tuple[float, float]] = {
    "fused": (8, 2),
    "in-place": (4, 2),
    "materialized": (24, 14),
    "eager": (20, 24),
    "retained": (20, 24),
}
"""By the loss per logit, forward and backward. fused: an fp32 chunk is read twice, its gradient written; in-place: 16-bit
logits read, then read and overwritten; materialized: copied to fp32, largest, exponentials, sum, then the gradient in fp32 and
its 16-bit copy; eager, retained: copied to fp32, log-softmax and its reading, backward the gradient of each and the copy."""


def head_operations(work: Work) -> list[Operation]:
    """The last norm, the head and the loss, never in FP8: 6 N H V operations whatever becomes of the logits."""
    vocabulary = work.run.shape.vocab_size / work.run.layout.tp
    forward, backward = (
        memory_bound_seconds(work.device, logit_bytes * work.tokens * vocabulary, kernels=6)
        for logit_bytes in LOGIT_BYTES_MOVED[work.run.training.logits]
    )
    return [
        _norm(work, "last_norm"),
        work.product("head", work.tokens, vocabulary, work.run.shape.hidden_size, precision=work.unquantized),
        Operation("loss", forward, backward, forward_kernels=6, backward_kernels=6),
    ]


def is_recomputed(operation: Operation, recompute: tuple[RecomputePart, ...]) -> bool:
    """Whether the backward pass runs all of an operation again, with what it needs from other ranks."""
    return "layer" in recompute or any(part in recompute for part in operation.recomputed_with)


def recomputed_share(operation: Operation, recompute: tuple[RecomputePart, ...]) -> float:
    """The share of an operation's forward pass that the backward pass runs again."""
    if is_recomputed(operation, recompute):
        return 1.0
    return operation.second_product_share if "every_second_product" in recompute else 0.0
