// The policy loss, its gradients and its metrics in one launch.
//
// The tokens are cut into stretches: kStretch tokens of one sequence at most, so that a block knows its sequence and long
// sequences still spread over the device. Where a token's loss depends on the whole sequence, every block that owns a stretch
// of it sums the sequence by itself: reading it again from L2 is cheaper than a second launch or a wait for other blocks.
// Each block leaves its metrics in the workspace, and the last one to finish joins them, all in a fixed order.
#include "warp.h"

#include "../include/loss_metrics.h"

#include <algorithm>

namespace {

using namespace strop;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStretch = 2 * kThreads;
constexpr int kMaxBlocks = 512;  // fixed, so that sums have the same order on every device
static_assert(NUM_METRICS == kWarp, "lane i of a warp holds metric i");

struct Workspace {
  unsigned blocks_done;  // 0 between launches
  float metrics[kMaxBlocks][NUM_METRICS];
};

struct Arguments {
  strop_loss_tokens in;
  strop_loss_code code;
  int64_t num_stretches;
  float *loss, *metrics, *d_logprob, *d_entropy;
  Workspace *workspace;
};

// The tokens behind the last sequence count as sequence num_sequences: the padding, or all tokens where there are no sequences.
// Always in 0..num_tokens: boundaries that nobody checked may give wrong numbers, but no access outside the arrays.
__device__ int64_t first_token(const strop_loss_tokens &in, int64_t sequence) {
  if (sequence == 0) return 0;
  if (sequence > in.num_sequences) return in.num_tokens;
  return max(static_cast<int64_t>(0), min(in.cu_seqlens[sequence], in.num_tokens));
}

// Stretch c of a sequence has the number first_stretch(sequence) + c. A sequence of L tokens has ceil(L / kStretch) stretches
// and the next one's first number is at least that much higher, so no two stretches share a number; some numbers stay unused.
__device__ int64_t first_stretch(const strop_loss_tokens &in, int64_t sequence) {
  return first_token(in, sequence) / kStretch + sequence;
}

// The sequence that owns a stretch. All threads of the block search together, so 256 sequences take one step, 65,536 two.
__device__ int64_t sequence_owning(const strop_loss_tokens &in, int64_t stretch) {
  int64_t low = 0, high = in.num_sequences + 1;  // first_stretch(low) <= stretch < first_stretch(high)
  while (high - low > 1) {
    const int64_t step = (high - low + kThreads - 1) / kThreads;
    const int64_t probe = low + threadIdx.x * step;
    const int below = __syncthreads_count(probe < high && first_stretch(in, probe) <= stretch);
    low += max(below - 1, 0) * step;  // 0 are below only where boundaries don't ascend
    high = min(high, low + step);
  }
  return low;
}

// The sums of all threads, for all threads.
__device__ SequenceSums block_sum(const SequenceSums &own) {
  __shared__ SequenceSums of_warp[kWarps];
  const SequenceSums mine = {warp_sum(own.tokens),        warp_sum(own.log_ratio),    warp_sum(own.rollout_gap),
                             warp_sum(own.rollout_drift), warp_sum(own.advantage_up), warp_sum(own.advantage_down)};
  __syncthreads();  // all have read what the stretch before left here
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  SequenceSums total = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) total = sum(total, of_warp[warp]);
  return total;
}

// Tokens first .. last of a sequence. Where only its length matters, the mask is all that is read.
__device__ SequenceSums sums_of_tokens(const strop_loss_tokens &in, const strop_loss_code &code, int64_t first, int64_t last) {
  SequenceSums sums = {0, 0, 0, 0, 0, 0};
  if (needs_sequence_sums(code)) {
#pragma unroll 2
    for (int64_t t = first + threadIdx.x; t < last; t += kThreads) {
      const Token token = policy_inputs(in, t);  // loaded before the mask is known
      if (in.mask[t]) sums = sum(sums, sequence_sums(token, code));
    }
  } else {
#pragma unroll 8
    for (int64_t t = first + threadIdx.x; t < last; t += kThreads) sums.tokens += in.mask[t] ? 1.0f : 0.0f;
  }
  return block_sum(sums);
}

__device__ SequenceSums given_sums(const float *row) { return {row[0], row[1], row[2], row[3], row[4], row[5]}; }

// A stretch: its tokens' gradients, and what they add to this thread's metrics.
__device__ void run_stretch(const Arguments &arguments, int64_t stretch, float *metrics) {
  const strop_loss_tokens &in = arguments.in;
  const strop_loss_code &code = arguments.code;
  const int64_t owner = sequence_owning(in, stretch);
  const int64_t sequence_first = first_token(in, owner), sequence_last = first_token(in, owner + 1);
  const int64_t before = stretch - first_stretch(in, owner);  // negative only where boundaries don't ascend
  const int64_t first = before < 0 ? sequence_last : sequence_first + before * kStretch;
  const int64_t last = min(first + kStretch, sequence_last);

  Sequence sequence = neutral_sequence();
  const bool is_sequence = owner < in.num_sequences, opens = is_sequence && first == sequence_first;
  if (opens || (is_sequence && first < last && needs_sequences(code))) {
    const SequenceSums sums = in.sequence_stats ? given_sums(in.sequence_stats + owner * 6)
                                                : sums_of_tokens(in, code, sequence_first, sequence_last);
    sequence = sequence_of(sums, code);
    if (opens && threadIdx.x == 0 && sums.tokens > 0) metrics[SEQUENCES] += 1.0f;
  }

  const bool is_padding = in.cu_seqlens && !is_sequence;
  float share = 1.0f / *in.denominator;
  if (code.divide_by_length) share /= sequence.length;
  for (int64_t t = first + threadIdx.x; t < last; t += kThreads) {
    const Token token = all_inputs(in, t);  // loaded before the mask is known
    const bool counts = in.mask[t] && !is_padding;
    float d_logprob = 0.0f;
    if (counts) {
      const TokenTerms terms = token_terms(token, sequence, code);
      d_logprob = share * terms.d_logprob;
      add_token(token, terms, share, in, code, metrics);
    }
    arguments.d_logprob[t] = d_logprob;
    if (arguments.d_entropy) arguments.d_entropy[t] = counts ? -code.entropy_coef * share : 0.0f;
  }
}

// Lane i gets metric i of all lanes, in 31 exchanges: each halves the metrics that a lane still holds.
template <int kHalf>
__device__ float warp_metric(float *metrics) {
  const int lane = threadIdx.x % kWarp;
  const bool upper = lane & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float kept = upper ? metrics[i + kHalf] : metrics[i];
    const float given = upper ? metrics[i] : metrics[i + kHalf];
    metrics[i] = joined(i + (lane & -kHalf), kept, __shfl_xor_sync(kAllLanes, given, kHalf));
  }
  if constexpr (kHalf > 1) {
    return warp_metric<kHalf / 2>(metrics);
  } else {
    return metrics[0];
  }
}

// Metric `lane` of all warps, for the lanes of the first warp. Called once a row of `of_warp`.
__device__ float block_metric(float own, float (*of_warp)[NUM_METRICS]) {
  const int lane = threadIdx.x % kWarp;
  of_warp[threadIdx.x / kWarp][lane] = own;
  __syncthreads();
  float total = of_warp[0][lane];
  for (int warp = 1; warp < kWarps; ++warp) total = joined(lane, total, of_warp[warp][lane]);
  return total;
}

__global__ void __launch_bounds__(kThreads) policy_loss_kernel(const __grid_constant__ Arguments arguments) {
  __shared__ float of_warp[2][kWarps][NUM_METRICS];
  __shared__ bool is_last;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Workspace *workspace = arguments.workspace;

  float metrics[NUM_METRICS];
#pragma unroll
  for (int metric = 0; metric < NUM_METRICS; ++metric) metrics[metric] = identity(metric);
  for (int64_t stretch = blockIdx.x; stretch < arguments.num_stretches; stretch += gridDim.x) {
    run_stretch(arguments, stretch, metrics);
  }
  const float of_block = block_metric(warp_metric<kWarp / 2>(metrics), of_warp[0]);
  if (warp == 0) {
    workspace->metrics[blockIdx.x][lane] = of_block;
    __threadfence();
    __syncwarp();
    if (lane == 0) is_last = atomicInc(&workspace->blocks_done, gridDim.x - 1) == gridDim.x - 1;  // wraps to 0
  }
  __syncthreads();
  if (!is_last) return;

  __threadfence();
  float total = identity(lane);
#pragma unroll 8
  for (unsigned block = warp; block < gridDim.x; block += kWarps) {
    total = joined(lane, total, __ldcg(&workspace->metrics[block][lane]));
  }
  total = block_metric(total, of_warp[1]);
  if (warp != 0) return;
  const float loss = __shfl_sync(kAllLanes, total, POLICY_LOSS) + __shfl_sync(kAllLanes, total, KL_LOSS) +
                     __shfl_sync(kAllLanes, total, ENTROPY_LOSS);
  arguments.metrics[lane] = lane == LOSS ? loss : total;
  if (lane == 0) *arguments.loss = loss;
}

}  // namespace

extern "C" int64_t strop_cuda_policy_loss_workspace(int64_t, int64_t) { return sizeof(Workspace); }

extern "C" int strop_cuda_policy_loss(const strop_loss_tokens *tokens, const strop_loss_code *code, float *loss,
                                      float *metrics, float *d_logprob, float *d_entropy, void *workspace, void *stream) {
  if (!is_sound(*tokens, *code, d_entropy)) return STROP_BAD_ARGUMENT;
  const int64_t num_stretches = tokens->num_tokens / kStretch + tokens->num_sequences + 1;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(num_stretches, kMaxBlocks));
  const Arguments arguments{*tokens,   *code,     num_stretches,
                            loss,      metrics,   d_logprob,
                            d_entropy, static_cast<Workspace *>(workspace)};
  STROP_LAUNCH(policy_loss_kernel, blocks, kThreads, 0, stream, arguments);
  return status_of(cudaGetLastError());
}
