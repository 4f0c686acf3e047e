// Group advantages on the device: one launch, no atomics on floating-point numbers, so the same bits from run to run.
//
// Up to kMaxSamples rewards, one block sums them into a slot a group. Rewards become integers, whose sums are exact and do not
// depend on their order: x = r 2^(kBits - e), rounded, where all |r| of the group are below 2^e. Of the float's 24 bits none is
// lost unless |r| is below 2^(24 - kBits) of the group's largest, and then 2^-kBits of the largest is an upper bound. With n
// rewards, S = sum x and Q = sum x^2,
//
//   r_i - mean = (n x_i - S) / n  and  sum (r_i - mean)^2 = (n Q - S^2) / n  (in units of 2^(e - kBits)),
//
// both differences exact. Their rounding to float is the first one that a result sees.
//
// More rewards take one warp a sample, which compares it with all others.

#include "warp.h"

namespace {

struct Options {
  int scale, baseline, ddof;
  float eps;
};

constexpr int kThreads = 1024;
constexpr int kRounds = 8;
constexpr int kMaxSamples = kThreads * kRounds;
constexpr int kBits = 39;  // a warp's sum of x^2 takes 2 kBits + 5 = 83 bits, its sum of x with sign kBits + 6 = 45: 128
constexpr int kSquareBits = 2 * kBits + 5;
constexpr int kExponentBias = 126;  // |r| < 2^(E - 126), where E is the exponent's field, also where it is 0

using Wide = unsigned __int128;

// 32-bit words of a slot, each in an array of its own. LARGEST: the largest exponent field; SUM, SQUARES: S, Q, low word first.
// DIVISOR: a float, in the place of Q once that is done with.
enum Word { LARGEST, SIZE, SUM, SQUARES = SUM + 2, WORDS = SQUARES + 3, DIVISOR = SQUARES };
constexpr int kSlotBytes = WORDS * sizeof(uint32_t);

struct Slots {
  uint32_t *words;
  int count;

  __device__ uint32_t &word(int which, int slot) const { return words[which * count + slot]; }
  // Exact whatever else is added at the same time: each word's atomic gives the carry into the next.
  __device__ void add(int first_word, int slot, Wide value, int num_words) const {
    uint32_t carry = 0;
    for (int w = 0; w < num_words; ++w, value >>= 32) {
      const uint64_t term = static_cast<uint64_t>(static_cast<uint32_t>(value)) + carry;
      const uint32_t low = static_cast<uint32_t>(term);
      const uint32_t before = atomicAdd(&word(first_word + w, slot), low);
      carry = static_cast<uint32_t>(term >> 32) + (before + low < low);
    }
  }
  __device__ int64_t sum(int slot) const {
    return static_cast<int64_t>(static_cast<uint64_t>(word(SUM + 1, slot)) << 32 | word(SUM, slot));
  }
  __device__ Wide squares(int slot) const {
    const uint64_t low = static_cast<uint64_t>(word(SQUARES + 1, slot)) << 32 | word(SQUARES, slot);
    return static_cast<Wide>(word(SQUARES + 2, slot)) << 64 | low;
  }
};

__device__ uint32_t exponent_field(float reward) { return __float_as_uint(fabsf(reward)) >> 23; }

// x of a reward in a slot whose largest exponent field is given.
__device__ int64_t scaled(float reward, uint32_t largest) {
  return llrintf(ldexpf(reward, kBits + kExponentBias - static_cast<int>(largest)));
}

// Neighbouring lanes with the same slot: they add up among themselves, and the last one adds to the slot.
struct Run {
  int before;   // lanes of the run before this one
  int longest;  // the largest `before` of the warp
  bool last;

  __device__ Run(int slot, int lane) {
    const int left = __shfl_up_sync(kAllLanes, slot, 1);
    const unsigned heads = __ballot_sync(kAllLanes, lane == 0 || left != slot);
    before = lane - (kWarp - 1 - __clz(heads & (kAllLanes >> (kWarp - 1 - lane))));
    longest = __reduce_max_sync(kAllLanes, before);
    last = lane == kWarp - 1 || (heads >> (lane + 1) & 1);
  }
  // The last lane gets the run's result.
  __device__ uint32_t maximum(uint32_t value) const {
    for (int step = 1; step <= longest; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, value, step);
      if (step <= before) value = max(value, other);
    }
    return value;
  }
  __device__ Wide sum(Wide value) const {
    for (int step = 1; step <= longest; step *= 2) {
      const uint64_t low = __shfl_up_sync(kAllLanes, static_cast<unsigned long long>(value), step);
      const uint64_t high = __shfl_up_sync(kAllLanes, static_cast<unsigned long long>(value >> 64), step);
      if (step <= before) value += static_cast<Wide>(high) << 64 | low;
    }
    return value;
  }
};

// What a warp adds to its slots; a slot below 0 takes nothing. members: rewards of the run, known to its last lane.
__device__ void note_largest(const Slots &slots, int slot, const Run &run, float reward) {
  const uint32_t largest = run.maximum(slot < 0 ? 0 : exponent_field(reward));
  if (run.last && slot >= 0) atomicMax(&slots.word(LARGEST, slot), largest);
}

__device__ void note_sums(const Slots &slots, int slot, const Run &run, float reward, int members) {
  const int64_t x = slot < 0 ? 0 : scaled(reward, slots.word(LARGEST, slot));
  const uint64_t magnitude = static_cast<uint64_t>(x < 0 ? -x : x);
  const Wide square = static_cast<Wide>(magnitude) * magnitude;
  const Wide both = run.sum((static_cast<Wide>(x) << kSquareBits) + square);  // one number carries both sums
  if (!run.last || slot < 0) return;
  const int64_t sum = static_cast<int64_t>(both >> 64) >> (kSquareBits - 64);
  slots.add(SUM, slot, static_cast<Wide>(sum), 2);
  slots.add(SQUARES, slot, both & ((static_cast<Wide>(1) << kSquareBits) - 1), 3);
  atomicAdd(&slots.word(SIZE, slot), static_cast<uint32_t>(members));
}

// n Q - S^2: n^2 times the variance, 0 exactly where all rewards of the slot are equal.
__device__ Wide spread_of(const Slots &slots, int slot) {
  const int64_t sum = slots.sum(slot);
  const uint64_t magnitude = static_cast<uint64_t>(sum < 0 ? -sum : sum);
  return slots.squares(slot) * slots.word(SIZE, slot) - static_cast<Wide>(magnitude) * magnitude;
}

// Standard deviation + eps, in units of 2^e.
__device__ float divisor(const Slots &slots, int slot, Wide spread, const Options &o) {
  const int size = static_cast<int>(slots.word(SIZE, slot)), degrees = max(size - o.ddof, 1);
  const auto high = static_cast<uint64_t>(spread >> 64), low = static_cast<uint64_t>(spread);
  const float whole = fmaf(static_cast<float>(high), 0x1p64f, static_cast<float>(low));
  const float std = sqrtf(whole / static_cast<float>(size * degrees));
  return ldexpf(std, -kBits) + ldexpf(o.eps, kExponentBias - static_cast<int>(slots.word(LARGEST, slot)));
}

__device__ float slot_advantage(const Slots &slots, int slot, int batch, float reward, const Options &o) {
  const auto size = static_cast<int>(slots.word(SIZE, slot));
  const auto largest = static_cast<int>(slots.word(LARGEST, slot));
  const int64_t deviation = size * scaled(reward, largest) - slots.sum(slot);
  if (deviation == 0) return 0;  // as in a group of equal rewards, whose divisor may be 0 too
  const int members = o.baseline == STROP_BASELINE_LEAVE_ONE_OUT ? size - 1 : size;
  const float numerator = ldexpf(static_cast<float>(deviation) / static_cast<float>(members), -kBits);
  if (o.scale == STROP_SCALE_NONE) return ldexpf(numerator, largest - kExponentBias);
  const int of = o.scale == STROP_SCALE_BATCH ? batch : slot;
  const int shift = largest - static_cast<int>(slots.word(LARGEST, of));  // from units of the group's 2^e to the divisor's
  return ldexpf(numerator, shift) / __uint_as_float(slots.word(DIVISOR, of));
}

// One block. A group index outside 0..n-1 gets NaN, as it must not become an address.
__global__ void __launch_bounds__(kThreads)
    group_advantage_slots_kernel(const float *rewards, const int64_t *group_index, int n, Options o, float *advantages,
                                 int64_t *counts) {
  STROP_DYNAMIC_SHARED(uint32_t, words);
  __shared__ int totals[3];  // finite rewards, groups, groups of equal rewards
  const int lane = threadIdx.x % kWarp, batch = n;  // the slot behind the groups' is that of the batch
  const Slots slots{words, n + 1};
  for (int w = threadIdx.x; w < WORDS * slots.count; w += kThreads) words[w] = 0;
  if (threadIdx.x < 3) totals[threadIdx.x] = 0;

  float reward[kRounds];
  int slot[kRounds];  // -1: takes no part
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int i = round * kThreads + static_cast<int>(threadIdx.x);
    reward[round] = i < n ? rewards[i] : NAN;
    const int64_t group = i < n ? group_index[i] : -1;
    slot[round] = isfinite(reward[round]) && group >= 0 && group < n ? static_cast<int>(group) : -1;
  }
  __syncthreads();
  const Run whole_warp(0, lane);
  const bool needs_batch = o.scale == STROP_SCALE_BATCH;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    if (round * kThreads >= n) break;
    note_largest(slots, slot[round], Run(slot[round], lane), reward[round]);
    if (needs_batch) note_largest(slots, batch, whole_warp, slot[round] < 0 ? 0.0f : reward[round]);
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    if (round * kThreads >= n) break;
    const Run run(slot[round], lane);
    note_sums(slots, slot[round], run, reward[round], run.before + 1);
    if (needs_batch) {
      const int members = __popc(__ballot_sync(kAllLanes, slot[round] >= 0));
      note_sums(slots, batch, whole_warp, slot[round] < 0 ? 0.0f : reward[round], members);
    }
  }
  __syncthreads();

  int finite = 0, groups = 0, constant = 0;
  for (int s = threadIdx.x; s < slots.count; s += kThreads) {
    const auto size = static_cast<int>(slots.word(SIZE, s));
    if (size == 0) continue;
    const Wide spread = spread_of(slots, s);
    if (s != batch) {
      finite += size;
      groups += 1;
      constant += spread == 0;
    }
    if (o.scale == (s == batch ? STROP_SCALE_BATCH : STROP_SCALE_GROUP)) {
      slots.word(DIVISOR, s) = __float_as_uint(divisor(slots, s, spread, o));
    }
  }
  finite = __reduce_add_sync(kAllLanes, finite);
  groups = __reduce_add_sync(kAllLanes, groups);
  constant = __reduce_add_sync(kAllLanes, constant);
  if (lane == 0) {
    atomicAdd(&totals[0], finite);
    atomicAdd(&totals[1], groups);
    atomicAdd(&totals[2], constant);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    counts[0] = totals[0];
    counts[1] = n - totals[0];
    counts[2] = totals[1];
    counts[3] = totals[2];
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int i = round * kThreads + static_cast<int>(threadIdx.x);
    if (i >= n) break;
    advantages[i] = slot[round] >= 0 ? slot_advantage(slots, slot[round], batch, reward[round], o)
                    : isfinite(reward[round]) ? NAN
                                              : 0.0f;
  }
}

// The rest is for more than kMaxSamples.

constexpr int kSamplesPerBlock = 8;

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
    group_advantage_pairs_kernel(const float *rewards, const int64_t *group_index, int64_t n, Options o, float *advantages,
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
  const Options options{scale, baseline, ddof, static_cast<float>(eps)};
  if (n <= kMaxSamples) {
    constexpr int most_bytes = kSlotBytes * (kMaxSamples + 1);
    static_assert(most_bytes + 1024 <= 232448, "a block of sm_90 has so much shared memory, some of it for `totals`");
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (int status = status_of(cudaFuncSetAttribute(group_advantage_slots_kernel, limit, most_bytes))) return status;
    const int bytes = kSlotBytes * (static_cast<int>(n) + 1);
    STROP_LAUNCH(group_advantage_slots_kernel, 1, kThreads, bytes, queue, rewards, group_index, static_cast<int>(n), options,
                 advantages, counts);
    return status_of(cudaGetLastError());
  }
  if (int status = status_of(cudaMemsetAsync(counts, 0, 4 * sizeof(int64_t), queue))) return status;
  const auto blocks = static_cast<unsigned>((n + kSamplesPerBlock - 1) / kSamplesPerBlock);
  STROP_LAUNCH(group_advantage_pairs_kernel, blocks, kWarp * kSamplesPerBlock, 0, queue, rewards, group_index, n, options,
               advantages, reinterpret_cast<unsigned long long *>(counts));
  return status_of(cudaGetLastError());
}
