// Which level's kernels run: the best one of this CPU, unless a test asks for a lower one.
#include "level.h"

#include <atomic>

namespace {

int best_level() {
#ifdef __x86_64__
  __builtin_cpu_init();  // this runs as a static initialiser, perhaps before the compiler's own
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return STROP_LEVEL_AVX512;
  if (avx2) return STROP_LEVEL_AVX2;
#endif
  return STROP_LEVEL_BASELINE;
}

std::atomic<int> chosen_level{best_level()};

}  // namespace

extern "C" int strop_cpu_level(void) { return chosen_level; }

extern "C" int strop_cpu_set_level(int level) {
  if (level < STROP_LEVEL_BASELINE || level > best_level()) return STROP_BAD_ARGUMENT;
  chosen_level = level;
  return STROP_OK;
}

const StropKernels &strop_kernels() {
#ifdef __x86_64__
  switch (chosen_level.load(std::memory_order_relaxed)) {
    case STROP_LEVEL_AVX512:
      return strop_avx512_kernels;
    case STROP_LEVEL_AVX2:
      return strop_avx2_kernels;
  }
#endif
  return strop_baseline_kernels;
}

extern "C" int strop_cpu_elementary(int function, const float *x, float *y, int64_t count) {
  if (function < STROP_FUNCTION_EXP || function > STROP_FUNCTION_TANH_SLOPE || count < 0) return STROP_BAD_ARGUMENT;
  strop_kernels().elementary(function, x, y, count);
  return STROP_OK;
}
