// The kernels for CPUs with AVX2.
#ifdef __x86_64__
#include "level.h"

#define STROP_VECTOR_BYTES 32
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const StropKernels strop_avx2_kernels = kKernels;
#endif
