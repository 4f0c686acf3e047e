"""One generation engine and the seconds of its steps: what it holds, reads and waits for while it decodes and prefills.

An engine is tp x pp GPUs, or ep x pp where ep > tp: then ep / tp data-parallel replicas share the experts (DeepSeek-V3, arXiv
2412.19437, section 3.4). With ep = 1 the experts are split inside, by tp, as vLLM and SGLang do without expert parallelism.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import InputError
from .collectives import collective_seconds, expert_exchange_seconds, low_latency_seconds
from .devices import DeviceFacts, device_named
from .efficiency import Precision, gemm_seconds, grouped_gemm_seconds, memory_bound_seconds
from .rollout_memory import cache_bytes_per_token, cache_shortage, holds_a_sequence
from .run import PlannedRun, RolloutPlan
from .shape import ModelShape

HOST_STEP_SECONDS = 2.8e-3
"""Scheduling, input preparation and output handling of a decoding step, while the GPU waits (vLLM; fitted on the generation
seconds of NeMo-RL v0.3, benchmarks/planner_rl_rows.py)."""
HOST_SEQUENCE_SECONDS = 45e-6
"""The same for each sequence in the batch: sampled token, log-prob, detokenization, stop check (fitted with it)."""
EAGER_OPERATION_SECONDS = 40e-6
"""Host time of one operation of a layer where no CUDA graph replays it: Python modules, dispatch, all its launches (fitted on
verl's Qwen3-30B-A3B row)."""
NETWORK_REDUCE_SECONDS = 45e-6
"""What an all-reduce over several nodes takes in a decoding step beyond its own latency: ranks of several nodes arrive at
different times and are not covered by an engine's one-shot kernels (fitted on NeMo-RL's Qwen3-235B rows; DeepSeek-R1 on 2
nodes of 8 H100, tp 16, takes 23 to 31 ms a token at concurrency 1: tenstorrent/tt-inference-server issue #356)."""
LOGITS_PASSES = 8
"""Times that sampling with log-probs reads or writes fp32 logits: temperature, softmax, log-softmax, ranks, noise, argmax."""
PREFILL_CHUNK_TOKENS = 8192
"""Tokens of prompts that an engine computes at once (vLLM's max_num_batched_tokens for offline use)."""
CACHE_BYTES_FRACTION = 0.92
"""Achieved of the memory's bandwidth by decode attention over long contexts, and ..."""
CACHE_LAYER_SECONDS = 15e-6
"""... what a layer's attention takes beside (aiconfigurator-core 0.12.0, systems/data/h100_sxm, generation_attention of vLLM
0.24: 13 us with nothing to read, 2.6-3.1 of 3.35 TB/s from 100 MB on)."""
CACHE_FLOPS_FRACTION = 0.6
"""Achieved of the bf16 peak by the scores and values of decode attention and of prompts (FlashMLA, where many heads
share one latent key: 660 of 989 TFLOPS)."""
ELEMENTWISE_PASSES = 12
"""Times that a layer's element-wise kernels read or write the hidden states: norms with residual, rotation, gate, sums."""
GRAPH_KERNEL_SECONDS = 2e-6
"""From one element-wise kernel's start to the next one's inside a CUDA graph, when it does nothing."""
KERNELS = {"dense": 8, "moe": 14}
"""Of a layer beside its products and attention: norms, rotation, cache write, gate; routing and sorting by expert."""


@dataclass(frozen=True)
class GenerationEngine:
    """One engine of a run's rollout, and how many equal ones there are."""

    run: PlannedRun
    device: DeviceFacts
    count: int
    """Engines."""

    @staticmethod
    def of(run: PlannedRun) -> "GenerationEngine":
        """Of a run without other problems. Raises InputError where it has no rollout, or no KV cache for a whole sequence."""
        plan = run.rollout
        if plan is None:
            raise InputError("this run only trains: give it a rollout to plan generation")
        if not holds_a_sequence(run):
            raise InputError(cache_shortage(run))
        return GenerationEngine(run, device_named(run.device), run.rollout_gpus // plan.engine_gpus)

    @property
    def shape(self) -> ModelShape:
        return self.run.shape

    @property
    def plan(self) -> RolloutPlan:
        return self.run.rollout

    @property
    def replicas(self) -> int:
        """Data-parallel attention replicas of the engine; each has its own sequences."""
        return max(1, self.plan.ep // self.plan.tp)

    @property
    def precision(self) -> Precision:
        """Of the layers' products. Weights of 4 bits become bf16 inside them (W4A16, as in slime's INT4 rollouts)."""
        width = self.plan.weights_dtype_bytes
        return "fp32" if width == 4 else "fp8-blockwise" if width == 1 else "bf16"

    @property
    def tokens_verified(self) -> int:
        """Tokens of a sequence that one decoding step computes: the last one and the drafts after it."""
        return math.ceil(self.plan.speculative_tokens)

    def step_seconds(self, sequences: float, context_tokens: float) -> float:
        """One decoding step of `sequences` in each replica, whose contexts (prompt and response so far) have this mean."""
        cache = self.cache_seconds(np.array([sequences]), np.array([sequences * context_tokens]))
        return self.rows_seconds(sequences) + float(cache[0])

    def rows_seconds(self, sequences: float) -> float:
        """A decoding step without the reading of the cache: weights, collectives, launches, sampling, host.

        With pp > 1 the batch goes through the stages in pp parts, so that all stages work.
        """
        plan, shape = self.plan, self.shape
        part = sequences / plan.pp
        verify = self._pass_seconds(part * self.tokens_verified, all_logits=True)
        kernels = self._kernels(range(shape.num_layers))
        drafts = self.tokens_verified - 1
        if drafts:  # a multi-token-prediction layer, or a draft model of one layer, once a drafted token
            last = shape.num_layers - 1
            verify += drafts * (self._layer_seconds(last, part) + self._head_seconds(part))
            kernels += drafts * self._kernels((last,))
        if not plan.cuda_graphs:
            verify = max(verify, kernels / plan.pp * EAGER_OPERATION_SECONDS)
        return verify * plan.pp + HOST_STEP_SECONDS + HOST_SEQUENCE_SECONDS * sequences

    def cache_seconds(self, sequences: NDArray[np.floating], context_tokens: NDArray[np.floating]) -> NDArray[np.float64]:
        """Decode attention of one step, all layers: bytes of keys and values, or FLOPs where heads share them.

        `context_tokens`: of all `sequences` of a replica together; window layers read at most their window of each.
        """
        shape, device = self.shape, self.device
        seconds = np.zeros(np.shape(context_tokens))
        per_layer = cache_bytes_per_token(self.run) * self.plan.pp / shape.num_layers
        byte_seconds = per_layer / (CACHE_BYTES_FRACTION * device.hbm_bytes_per_second)
        heads = max(1, shape.num_heads // self.plan.tp) * self.tokens_verified
        widths = 2 * shape.mla.kv_rank + shape.mla.rope_dim if shape.mla is not None else 2 * shape.head_dim
        flop_seconds = 2 * heads * widths / (CACHE_FLOPS_FRACTION * device.bf16_flops_per_second)
        for layer in range(shape.num_layers):
            window = shape.window_tokens(layer)
            read = np.minimum(context_tokens, window * sequences) if window else context_tokens
            seconds += CACHE_LAYER_SECONDS + np.asarray(read, float) * max(byte_seconds, flop_seconds) / self.plan.pp
        return seconds

    def prefill_seconds(self, tokens: float, prompt_tokens: float) -> float:
        """Seconds of one replica to compute prompts of `tokens` in all, in chunks, causal attention over each prompt.

        With pp > 1 a stage works on a chunk while the next one works on the chunk before; the last chunk still goes through
        all of them.
        """
        if tokens <= 0:
            return 0.0
        chunk = min(tokens, PREFILL_CHUNK_TOKENS)
        shape = self.shape
        widths = shape.mla.nope_dim + shape.mla.rope_dim + shape.mla.value_dim if shape.mla is not None else 2 * shape.head_dim
        attention_flops = shape.num_heads / self.plan.tp * widths * prompt_tokens * shape.num_layers / self.plan.pp
        attention = attention_flops / (CACHE_FLOPS_FRACTION * self.device.bf16_flops_per_second)
        stage_seconds = self._pass_seconds(chunk, all_logits=False) + chunk * attention
        return tokens / chunk * (stage_seconds + HOST_STEP_SECONDS) + (self.plan.pp - 1) * stage_seconds

    def _pass_seconds(self, rows: float, all_logits: bool) -> float:
        """One pipeline rank's part of a pass over `rows` tokens in each replica, with the mean rank's share of layers."""
        shape, pp = self.shape, self.plan.pp
        dense = shape.num_layers if shape.moe is None else shape.moe.num_dense_layers
        seconds = dense * self._layer_seconds(0, rows) if dense else 0.0
        if dense < shape.num_layers:
            seconds += (shape.num_layers - dense) * self._layer_seconds(shape.num_layers - 1, rows)
        seconds += self._head_seconds(rows if all_logits else 1)
        hop = 0.0
        if pp > 1:
            beside = max(1, self.device.gpus_per_node // (self.plan.engine_gpus // pp))
            hop = collective_seconds(self.device, "send_recv", rows * shape.hidden_size * 2, pp, min(beside, pp))
        return seconds / pp + hop

    def _layer_seconds(self, layer: int, rows: float) -> float:
        """One layer over `rows` tokens of each replica; without decode attention's reading of the cache."""
        shape, plan, device = self.shape, self.plan, self.device
        hidden, tp = shape.hidden_size, plan.tp
        seconds = self._projection_seconds(rows)
        hidden_bytes = rows * hidden * 2
        reduced = 1.0
        if shape.kind(layer) == "dense":
            seconds += self._mlp_seconds(rows, shape.dense_intermediate_size / tp)
            reduced += 1
        else:
            moe = shape.moe
            seconds += gemm_seconds(device, rows, moe.num_experts, hidden, "bf16", sustained=False)
            if moe.shared_intermediate_size:
                seconds += self._mlp_seconds(rows, moe.shared_intermediate_size / tp)
            all_rows = rows * self.replicas
            touched = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** all_rows)
            groups = max(1.0, touched / plan.ep)
            width = moe.expert_intermediate_size / (tp if plan.ep == 1 else 1)
            per_group = all_rows * moe.top_k / plan.ep / groups
            for columns, inner in ((2 * width, hidden), (hidden, width)):
                seconds += self._product_seconds(per_group, columns, inner, math.ceil(groups))
            if plan.ep > tp:  # a rank of a replica sends the replica's tokens that are its own
                arguments = (hidden, moe, plan.ep, min(plan.ep, device.gpus_per_node))
                wire = 1 if self.precision == "fp8-blockwise" else 2
                for dtype_bytes in (wire, 2):  # there and back
                    many = expert_exchange_seconds(device, rows / tp, *arguments, dtype_bytes, "deepep")
                    few = low_latency_seconds(device, rows / tp, *arguments, dtype_bytes)
                    seconds += min(many, few)  # DeepEP has kernels for each
            else:
                reduced += 1
        reduce = collective_seconds(device, "all_reduce", hidden_bytes, tp, min(tp, device.gpus_per_node))
        if tp > device.gpus_per_node:
            reduce += NETWORK_REDUCE_SECONDS
        elementwise = memory_bound_seconds(device, ELEMENTWISE_PASSES * hidden_bytes, kernels=0)
        return seconds + reduced * reduce + elementwise + KERNELS[shape.kind(layer)] * GRAPH_KERNEL_SECONDS

    def _projection_seconds(self, rows: float) -> float:
        """Products around attention. Decoding with latent attention multiplies queries and outputs per head (absorbed)."""
        shape, tp = self.shape, self.plan.tp
        heads, hidden, mla = shape.num_heads / tp, shape.hidden_size, shape.mla
        if mla is None:
            kv_heads = max(1.0, shape.num_kv_heads / tp)
            products = [((heads + 2 * kv_heads) * shape.head_dim, hidden), (hidden, heads * shape.head_dim)]
        else:
            query = heads * (mla.nope_dim + mla.rope_dim)
            products = [(mla.q_rank + mla.kv_rank + mla.rope_dim, hidden), (query, mla.q_rank or hidden)]
            products += [(hidden, heads * mla.value_dim)]
        seconds = sum(self._product_seconds(rows, n, k) for n, k in products)
        if mla is not None:
            for n, k in ((mla.kv_rank, mla.nope_dim), (mla.value_dim, mla.kv_rank)):
                seconds += grouped_gemm_seconds(self.device, math.ceil(heads), rows, n, k, "bf16", sustained=False)
        return seconds

    def _mlp_seconds(self, rows: float, width: float) -> float:
        hidden = self.shape.hidden_size
        return self._product_seconds(rows, 2 * width, hidden) + self._product_seconds(rows, hidden, width)

    def _product_seconds(self, rows: float, n: float, k: float, groups: int = 1) -> float:
        """Products [rows, k] x [k, n] with matrices of a layer, as many as `groups` in one kernel."""
        weight_bytes = self.plan.weights_dtype_bytes
        return grouped_gemm_seconds(self.device, groups, rows, n, k, self.precision, sustained=False, weight_bytes=weight_bytes)

    def _head_seconds(self, rows: float) -> float:
        """The head's product over a tp rank's part of the vocabulary, and sampling from all of it on every rank."""
        vocab, tp, device = self.shape.vocab_size, self.plan.tp, self.device
        product = gemm_seconds(device, rows, vocab / tp, self.shape.hidden_size, "bf16", sustained=False)
        gather = collective_seconds(device, "all_gather", rows * vocab * 2, tp, min(tp, device.gpus_per_node))
        return product + gather + memory_bound_seconds(device, LOGITS_PASSES * rows * vocab * 4, LOGITS_PASSES)

    def _kernels(self, layers: range | tuple[int, ...]) -> int:
        products = 8 if self.shape.mla is not None else 4
        return sum(KERNELS[self.shape.kind(layer)] + products for layer in layers)
