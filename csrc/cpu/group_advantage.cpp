// Group advantages on the host. Sums run in double and in the order of the rewards, as in the torch reference, so both give
// the same bits (a target whose compiler fuses multiply and add may differ in the last bit of a double, before the float).

#include "../include/strop.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

namespace {

struct Group {
  double size = 0, sum = 0, squares = 0;
  double low = std::numeric_limits<double>::infinity(), high = -std::numeric_limits<double>::infinity();
  double mean = 0;

  bool varied() const { return high > low; }
};

// Standard deviation + eps; with ddof 1 a lone reward divides by 1, as its advantage is 0 anyway.
double divisor(double squares, double count, int ddof, double eps) {
  return std::sqrt(squares / std::max(count - ddof, 1.0)) + eps;
}

void advantages_of(const float *rewards, const int64_t *group_index, int64_t n, int scale, int baseline,
                   int ddof, double eps, float *advantages, int64_t *counts) {
  std::vector<Group> groups(n);
  Group batch;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(rewards[i])) continue;
    const double reward = rewards[i];
    for (Group *group : {&groups[group_index[i]], &batch}) {
      group->size += 1;
      group->sum += reward;
      group->low = std::min(group->low, reward);
      group->high = std::max(group->high, reward);
    }
  }
  batch.mean = batch.sum / std::max(batch.size, 1.0);
  for (Group &group : groups) group.mean = group.sum / std::max(group.size, 1.0);
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(rewards[i])) continue;
    for (Group *group : {&groups[group_index[i]], &batch}) {
      const double deviation = rewards[i] - group->mean;
      group->squares += deviation * deviation;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const Group &group = groups[group_index[i]];
    if (!std::isfinite(rewards[i]) || !group.varied()) {
      advantages[i] = 0;
      continue;
    }
    const Group &spread = scale == STROP_SCALE_BATCH ? batch : group;
    const double by = scale == STROP_SCALE_NONE ? 1.0 : divisor(spread.squares, spread.size, ddof, eps);
    const double factor = baseline == STROP_BASELINE_LEAVE_ONE_OUT ? group.size / std::max(group.size - 1, 1.0) : 1.0;
    advantages[i] = static_cast<float>(factor * (rewards[i] - group.mean) / by);
  }
  counts[0] = static_cast<int64_t>(batch.size);
  counts[1] = n - counts[0];
  counts[2] = counts[3] = 0;
  for (const Group &group : groups) {
    counts[2] += group.size > 0;
    counts[3] += group.size > 0 && !group.varied();
  }
}

}  // namespace

extern "C" int strop_cpu_abi_version(void) { return STROP_ABI_VERSION; }

extern "C" int strop_cpu_group_advantage(const float *rewards, const int64_t *group_index, int64_t n, int scale,
                                         int baseline, int ddof, double eps, float *advantages,
                                         int64_t *counts) {
  const bool known_scale = scale >= STROP_SCALE_GROUP && scale <= STROP_SCALE_NONE;
  const bool known_baseline = baseline == STROP_BASELINE_MEAN || baseline == STROP_BASELINE_LEAVE_ONE_OUT;
  if (n < 0 || !known_scale || !known_baseline || (ddof != 0 && ddof != 1) || !(eps >= 0)) return STROP_BAD_ARGUMENT;
  for (int64_t i = 0; i < n; ++i)
    if (group_index[i] < 0 || group_index[i] >= n) return STROP_BAD_ARGUMENT;
  try {
    advantages_of(rewards, group_index, n, scale, baseline, ddof, eps, advantages, counts);
  } catch (const std::bad_alloc &) {
    return STROP_OUT_OF_MEMORY;
  }
  return STROP_OK;
}
