// The kernels for CPUs with AVX-512.
#ifdef __x86_64__
#include "level.h"

#define STROP_VECTOR_BYTES 64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const StropKernels strop_avx512_kernels = kKernels;
#endif
