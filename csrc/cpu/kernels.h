// All kernels of one level. The level's source defines STROP_VECTOR_BYTES, then includes this.
#include "level.h"
#include "logit_rows.h"
#include "policy_loss.h"

namespace {

void elementary(int function, const float *x, float *y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int some = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    const F value = load_some<Fp32>(x + i, some);
    const Tanh tanh = tanh_of(value);
    const F results[] = {exp_of(value), expm1_of(value), tanh.t, tanh.slope};
    store_some<Fp32>(y + i, results[function], some);
  }
}

constexpr StropKernels kKernels = {logit_statistics, logit_gradient, kPolicyLosses, elementary};

}  // namespace
