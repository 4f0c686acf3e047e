// How logit_rows.cu reads a row of logits: 16 bytes at a time from wherever the row begins, shaped into v.
//
// v is z before the temperature: differences of large logits are exact, so they are taken first and then multiplied by 1 / T.
#pragma once

#include "warp.h"

#include <cmath>
#include <cstring>

namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

__device__ float exponential(float x) { return strop_exp2(x * 1.44269504f); }

// 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = e^-2|x|: the difference would lose its digits as tanh comes near 1.
__device__ float tanh_slope(float x) {
  const float e = exponential(-2.0f * fabsf(x));
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}

// N neighbours; `from` may be misaligned as a whole.
template <int N, typename T>
__device__ Pack<T, N> load(const T *from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(Pack<T, N>) == 0) return *reinterpret_cast<const Pack<T, N> *>(from);
  Pack<T, N> held;
#pragma unroll
  for (int i = 0; i < N; ++i) held.value[i] = from[i];
  return held;
}

template <typename T, int N>
__device__ Pack<float, N> floats_of(const Pack<T, N> &held) {
  Pack<float, N> floats;
#pragma unroll
  for (int i = 0; i < N; ++i) floats.value[i] = to_float(held.value[i]);
  return floats;
}

template <typename T, int N>
__device__ void store_floats(const Pack<float, N> &floats, T *to) {
  Pack<T, N> held;
#pragma unroll
  for (int i = 0; i < N; ++i) from_float(floats.value[i], &held.value[i]);
  if (reinterpret_cast<uintptr_t>(to) % alignof(Pack<T, N>) == 0) {
    *reinterpret_cast<Pack<T, N> *>(to) = held;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = held.value[i];
  }
}

// A row: v = softcap * tanh((u + bias) / softcap), -inf outside the mask; z = v * scale. kPlain: no bias, softcap or mask.
template <typename T, bool kPlain>
struct Row {
  const T *logits;
  const uint8_t *keep_mask;
  const void *bias;
  int bias_type;
  float scale, softcap, softcap_reciprocal;

  __device__ Row(const strop_logits &in, int64_t row)
      : logits(static_cast<const T *>(in.logits) + row * in.row_stride),
        keep_mask(in.keep_mask ? in.keep_mask + row * in.mask_stride : nullptr),
        bias(in.bias),
        bias_type(in.bias_type),
        scale(in.inverse_temperature ? in.inverse_temperature[row] : in.scale),
        softcap(in.softcap),
        softcap_reciprocal(1.0f / in.softcap) {}

  template <int N>
  __device__ Pack<float, N> bias_of(int column) const {
    switch (bias_type) {
      case STROP_BFLOAT16: return floats_of(load<N>(static_cast<const __nv_bfloat16 *>(bias) + column));
      case STROP_FLOAT16: return floats_of(load<N>(static_cast<const __half *>(bias) + column));
      default: return floats_of(load<N>(static_cast<const float *>(bias) + column));
    }
  }

  // u becomes v. slope: dz/du; 0 outside the mask.
  template <int N>
  __device__ void shape(int column, Pack<float, N> &u, Pack<float, N> &slope) const {
    if constexpr (!kPlain) {
      if (bias) {
        const Pack<float, N> added = bias_of<N>(column);
#pragma unroll
        for (int i = 0; i < N; ++i) u.value[i] += added.value[i];
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      slope.value[i] = scale;
      if (!kPlain && softcap != 0) {
        const float x = u.value[i] * softcap_reciprocal;
        slope.value[i] *= tanh_slope(x);
        u.value[i] = softcap * tanhf(x);
      }
    }
    if constexpr (!kPlain) {
      if (!keep_mask) return;
      const Pack<uint8_t, N> kept = load<N>(keep_mask + column);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (kept.value[i]) continue;
        u.value[i] = -INFINITY;
        slope.value[i] = 0.0f;
      }
    }
  }

  __device__ float value_at(int column) const {
    Pack<float, 1> v = floats_of(load<1>(logits + column)), slope;
    shape(column, v, slope);
    return v.value[0];
  }
};

// visit(column, logits) for all columns, the kTeam threads side by side: 16 bytes at a time between a head and a tail of single
// logits, since rows begin anywhere.
template <int kTeam, typename T, typename Visitor>
__device__ void visit_row(const T *logits, int vocab, Visitor &visitor) {
  constexpr int N = 16 / sizeof(T);
  const int lane = threadIdx.x % kTeam;
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
  const int head = min(vocab, before == 0 ? 0 : N - before);
  const int vectors = (vocab - head) / N, tail = head + vectors * N;
  if (lane < head) visitor.visit(lane, floats_of(load<1>(logits + lane)));
  if (tail + lane < vocab) visitor.visit(tail + lane, floats_of(load<1>(logits + tail + lane)));
  for (int first = lane; first < vectors; first += kUnroll * kTeam) {
    uint4 held[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int vector = first + i * kTeam;
      if (vector < vectors) held[i] = __ldcs(reinterpret_cast<const uint4 *>(logits + head) + vector);  // not needed again
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int vector = first + i * kTeam;
      if (vector >= vectors) break;
      Pack<T, N> typed;
      memcpy(&typed, &held[i], sizeof typed);
      visitor.visit(head + vector * N, floats_of(typed));
    }
  }
}

}  // namespace
