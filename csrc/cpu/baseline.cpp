// The kernels for any CPU: SSE2 on x86-64, NEON on aarch64.
#define STROP_VECTOR_BYTES 16
#include "kernels.h"

const StropKernels strop_baseline_kernels = kKernels;
