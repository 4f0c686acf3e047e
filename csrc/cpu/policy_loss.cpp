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
        run_chunk(chunk * kChunk, std::min(count, (chunk + 1) * kChunk), chunks[chunk].values, d_logprob, d_entropy);
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
    sequences.resize(count);
    nonempty.resize(count);
    const int64_t at_once = count * kChunk / std::max<int64_t>(tokens.num_tokens, 1) + 1;
    in_parallel(count, at_once, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        const strop::SequenceSums sums = sums_of(s);
        sequences[s] = strop::sequence_of(sums, code);
        nonempty[s] = sums.tokens > 0;
      }
    });
  }

  strop::SequenceSums sums_of(int64_t sequence) const {
    if (const float *given = tokens.sequence_stats) {
      given += sequence * 6;
      return {given[0], given[1], given[2], given[3], given[4], given[5]};
    }
    const int64_t first = bound(sequence), last = bound(sequence + 1);
    double sums[6] = {};
    if (strop::needs_sequence_sums(code))
      kernels.sequence_sums(tokens, code, first, last, sums);
    else
      for (int64_t t = first; t < last; ++t) sums[0] += tokens.mask[t] != 0;
    return {static_cast<float>(sums[0]), static_cast<float>(sums[1]), static_cast<float>(sums[2]),
            static_cast<float>(sums[3]), static_cast<float>(sums[4]), static_cast<float>(sums[5])};
  }

  void run_chunk(int64_t first, int64_t last, double *metrics, float *d_logprob, float *d_entropy) const {
    std::fill(d_logprob + first, d_logprob + last, 0.0f);  // outside the mask and in the padding
    if (d_entropy) std::fill(d_entropy + first, d_entropy + last, 0.0f);
    for (int metric = 0; metric < strop::NUM_METRICS; ++metric) metrics[metric] = strop::identity(metric);
    if (!tokens.cu_seqlens) return kernels.token_losses(tokens, code, {}, first, last, metrics, d_logprob, d_entropy);
    const int64_t *ends = tokens.cu_seqlens + 1;
    for (int64_t s = std::upper_bound(ends, ends + tokens.num_sequences, first) - ends; s < tokens.num_sequences; ++s) {
      const int64_t start = std::max(first, bound(s)), stop = std::min(last, bound(s + 1));
      if (start >= last) break;
      kernels.token_losses(tokens, code, sequences[s], start, stop, metrics, d_logprob, d_entropy);
    }
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
    all.values[strop::SEQUENCES] = std::count(nonempty.begin(), nonempty.end(), 1);
    all.values[strop::LOSS] =
        all.values[strop::POLICY_LOSS] + all.values[strop::KL_LOSS] + all.values[strop::ENTROPY_LOSS];
    std::transform(all.values, all.values + strop::NUM_METRICS, metrics, [](double value) { return static_cast<float>(value); });
    *loss = metrics[strop::LOSS];
  }

  const strop_loss_tokens &tokens;
  const strop_loss_code &code;
  const StropPolicyLoss &kernels;
  std::vector<strop::Sequence> sequences;
  std::vector<uint8_t> nonempty;
};

}  // namespace

extern "C" int strop_cpu_policy_loss(const strop_loss_tokens *tokens, const strop_loss_code *code, float *loss, float *metrics,
                                     float *d_logprob, float *d_entropy) {
  if (tokens->num_tokens < 0 || tokens->num_sequences < 0 || !strop::is_known(*code) ||
      (!tokens->cu_seqlens && (strop::needs_sequences(*code) || tokens->num_sequences > 0)))
    return STROP_BAD_ARGUMENT;
  try {
    PolicyLossCall(*tokens, *code).run(loss, metrics, d_logprob, d_entropy);
  } catch (const std::bad_alloc &) {
    return STROP_OUT_OF_MEMORY;
  }
  return STROP_OK;
}
