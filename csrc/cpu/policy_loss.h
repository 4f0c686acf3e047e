// The policy loss, kLanes tokens at once. The loss of a token is csrc/include/loss_terms.h, which the CUDA kernel shares; here
// its numbers are vectors.
#pragma once

#include "level.h"
#include "simd.h"

namespace {

inline F log_of(F x) {  // for one policy's rare use: lane by lane
  for (int i = 0; i < kLanes; ++i) x[i] = logf(x[i]);
  return x;
}

// `count` tokens from `first` on, of which those in the mask are inside; the others read as 0.
struct Lanes {
  int64_t first;
  int count;
  I inside;

  Lanes(const uint8_t *mask, int64_t first, int64_t last) : first(first) {
    count = last - first < kLanes ? static_cast<int>(last - first) : kLanes;
    inside = load_flags(mask + first, count);
  }
};

inline F read(const float *array, const Lanes &at) {
  const F x = at.count == kLanes ? Fp32::load(array + at.first) : load_some<Fp32>(array + at.first, at.count);
  return at.inside ? x : F{};
}

inline void write(float *array, const Lanes &at, F x) {
  const F values = at.inside ? x : F{};
  if (at.count == kLanes)
    Fp32::store(array + at.first, values);
  else
    store_some<Fp32>(array + at.first, values, at.count);
}

#define STROP_LOSS_REAL F
#define STROP_LOSS_FLAG I
#define STROP_LOSS_EXP exp_of
#define STROP_LOSS_EXPM1 expm1_of
#define STROP_LOSS_LOG log_of
#include "../include/loss_metrics.h"  // inside this namespace: another level's vectors are another type

// A copy of the code in which the compiler knows the policy.
template <int kPolicy>
strop_loss_code with_policy(strop_loss_code code) {
  code.policy = kPolicy;
  return code;
}

// Sums of the tokens [first, last), in fp32 over 64 vectors, in fp64 over more.
template <int kPolicy>
void sequence_sums(const strop_loss_tokens &tokens, const strop_loss_code &any_code, int64_t first, int64_t last, double *sums) {
  const strop_loss_code code = with_policy<kPolicy>(any_code);
  while (first < last) {
    const int64_t stop = last - first < 64 * kLanes ? last : first + 64 * kLanes;
    F some[6] = {};
    for (; first < stop; first += kLanes) {
      const Lanes at(tokens.mask, first, stop);
      const strop::SequenceSums own = strop::sequence_sums(strop::policy_inputs(tokens, at), code);
      const F fields[6] = {own.tokens, own.log_ratio, own.rollout_gap, own.rollout_drift, own.advantage_up, own.advantage_down};
      for (int field = 0; field < 6; ++field) some[field] += at.inside ? fields[field] : F{};
    }
    for (int field = 0; field < 6; ++field) sums[field] += sum_of(some[field]);
    first = stop;
  }
}

// What the tokens of a sequence with these sums [6] share; without sums, that of a call without sequences.
inline strop::Sequence sequence_of(const float *sums, const strop_loss_code &code) {
  if (!sums) return strop::neutral_sequence();
  return strop::sequence_of({all(sums[0]), all(sums[1]), all(sums[2]), all(sums[3]), all(sums[4]), all(sums[5])}, code);
}

// Losses of the tokens [first, last) of one sequence.
template <int kPolicy>
void run_losses(const strop_loss_tokens &tokens, const strop_loss_code &code, const float *sums, int64_t first, int64_t last,
                F *metrics, float *d_logprob, float *d_entropy) {
  const strop::Sequence sequence = sequence_of(sums, code);
  const F share = 1.0f / *tokens.denominator / (code.divide_by_length ? sequence.length : all(1.0f));
  for (; first < last; first += kLanes) {
    const Lanes at(tokens.mask, first, last);
    const strop::Token token = strop::all_inputs(tokens, at);
    const strop::TokenTerms terms = strop::token_terms(token, sequence, code);
    write(d_logprob, at, share * terms.d_logprob);
    if (d_entropy) write(d_entropy, at, -share * code.entropy_coef);
    F own[strop::NUM_METRICS];
    strop::clear(own);
    strop::add_token(token, terms, share, tokens, code, own);
    for (int metric = 0; metric < strop::NUM_METRICS; ++metric)
      metrics[metric] = strop::joined(metric, metrics[metric], at.inside ? own[metric] : all(strop::identity(metric)));
  }
}

// The first sequence that ends behind a token; num_sequences where none does.
inline int64_t sequence_at(const strop_loss_tokens &tokens, int64_t token) {
  int64_t low = 0, high = tokens.num_sequences;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (tokens.cu_seqlens[middle + 1] > token)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Losses of the tokens [first, last): metrics [NUM_METRICS] are those of them alone. sums: [num_sequences][6] or NULL.
template <int kPolicy>
void token_losses(const strop_loss_tokens &tokens, const strop_loss_code &any_code, const float *sums, int64_t first,
                  int64_t last, double *metrics, float *d_logprob, float *d_entropy) {
  const strop_loss_code code = with_policy<kPolicy>(any_code);
  F totals[strop::NUM_METRICS];
  strop::clear(totals);
  if (!tokens.cu_seqlens) {
    run_losses<kPolicy>(tokens, code, nullptr, first, last, totals, d_logprob, d_entropy);
    first = last;
  } else {
    for (int64_t s = sequence_at(tokens, first); s < tokens.num_sequences && first < last; ++s) {
      const int64_t end = tokens.cu_seqlens[s + 1], stop = end < first ? first : end > last ? last : end;
      run_losses<kPolicy>(tokens, code, sums + s * 6, first, stop, totals, d_logprob, d_entropy);
      first = stop;
    }
  }
  memset(d_logprob + first, 0, (last - first) * sizeof *d_logprob);  // padding
  if (d_entropy) memset(d_entropy + first, 0, (last - first) * sizeof *d_entropy);
  for (int metric = 0; metric < strop::NUM_METRICS; ++metric) {
    const F total = totals[metric];
    double value = total[0];
    for (int i = 1; i < kLanes; ++i) {
      if (metric < strop::RATIO_MIN)
        value += total[i];
      else
        value = strop::joined(metric, all(static_cast<float>(value)), all(total[i]))[0];
    }
    metrics[metric] = value;
  }
}

constexpr StropPolicyLoss kPolicyLosses[strop::NUM_POLICIES] = {
    {sequence_sums<0>, token_losses<0>}, {sequence_sums<1>, token_losses<1>}, {sequence_sums<2>, token_losses<2>},
    {sequence_sums<3>, token_losses<3>}, {sequence_sums<4>, token_losses<4>}, {sequence_sums<5>, token_losses<5>},
    {sequence_sums<6>, token_losses<6>}, {sequence_sums<7>, token_losses<7>},
};

}  // namespace
