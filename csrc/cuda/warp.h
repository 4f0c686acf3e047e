// What the kernels of this folder share: lanes of a warp, and elements of the three floating types.
#pragma once

#include "launch.h"

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Of all lanes, for all lanes, in a fixed order.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
  return value;
}

// N neighbours, moved 16 bytes at a time.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T value[N];
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline void from_float(float value, float *out) { *out = value; }
__device__ inline void from_float(float value, __nv_bfloat16 *out) { *out = __float2bfloat16_rn(value); }
__device__ inline void from_float(float value, __half *out) { *out = __float2half_rn(value); }
