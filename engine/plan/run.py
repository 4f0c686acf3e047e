"""What a prediction needs to know: `PlannedRun`, a model on a number of GPUs with a layout, a training and a rollout part."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ..config import InputError, Layout, Placement
from .lengths import ResponseLengths
from .packing import with_batch
from .shape import ModelShape
from .stages import LayerDivision, Stage, chunks_of, ranks_of_chunks, stages_of
from .validation import problems

TrainingPrecision = Literal["fp32", "bf16", "fp8-tensorwise", "fp8-blockwise"]
RecomputePart = Literal[
    "norms", "activation", "mla_up_projection", "core_attention", "dense_mlp", "experts", "every_second_product", "layer"
]
Dispatcher = Literal["alltoall", "deepep", "hybridep"]
WeightSync = Literal["alias", "local_copy", "reshard", "broadcast", "stream"]


@dataclass(frozen=True)
class TrainingPlan:
    """One optimizer step of training."""

    sequence_length_tokens: int = 4096
    """Tokens of a (packed) sequence."""
    packed_length_tokens: int = 0
    """Of the sequences packed into one, the length that a mean token's has: attention sees no farther. 0: one fills it."""
    global_batch_sequences: int = 256
    """Sequences an optimizer step, over all data-parallel replicas. With a rollout it follows from the samples."""
    micro_batch_sequences: int = 1
    """Sequences a forward pass of one replica."""
    precision: TrainingPrecision = "bf16"
    """Of the matrix products of layers. fp8-tensorwise: one scale a tensor (Transformer Engine's current scaling);
    fp8-blockwise: 1x128 activations and 128x128 weights (DeepSeek-V3)."""
    recompute: tuple[RecomputePart, ...] = ()
    """What the backward pass computes again instead of keeping. Unset: nothing; layer: everything but the layers' inputs;
    every_second_product: key, output and up projection with all element-wise operations (torchtitan's selective "op")."""
    recompute_layers: int = 0
    """Layers of a pipeline rank that recomputation holds for, its first ones; 0: all."""
    weights_dtype_bytes: int = 2
    """Of a weight as the layers compute with it; 4 for fp32 training and for FSDP of fp32 weights."""
    gradient_dtype_bytes: int = 4
    """4: fp32 main gradients; 2: bf16."""
    moment_dtype_bytes: int = 4
    """Of each of Adam's two moments; 2: bf16 (DeepSeek-V3)."""
    master_weights: bool = True
    """The optimizer keeps the weights in fp32 too; False: it updates them as they are (AutoModel: torch.optim.Adam in bf16)."""
    fsdp: bool = False
    """Weights and gradients are sharded over the data-parallel ranks too (ZeRO-3) instead of the optimizer's states alone
    (ZeRO-1)."""
    resident_gradients: bool = False
    """Gradient buffers live as long as the trainer (strop's own do); False: colocated engines get their memory."""
    offload_optimizer: bool = False
    """Optimizer states live in the host's memory and the CPU updates the weights."""
    logits: Literal["fused", "in-place", "materialized", "eager", "retained"] = "fused"
    """fused: the head's logits exist a chunk at a time (strop.kernels). All at once: in-place, in 16 bits, their gradient
    written over them (Transformer Engine's fused cross entropy, NVIDIA's recipes); materialized, as fp32 softmax that becomes
    the gradient (Megatron's own); eager, torch's cross entropy of logits cast to fp32, with gradients of its own (torchtitan);
    retained, that while the loop's own reference keeps the fp32 logits too (output.logits of Hugging Face models)."""
    dispatcher: Dispatcher = "deepep"
    """How tokens reach their experts: NCCL's all-to-all of every copy, or DeepEP / HybridEP: a token goes to a node once."""
    dispatch_dtype_bytes: int = 2
    """Of a hidden element on its way to the experts; 1: FP8 (DeepSeek-V3). It comes back as bf16."""
    expert_imbalance: float = 1.0
    """Tokens of the busiest expert-parallel rank over the mean; 1 is forced balance."""
    overlap_expert: bool = False
    """Dispatch and combine of one micro-batch run beside the computation of another (1F1B overlap, DualPipe)."""
    overlap_tensor: bool = True
    """Tensor-parallel collectives run beside pieces of the product that needs them."""
    overlap_data: bool = True
    """Gradients are scattered and weights gathered beside the last and the first micro-batch; with FSDP that gathers in every
    pass, beside the passes of neighbouring layers."""
    attention_kernel: Literal["flash2", "flash3"] = "flash3"
    """FlashAttention's generation. 2 is what torch's scaled_dot_product_attention runs; 3 stands for cuDNN's as well."""
    compiled: bool = True
    """Element-wise operations are fused (Transformer Engine, torch.compile, own kernels) instead of eager, one by one."""
    cuda_graphs: bool = False
    """No time is lost between kernels. Where kernels are long this is an upper bound of what CUDA graphs gain: the CPU of an
    eager step runs ahead there too."""

    @property
    def attention_length_tokens(self) -> int:
        """Of the sequences that attention stays inside."""
        return self.packed_length_tokens or self.sequence_length_tokens

    @property
    def element_bytes(self) -> int:
        """Of an activation, as it is kept and sent wherever nothing makes it FP8."""
        return 4 if self.precision == "fp32" else 2

    @property
    def gathered_weight_bytes(self) -> int:
        """Of a weight that FSDP gathers: fp32 shards are cast to the products' type before (FSDP2's MixedPrecisionPolicy)."""
        return min(self.weights_dtype_bytes, self.element_bytes)


@dataclass(frozen=True)
class RolloutPlan:
    """Generation of one GRPO step's samples."""

    prompts_per_step: int = 64
    """Questions a GRPO step."""
    group_size: int = 16
    """Responses to each question."""
    prompt_tokens: float = 256.0
    """Mean length of a prompt, in tokens."""
    mean_response_tokens: float = 1024.0
    """Mean length of a response, in tokens, after the cut."""
    max_response_tokens: int = 3840
    """Where a response is cut. With a prompt of 256 tokens the longest sample fills a sequence of 4096."""
    response_spread: float = 0.8
    """Standard deviation of the logarithm of response lengths before the cut (lognormal)."""
    gpus: int = 0
    """Split placement: the GPUs that only generate; 0 with colocated placement (all of them take turns)."""
    tp: int = 1
    """Tensor-parallel GPUs of one engine."""
    pp: int = 1
    """Pipeline stages of one engine."""
    ep: int = 1
    """Expert-parallel GPUs of one engine; data-parallel attention where it exceeds tp."""
    weights_dtype_bytes: float = 2
    """Of a weight in the layers' matrices: 1 for FP8; 0.5 for 4 bits, multiplied in bf16. All others have at least 2."""
    kv_dtype_bytes: int = 2
    """Of an element of the KV cache; 1 for FP8."""
    memory_fraction: float = 0.8
    """Share of a GPU's memory that weights and KV cache may take while generating (vLLM's gpu_memory_utilization has CUDA's and
    NCCL's own memory in it too)."""
    max_sequences: int = 1024
    """Most sequences that one engine decodes at once."""
    speculative_tokens: float = 1.0
    """Tokens accepted a decoding step; 1 without speculation. Above 1, the next whole number of tokens is verified a step."""
    cuda_graphs: bool = True
    """Decoding steps are replayed from CUDA graphs; False (vLLM's enforce_eager): Python launches every kernel."""
    steps_ahead: int = 0
    """Steps of staleness: 0 generates and trains in turn; k > 0 (split only) trains on samples up to k versions old."""
    continuous: bool = True
    """With steps_ahead of 2 and more: as sequences end, those of later steps start, through weight updates too (in-flight
    updates, partial rollouts), so that engines never drain. With 1 they do: a step's samples start with the weights of the
    step before the last, so not before the samples of the last step were trained on. False: they always drain."""
    weight_sync: WeightSync = "reshard"
    """How the trainer's weights reach the engines. alias: they are the trainer's; local_copy: cast or fused on the same GPU;
    reshard: each GPU receives only what it lacks; broadcast: each engine GPU receives every tensor whole, in packed buckets;
    stream: all trainer ranks gather every tensor whole, one after another, and hand it over."""
    offload_training: bool = False
    """Colocated: optimizer states of the trainer go to the host's memory before the engines get its weights, and its weights
    after that, until the engines have generated."""
    optimizer_steps: int = 1
    """Optimizer steps a GRPO step: its samples are divided into so many mini-batches."""
    pad_packed: bool = True
    """Packed sequences are padded to the training sequence's length, so that all micro-batches have one shape; False: a
    micro-batch is as long as what was packed into it."""
    reward_seconds: float = 0.0
    """Time of scoring that does not run beside generation, a step."""
    train_epochs: int = 1
    """Times that a step's samples are trained on."""
    reference: bool = True
    """A reference model's log-probs are computed (KL term)."""
    old_logprobs: bool = True
    """The policy's log-probs are recomputed by the trainer before training on them."""

    @property
    def samples(self) -> int:
        """Responses of a GRPO step."""
        return self.prompts_per_step * self.group_size

    @property
    def lengths(self) -> ResponseLengths:
        """Of the responses. Raises InputError as `ResponseLengths.of` does."""
        return ResponseLengths.of(self.mean_response_tokens, self.max_response_tokens, self.response_spread)

    @property
    def longest_sample_tokens(self) -> int:
        """Of a prompt and the longest response."""
        return math.ceil(self.prompt_tokens + self.max_response_tokens)

    @property
    def shares_weights(self) -> bool:
        """Engines generate with the weights that a GPU trains, so they have the trainer's degrees."""
        return self.weight_sync in ("alias", "local_copy")

    @property
    def engine_gpus(self) -> int:
        """GPUs of one generation engine."""
        return max(self.tp, self.ep) * self.pp


@dataclass(frozen=True)
class PlannedRun:
    """A run to be predicted. Made once, checked by `validation.problems` and `check.check`; never changed."""

    shape: ModelShape
    gpus: int
    """All of them, training and rollout."""
    device: str = "h100"
    """A name of engine.plan.devices.DEVICES."""
    host_memory_gib: float = 0.0
    """Installed memory of a node's host; 0: what the device's usual server has."""
    layout: Layout = field(default_factory=Layout)
    """Of training; dp is filled in."""
    stage_layers: tuple[int, ...] = ()
    """Layers of each pipeline rank, first to last; () divides them evenly, the first ranks taking one more."""
    training: TrainingPlan = field(default_factory=TrainingPlan)
    rollout: RolloutPlan | None = None
    """None: training alone."""
    placement: Placement = "colocated"
    steps: int = 1
    """Optimizer steps (rollout None) or GRPO steps of the whole run, for GPU-hours and energy."""

    @staticmethod
    def of(shape: ModelShape, gpus: int, **settings) -> "PlannedRun":
        """A run with its layout resolved to the training GPUs, and with a rollout the batch that its samples are packed into.

        Raises InputError with every mistake that `validation.problems` finds, one a line.
        """
        run = PlannedRun(shape, gpus, **settings)
        found = problems(run)
        if found:
            raise InputError("\n".join(map(str, found)))
        return with_batch(replace(run, layout=run.layout.resolve(run.training_gpus)))

    @property
    def training_gpus(self) -> int:
        split = self.placement == "split" and self.rollout is not None
        return self.gpus - self.rollout.gpus if split else self.gpus

    @property
    def rollout_gpus(self) -> int:
        """GPUs that generate; 0 for training alone."""
        if self.rollout is None:
            return 0
        return self.rollout.gpus if self.placement == "split" else self.gpus

    @property
    def edp(self) -> int:
        """Replicas of an expert."""
        layout = self.layout
        return layout.dp * layout.cp * layout.tp // (layout.ep * layout.etp)

    @property
    def microbatches(self) -> int:
        """Forward passes of one replica an optimizer step."""
        return self.training.global_batch_sequences // (self.layout.dp * self.training.micro_batch_sequences)

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank (tensor-parallel ranks share them)."""
        return self.training.micro_batch_sequences * self.training.sequence_length_tokens // self.layout.cp

    @property
    def tokens_outside(self) -> float:
        """Tokens of norms, residuals, router and expert dispatch on one rank: sequence parallel divides them by tp."""
        return self.microbatch_tokens / (self.layout.tp if self.layout.sp else 1)

    @property
    def expert_token_copies(self) -> float:
        """Copies of a micro-batch's tokens that the experts of one rank compute; the busiest rank's where routing is uneven.

        Tensor-parallel ranks divide the tokens before sending them, so none is sent twice; the etp ranks of an expert all get
        its tokens.
        """
        layout, top_k = self.layout, self.shape.moe.top_k
        return self.microbatch_tokens / layout.tp * layout.etp * top_k * self.training.expert_imbalance

    @property
    def attended_kv_heads(self) -> float:
        """Key-value heads whose keys and values attention reads on one rank, each of `microbatch_tokens` tokens.

        Where tp ranks outnumber them, each has a copy of one. Ulysses gives each of tp x cp ranks the tokens of all cp ranks
        for its own heads, so that where these ranks outnumber the heads, copies are sent (verl and DeepSpeed repeat them).
        """
        layout = self.layout
        heads = self.shape.num_kv_heads if self.shape.mla is None else self.shape.num_heads
        gathered = layout.cp if layout.cp_kind == "ulysses" else 1
        return gathered * max(heads / (layout.tp * gathered), 1)

    @property
    def pairs_passes(self) -> bool:
        """Whether a forward and a backward pass run beside each other (TrainingPlan.overlap_expert)."""
        return self.training.overlap_expert and self.layout.ep > 1

    @property
    def gathers_in_every_pass(self) -> bool:
        """Whether FSDP gathers each layer's weights for every pass. With a pipeline gathered weights stay through the step."""
        return self.training.fsdp and self.layout.pp == 1

    def recomputed_layers(self) -> frozenset[int]:
        """The layers that TrainingPlan.recompute holds for: the first recompute_layers of each rank. With DualPipe the two
        ranks that hold a layer agree on it."""
        if not self.training.recompute:
            return frozenset()
        most = self.training.recompute_layers or self.shape.num_layers + self.shape.num_mtp_layers
        return frozenset(layer for stage in self.stages() for layer in stage.layers[:most])

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step over all replicas."""
        return self.training.global_batch_sequences * self.training.sequence_length_tokens

    @property
    def division(self) -> LayerDivision:
        """How the layers are divided over the pipeline ranks."""
        shape, layout = self.shape, self.layout
        return LayerDivision(
            shape.num_layers, shape.num_mtp_layers, layout.pp, layout.vpp, layout.schedule, self.stage_layers
        )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """The pipeline ranks, first to last (`stages.stages_of`)."""
        return stages_of(self.division)

    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """Layers of each chunk of consecutive layers, first to last (`stages.chunks_of`)."""
        return chunks_of(self.division)

    def ranks_of_chunk(self) -> list[tuple[int, ...]]:
        """For each chunk of consecutive layers, first to last, the pipeline ranks that hold it."""
        return ranks_of_chunks(self.division)
