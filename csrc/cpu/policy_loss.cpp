// The policy loss's entry point: what the sequences decide, then the tokens, then the sums.
//
// Tokens are dealt out in chunks whose bounds don't depend on the number of threads; each chunk has sums of its own, and
// these are joined in order: the same bits with 1 thread and with 64.
#include "level.h"
#include "threads.h"

#include <algorithm>
#include <new>
#include <vector>

#include "../include/loss_metrics.h"

namespace {

constexpr int64_t kChunk = 2048;

struct ChunkMetrics {
  double values[strop::NUM_METRICS];
};

class PolicyLossCall {
 public:
  PolicyLossCall(const strop_loss_tokens &tokens, const strop_loss_code &code)
      : tokens(tokens), code(code), kernels(strop_kernels().policy_losses[code.policy]) {}

  void run(float *loss, float *metrics, float *d_logprob, float *d_entropy) {
    find_sequences();
    const int64_t count = tokens.num_tokens;
    std::vector<ChunkMetrics> chunks((count + kChunk - 1) / kChunk);
    in_parallel(static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk)
        kernels.token_losses(tokens, code, sums.data(), chunk * kChunk, std::min(count, (chunk + 1) * kChunk),
                             chunks[chunk].values, d_logprob, d_entropy);
    });
    join(chunks, loss, metrics);
  }

 private:
  // Tokens [bound(s), bound(s + 1)) are sequence s, and those behind the last are padding.
  int64_t bound(int64_t sequence) const {
    return sequence == 0 ? 0 : std::clamp<int64_t>(tokens.cu_seqlens[sequence], 0, tokens.num_tokens);
  }

  void find_sequences() {
    if (!tokens.cu_seqlens) return;
    const int64_t count = tokens.num_sequences;
    sums.resize(count * 6);
    if (tokens.sequence_stats) {
      std::copy(tokens.sequence_stats, tokens.sequence_stats + count * 6, sums.begin());
      return;
    }
    const int64_t at_once = count * kChunk / std::max<int64_t>(tokens.num_tokens, 1) + 1;
    in_parallel(count, at_once, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) add_up(bound(s), bound(s + 1), &sums[s * 6]);
    });
  }

  void add_up(int64_t first, int64_t last, float *into) const {
    double total[6] = {};
    if (strop::needs_sequence_sums(code))
      kernels.sequence_sums(tokens, code, first, last, total);
    else
      for (int64_t t = first; t < last; ++t) total[0] += tokens.mask[t] != 0;
    std::copy(total, total + 6, into);
  }

  void join(const std::vector<ChunkMetrics> &chunks, float *loss, float *metrics) const {
    ChunkMetrics all;
    for (int metric = 0; metric < strop::NUM_METRICS; ++metric) {
      double &value = all.values[metric] = strop::identity(metric);
      for (const ChunkMetrics &chunk : chunks) {
        const double other = chunk.values[metric];
        value = metric < strop::RATIO_MIN ? value + other
                                          : strop::joined(metric, static_cast<float>(value), static_cast<float>(other));
      }
    }
    for (int64_t s = 0; s < tokens.num_sequences; ++s) all.values[strop::SEQUENCES] += sums[s * 6] > 0;
    all.values[strop::LOSS] =
        all.values[strop::POLICY_LOSS] + all.values[strop::KL_LOSS] + all.values[strop::ENTROPY_LOSS];
    std::transform(all.values, all.values + strop::NUM_METRICS, metrics, [](double value) { return static_cast<float>(value); });
    *loss = metrics[strop::LOSS];
  }

  const strop_loss_tokens &tokens;
  const strop_loss_code &code;
  const StropPolicyLoss &kernels;
  std::vector<float> sums;  // [num_sequences][6]
};

}  // namespace

extern "C" int strop_cpu_policy_loss(const strop_loss_tokens *tokens, const strop_loss_code *code, float *loss, float *metrics,
                                     float *d_logprob, float *d_entropy) {
  if (!strop::is_sound(*tokens, *code, d_entropy)) return STROP_BAD_ARGUMENT;
  try {
    PolicyLossCall(*tokens, *code).run(loss, metrics, d_logprob, d_entropy);
  } catch (const std::bad_alloc &) {
    return STROP_OUT_OF_MEMORY;
  }
  return STROP_OK;
}
