// Log-prob, entropy and logsumexp of rows of logits, and the logits' gradient; kernels/reference/softmax.py has the formulas.
//
// Both kernels read every logit once and are limited by that: 2 bytes a bf16 logit forward, 4 with the gradient in place. A row
// belongs to a block of 256 threads, a short one to a warp. Each thread has kUnroll 16-byte loads in flight; at 4 blocks an SM
// (64 registers a thread) that is 64 KB, three times what 3 TB/s over 132 SMs need to cover 0.8 us of latency (18 KB). So there
// is no staging through shared memory or the bulk copy engine. At 3 TB/s an SM has time for 19 instructions
// a bf16 logit, more than the arithmetic takes (an earlier form of it was counted at 11). Bias, softcap and mask have kernels
// of their own.
#include "logit_row.h"

#include <climits>
#include <type_traits>

namespace {

constexpr int blocks_per_sm(bool plain) { return plain ? 4 : 3; }
constexpr int kWarpVocab = 2048;  // a warp takes a row up to this long
constexpr float kUnderflow = -1e4f;  // e^-1e4 is 0, and 0 * -1e4 is 0 where 0 * -inf would be NaN

// -inf (nothing kept so far) becomes 0, so that -inf - max stays -inf instead of NaN.
__device__ float finite(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// With d = (v - max) scale: the maximum of v, sum e^d and sum e^d d of the columns visited. A NaN passes by the maximum into
// the sums.
template <typename T, bool kPlain>
struct Statistics {
  Row<T, kPlain> row;
  float maximum = -INFINITY, total = 0.0f, weighted = 0.0f;

  __device__ void raise(float to) {
    if (!(to > maximum)) return;
    const float shift = fmaxf((maximum - to) * row.scale, kUnderflow), factor = exponential(shift);
    weighted = factor * (weighted + shift * total);
    total *= factor;
    maximum = to;
  }

  template <int N>
  __device__ void visit(int column, Pack<float, N> u) {
    Pack<float, N> slope;
    row.shape(column, u, slope);
    float highest = u.value[0];
#pragma unroll
    for (int i = 1; i < N; ++i) highest = fmaxf(highest, u.value[i]);
    raise(highest);
    const float base = finite(maximum);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float below = (u.value[i] - base) * row.scale, mass = exponential(below);
      total += mass;
      weighted += mass * fmaxf(below, kUnderflow);
    }
  }

  // Those of the whole team, for its first thread.
  template <int kTeam>
  __device__ void join() {
    constexpr int kWarps = kTeam / kWarp;
    raise(warp_max(maximum));
    if constexpr (kWarps > 1) {
      __shared__ float maxima[kWarps], totals[kWarps], weights[kWarps];
      const int warp = threadIdx.x / kWarp;
      if (threadIdx.x % kWarp == 0) maxima[warp] = maximum;
      __syncthreads();
      for (int i = 0; i < kWarps; ++i) raise(maxima[i]);
      total = warp_sum(total);
      weighted = warp_sum(weighted);
      if (threadIdx.x % kWarp == 0) {
        totals[warp] = total;
        weights[warp] = weighted;
      }
      __syncthreads();
      total = totals[0];
      weighted = weights[0];
      for (int i = 1; i < kWarps; ++i) {
        total += totals[i];
        weighted += weights[i];
      }
    } else {
      total = warp_sum(total);
      weighted = warp_sum(weighted);
    }
  }
};

template <typename T, bool kPlain, int kTeam>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kPlain))
    logit_statistics_kernel(const __grid_constant__ strop_logits in, bool partial, float *out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (row >= in.num_rows) return;  // whole teams
  const int64_t target = in.targets[row];
  const bool ignored = target == STROP_IGNORED, found = target >= 0 && target < in.vocab;
  const int vocab = static_cast<int>(in.vocab);

  Statistics<T, kPlain> statistics{Row<T, kPlain>(in, row)};
  if (!ignored) {
    visit_row<kTeam>(statistics.row.logits, vocab, statistics);
    statistics.template join<kTeam>();
  }
  if (threadIdx.x % kTeam != 0) return;

  const float v = found ? statistics.row.value_at(static_cast<int>(target)) : 0.0f, scale = statistics.row.scale;
  const auto write = [&](int index, float value) { out[index * in.num_rows + row] = value; };
  if (partial) {
    write(0, statistics.maximum * scale);
    write(1, statistics.total);
    write(2, statistics.weighted);
    write(3, v * scale);
    write(4, found ? 1.0f : 0.0f);
    return;
  }
  const float base = finite(statistics.maximum), log_total = logf(statistics.total);
  write(0, ignored ? 0.0f : found ? (v - base) * scale - log_total : NAN);
  write(1, ignored ? 0.0f : log_total - statistics.weighted / statistics.total);
  write(2, ignored ? 0.0f : base * scale + log_total);
}

// dz_j = p_j (constant - h log p_j), constant = k - g - h * entropy, and g more for the target; times dz/du.
// log p_j = (v_j - anchor) scale + offset.
template <typename T, bool kPlain>
struct Gradient {
  Row<T, kPlain> row;
  float anchor, offset, constant, h, at_target;
  int target;  // -1: not here
  void *out;   // of the row
  int out_type;

  template <int N>
  __device__ void visit(int column, Pack<float, N> u) {
    Pack<float, N> slope;
    row.shape(column, u, slope);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float log_p = (u.value[i] - anchor) * row.scale + offset;
      u.value[i] = exponential(log_p) * (constant - h * fmaxf(log_p, kUnderflow));
    }
    if (target >= column && target < column + N) {
#pragma unroll
      for (int i = 0; i < N; ++i) u.value[i] = column + i == target ? at_target : u.value[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) u.value[i] = !kPlain && slope.value[i] == 0 ? 0.0f : u.value[i] * slope.value[i];
    switch (out_type) {
      case STROP_BFLOAT16: return store_floats(u, static_cast<__nv_bfloat16 *>(out) + column);
      case STROP_FLOAT16: return store_floats(u, static_cast<__half *>(out) + column);
      default: return store_floats(u, static_cast<float *>(out) + column);
    }
  }
};

// Zeros over the bytes of a row.
template <int kTeam>
__device__ void clear_row(char *out, int64_t bytes) {
  const int lane = threadIdx.x % kTeam;
  const int64_t head = min(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) % 16));
  const int64_t vectors = (bytes - head) / 16, tail = head + vectors * 16;
  if (lane < head) out[lane] = 0;
  if (tail + lane < bytes) out[tail + lane] = 0;
  for (int64_t i = lane; i < vectors; i += kTeam) reinterpret_cast<uint4 *>(out + head)[i] = make_uint4(0, 0, 0, 0);
}

// What the gradient reads of each row, and where it goes.
struct RowGradients {
  const float *logprob, *entropy, *logsumexp;
  const float *g, *h, *k;
  void *out;
  int out_type;
  int64_t out_stride;
};

template <typename T, bool kPlain, int kTeam>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kPlain))
    logit_gradient_kernel(const __grid_constant__ strop_logits in, const __grid_constant__ RowGradients rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  if (row >= in.num_rows) return;  // whole teams
  const int64_t target = in.targets[row];
  const float g = rows.g ? rows.g[row] : 0.0f, h = rows.h ? rows.h[row] : 0.0f, k = rows.k ? rows.k[row] : 0.0f;
  const int item = rows.out_type == STROP_FLOAT32 ? 4 : 2;
  char *out = static_cast<char *>(rows.out) + row * rows.out_stride * item;
  if (target == STROP_IGNORED || (g == 0 && h == 0 && k == 0)) return clear_row<kTeam>(out, in.vocab * item);

  const float logprob = rows.logprob[row], logsumexp = rows.logsumexp[row];
  const float base = h == 0 ? k : k - h * rows.entropy[row];  // an infinite entropy without an upstream gradient makes no NaN
  // The target's g (1 - p) comes from -expm1: a rounded p would cost all digits of a small 1 - p that log p has.
  const float at_target = expf(logprob) * (base - h * fmaxf(logprob, kUnderflow)) - g * expm1f(logprob);
  const int here = target >= 0 && target < in.vocab ? static_cast<int>(target) : -1;
  const Row<T, kPlain> logits(in, row);

  // The nearer of two points on the line: fp32 holds a logsumexp near 1e4 to 5e-4 only, the distance to the target's exactly.
  const float v = here >= 0 ? logits.value_at(here) : 0.0f;
  if constexpr (kTeam == kThreads) {  // every thread has v before one writes there: out may be the logits
    __syncthreads();
  } else {
    __syncwarp();
  }
  const bool near = here >= 0 && fabsf(logprob) < fabsf(logsumexp) && fabsf(v) < INFINITY;
  Gradient<T, kPlain> gradient{logits,   near ? v : 0.0f, near ? logprob : -logsumexp, base - g, h,
                               at_target, here,           out,                         rows.out_type};
  visit_row<kTeam>(gradient.row.logits, static_cast<int>(in.vocab), gradient);
}

bool is_float(int type) { return type >= STROP_FLOAT32 && type <= STROP_FLOAT16; }

bool is_valid(const strop_logits &in) {
  return in.num_rows >= 0 && in.num_rows <= INT_MAX && in.vocab >= 0 && in.vocab <= INT_MAX - 2 * kUnroll * kThreads &&
         is_float(in.logit_type) && (!in.bias || is_float(in.bias_type)) && in.softcap >= 0;
}

bool is_plain(const strop_logits &in) { return !in.bias && in.softcap == 0 && !in.keep_mask; }

unsigned blocks_of(const strop_logits &in) {
  const int64_t rows_per_block = in.vocab <= kWarpVocab ? kThreads / kWarp : 1;
  return static_cast<unsigned>((in.num_rows + rows_per_block - 1) / rows_per_block);
}

template <typename T, bool kPlain>
void launch_statistics(const strop_logits &in, bool partial, float *out, void *stream) {
  const unsigned blocks = blocks_of(in);
  if (in.vocab <= kWarpVocab) {
    STROP_LAUNCH((logit_statistics_kernel<T, kPlain, kWarp>), blocks, kThreads, 0, stream, in, partial, out);
  } else {
    STROP_LAUNCH((logit_statistics_kernel<T, kPlain, kThreads>), blocks, kThreads, 0, stream, in, partial, out);
  }
}

template <typename T, bool kPlain>
void launch_gradient(const strop_logits &in, const RowGradients &rows, void *stream) {
  const unsigned blocks = blocks_of(in);
  if (in.vocab <= kWarpVocab) {
    STROP_LAUNCH((logit_gradient_kernel<T, kPlain, kWarp>), blocks, kThreads, 0, stream, in, rows);
  } else {
    STROP_LAUNCH((logit_gradient_kernel<T, kPlain, kThreads>), blocks, kThreads, 0, stream, in, rows);
  }
}

// launch(an element of the logits' type, whether they are plain).
template <typename Launch>
void by_kind(const strop_logits &in, const Launch &launch) {
  const auto by_shape = [&](auto element) {
    is_plain(in) ? launch(element, std::true_type()) : launch(element, std::false_type());
  };
  switch (in.logit_type) {
    case STROP_BFLOAT16: return by_shape(__nv_bfloat16());
    case STROP_FLOAT16: return by_shape(__half());
    default: return by_shape(float());
  }
}

}  // namespace

extern "C" int strop_cuda_logit_statistics(const strop_logits *rows, int partial, float *out, void *stream) {
  if (!is_valid(*rows)) return STROP_BAD_ARGUMENT;
  if (rows->num_rows == 0) return STROP_OK;
  by_kind(*rows, [&](auto element, auto plain) {
    launch_statistics<decltype(element), decltype(plain)::value>(*rows, partial != 0, out, stream);
  });
  return status_of(cudaGetLastError());
}

extern "C" int strop_cuda_logit_gradient(const strop_logits *rows, const float *logprob, const float *entropy,
                                         const float *logsumexp, const float *g, const float *h, const float *k, void *out,
                                         int out_type, int64_t out_stride, void *stream) {
  if (!is_valid(*rows) || !is_float(out_type)) return STROP_BAD_ARGUMENT;
  if (rows->num_rows == 0) return STROP_OK;
  const RowGradients gradients{logprob, entropy, logsumexp, g, h, k, out, out_type, out_stride};
  by_kind(*rows, [&](auto element, auto plain) {
    launch_gradient<decltype(element), decltype(plain)::value>(*rows, gradients, stream);
  });
  return status_of(cudaGetLastError());
}
