// One kernel for each thing that the emulation must get right; test_emulation.py knows the answers.
#include "launch.h"

namespace {

constexpr unsigned FULL = 0xFFFFFFFFu;

// Sum of each block by shuffles and shared memory, then of all blocks by the last one to finish.
__global__ void sum_kernel(const float* x, int64_t size, float* partial, unsigned* finished, float* total) {
  __shared__ float warps[32];
  __shared__ bool is_last;
  float sum = 0.0f;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i * 4 < size; i += int64_t(gridDim.x) * blockDim.x) {
    const float4 four = reinterpret_cast<const float4*>(x)[i];
    sum += four.x + four.y + four.z + four.w;
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL, sum, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(FULL, sum, offset);
    if (threadIdx.x == 0) {
      partial[blockIdx.x] = sum;
      __threadfence();
      is_last = atomicAdd(finished, 1u) == gridDim.x - 1;
    }
  }
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    float all = 0.0f;
    for (unsigned i = 0; i < gridDim.x; ++i) all += partial[i];
    *total = all;
  }
}

// Reverses 256 values through dynamic shared memory; without the barrier the result depends on the order of the threads.
__global__ void reverse_kernel(const int* in, int* out, bool with_barrier) {
  STROP_DYNAMIC_SHARED(int, buffer);
  buffer[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}

// Votes and shuffles of one warp: [16][32] ints.
__global__ void warp_kernel(int* out) {
  const int lane = threadIdx.x;
  int* column = out + lane;
  column[0 * 32] = __ballot_sync(FULL, lane % 3 == 0);
  column[1 * 32] = __any_sync(FULL, lane == 7);
  column[2 * 32] = __all_sync(FULL, lane < 31);
  column[3 * 32] = __shfl_sync(FULL, lane * lane, 5);
  column[4 * 32] = __shfl_up_sync(FULL, lane, 2);
  column[5 * 32] = __shfl_down_sync(FULL, lane, 3, 8);
  column[6 * 32] = __shfl_xor_sync(FULL, lane, 4, 8);
  column[7 * 32] = __reduce_add_sync(FULL, lane);
  column[8 * 32] = lane < 16 ? __shfl_xor_sync(0xFFFFu, lane, 1) : __shfl_xor_sync(0xFFFF0000u, lane, 8);
  column[9 * 32] = __popc(lane) * 100 + __clz(lane) + __ffs(lane);
  column[10 * 32] = __syncthreads_count(lane < 9);
  column[11 * 32] = __syncthreads_and(lane < 9) * 2 + __syncthreads_or(lane < 9);
}

__global__ void atomic_kernel(int* counters) {
  atomicAdd(&counters[0], 2);
  atomicMax(&counters[1], static_cast<int>(threadIdx.x));
  atomicMin(&counters[2], static_cast<int>(threadIdx.x) - 5);
  atomicCAS(&counters[3], 0, 42);
  atomicInc(reinterpret_cast<unsigned*>(&counters[4]), 6);
}

__global__ void round_kernel(const float* in, __nv_bfloat16* bf16, __half* half) {
  bf16[threadIdx.x] = __float2bfloat16_rn(in[threadIdx.x]);
  half[threadIdx.x] = __float2half_rn(in[threadIdx.x]);
}

__global__ void deadlock_kernel() {
  if (threadIdx.x < 16) __syncthreads();
  __shfl_sync(FULL, 1, 0);
}

}  // namespace

extern "C" int probe_sum(const float* x, int64_t size, float* partial, unsigned* finished, float* total, void* stream) {
  STROP_LAUNCH(sum_kernel, 3, 96, 0, stream, x, size, partial, finished, total);
  return cudaGetLastError();
}
extern "C" int probe_reverse(const int* in, int* out, int with_barrier, void* stream) {
  STROP_LAUNCH(reverse_kernel, 1, 256, 256 * sizeof(int), stream, in, out, with_barrier != 0);
  return cudaGetLastError();
}
extern "C" int probe_warp(int* out, void* stream) {
  STROP_LAUNCH(warp_kernel, 1, 32, 0, stream, out);
  return cudaGetLastError();
}
extern "C" int probe_atomic(int* counters, void* stream) {
  STROP_LAUNCH(atomic_kernel, dim3(2, 3), 50, 0, stream, counters);
  return cudaGetLastError();
}
extern "C" int probe_round(const float* in, void* bf16, void* half, int count, void* stream) {
  STROP_LAUNCH(round_kernel, 1, count, 0, stream, in, static_cast<__nv_bfloat16*>(bf16), static_cast<__half*>(half));
  return cudaGetLastError();
}
extern "C" int probe_deadlock(void* stream) {
  STROP_LAUNCH(deadlock_kernel, 1, 32, 0, stream);
  return cudaGetLastError();
}
