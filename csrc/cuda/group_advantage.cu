// Group advantages on the device: one launch, one warp a sample, no atomics on floating-point numbers, so the same bits
// from run to run.
//
// Everything is relative to the sample's own reward: with d_j = r_j - r_i, r_i - mean = -(sum d_j) / n, and the squared
// deviations are (d_j - sum d / n)^2. Differences of neighbouring floats are exact, so fp32 is enough.

#include "warp.h"

namespace {

constexpr int kSamplesPerBlock = 8;

struct Options {
  int scale, baseline, ddof;
  float eps;
};

// Number, sum of d and sum of squared deviations of the finite rewards that a sample is measured against.
struct Spread {
  int size = 0;
  float sum = 0, squares = 0;

  __device__ void join() {
    size = __reduce_add_sync(kAllLanes, size);
    sum = warp_sum(sum);
  }
  __device__ float mean() const { return sum / static_cast<float>(size > 1 ? size : 1); }
  __device__ float divisor(const Options &o) const {
    const int degrees = size - o.ddof;
    return sqrtf(squares / static_cast<float>(degrees > 1 ? degrees : 1)) + o.eps;
  }
};

__global__ void __launch_bounds__(kWarp *kSamplesPerBlock)
    group_advantage_kernel(const float *rewards, const int64_t *group_index, int64_t n, Options o, float *advantages,
                           unsigned long long *counts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSamplesPerBlock + threadIdx.x / kWarp;
  if (i >= n) return;  // whole warps
  const int lane = threadIdx.x % kWarp;
  const float own = rewards[i];
  const int64_t own_group = group_index[i];

  Spread group, batch;
  bool varied = false, earlier = false;  // does the group hold another value; does it hold a finite reward before i
  for (int64_t j = lane; j < n; j += kWarp) {
    const float d = rewards[j] - own;
    if (!isfinite(rewards[j])) continue;
    batch.size += 1;
    batch.sum += d;
    if (group_index[j] != own_group) continue;
    group.size += 1;
    group.sum += d;
    varied |= d != 0;
    earlier |= j < i;
  }
  group.join();
  batch.join();
  varied = __any_sync(kAllLanes, varied);
  earlier = __any_sync(kAllLanes, earlier);

  const float group_mean = group.mean(), batch_mean = batch.mean();
  for (int64_t j = lane; j < n; j += kWarp) {
    if (!isfinite(rewards[j])) continue;
    const float d = rewards[j] - own;
    batch.squares += (d - batch_mean) * (d - batch_mean);
    if (group_index[j] == own_group) group.squares += (d - group_mean) * (d - group_mean);
  }
  group.squares = warp_sum(group.squares);
  batch.squares = warp_sum(batch.squares);
  if (lane != 0) return;

  const bool finite = isfinite(own);
  float advantage = 0;
  if (finite && varied) {
    const float others = static_cast<float>(group.size > 1 ? group.size - 1 : 1);
    const float factor = o.baseline == STROP_BASELINE_LEAVE_ONE_OUT ? static_cast<float>(group.size) / others : 1.0f;
    const float by = o.scale == STROP_SCALE_NONE ? 1.0f : (o.scale == STROP_SCALE_BATCH ? batch : group).divisor(o);
    advantage = -factor * group_mean / by;
  }
  advantages[i] = advantage;
  atomicAdd(&counts[finite ? 0 : 1], 1ull);
  if (finite && !earlier) {  // the first finite reward speaks for its group
    atomicAdd(&counts[2], 1ull);
    if (!varied) atomicAdd(&counts[3], 1ull);
  }
}

}  // namespace

extern "C" int strop_cuda_group_advantage(const float *rewards, const int64_t *group_index, int64_t n, int scale,
                                          int baseline, int ddof, double eps, float *advantages, int64_t *counts,
                                          void *stream) {
  const bool known_scale = scale >= STROP_SCALE_GROUP && scale <= STROP_SCALE_NONE;
  const bool known_baseline = baseline == STROP_BASELINE_MEAN || baseline == STROP_BASELINE_LEAVE_ONE_OUT;
  if (n < 0 || !known_scale || !known_baseline || (ddof != 0 && ddof != 1) || !(eps >= 0)) return STROP_BAD_ARGUMENT;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (int status = status_of(cudaMemsetAsync(counts, 0, 4 * sizeof(int64_t), queue))) return status;
  if (n == 0) return STROP_OK;
  const auto blocks = static_cast<unsigned>((n + kSamplesPerBlock - 1) / kSamplesPerBlock);
  const Options options{scale, baseline, ddof, static_cast<float>(eps)};
  STROP_LAUNCH(group_advantage_kernel, blocks, kWarp * kSamplesPerBlock, 0, queue, rewards, group_index, n, options,
               advantages, reinterpret_cast<unsigned long long *>(counts));
  return status_of(cudaGetLastError());
}
