// What every .cu file of this folder includes: the CUDA runtime, or the emulation that runs the same source on the CPU in
// tests (tests/kernels/emulation). Three spellings make that possible:
//
//   STROP_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)   for kernel<<<grid, block, shared_bytes, stream>>>(...);
//                                                                         a kernel<A, B> stands in parentheses
//   STROP_DYNAMIC_SHARED(type, name)                                      declares `type* name`, the dynamic shared memory
//   strop_exp2(x)                                                         for assembler
#pragma once

#include <cstdint>

#include "../include/strop.h"

#ifdef STROP_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define STROP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

#define STROP_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char strop_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(strop_dynamic_shared)

// 2^x in one instruction, relative error 2^-22; below 2^-126 it is 0. exp2f adds three for those.
__device__ inline float strop_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

// What the CUDA runtime said to this thread's last launch, for strop_cuda_last_error(). cudaGetLastError after a launch also
// returns what an earlier launch left, an access outside memory by its kernel for example: the device is lost to all that follow.
inline thread_local int strop_last_error = 0;

inline int status_of(cudaError_t error) {
  strop_last_error = static_cast<int>(error);
  return error == cudaSuccess ? STROP_OK : STROP_LAUNCH_FAILED;
}
