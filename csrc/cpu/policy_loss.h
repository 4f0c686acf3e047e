// The policy loss over runs of tokens of one sequence. The loss of one token is csrc/include/loss_terms.h, which the CUDA
// kernel shares; here its exponentials are those of simd.h: inlined and without branches, several tokens run at once.
#pragma once

#include "level.h"
#include "simd.h"

#define STROP_LOSS_EXP exp_of
#define STROP_LOSS_EXPM1 expm1_of
#define STROP_LOSS_LOG logf
#include "../include/loss_metrics.h"

namespace {

constexpr int kTokensInFp32 = 128;  // metrics are added up in fp32 over so many tokens, in fp64 over more

// A copy of the code in which the compiler knows the policy.
template <int kPolicy>
strop_loss_code with_policy(strop_loss_code code) {
  code.policy = kPolicy;
  return code;
}

template <int kPolicy>
void sequence_sums_of(const strop_loss_tokens &tokens, const strop_loss_code &any_code, int64_t first, int64_t last,
                      double *sums) {
  const strop_loss_code code = with_policy<kPolicy>(any_code);
  for (int64_t t = first; t < last; ++t) {
    if (!tokens.mask[t]) continue;
    const strop::SequenceSums own = strop::sequence_sums(strop::policy_inputs(tokens, t), code);
    sums[0] += own.tokens;
    sums[1] += own.log_ratio;
    sums[2] += own.rollout_gap;
    sums[3] += own.rollout_drift;
    sums[4] += own.advantage_up;
    sums[5] += own.advantage_down;
  }
}

template <int kPolicy>
void token_losses(const strop_loss_tokens &tokens, const strop_loss_code &any_code, const strop::Sequence &sequence,
                  int64_t first, int64_t last, double *metrics, float *d_logprob, float *d_entropy) {
  const strop_loss_code code = with_policy<kPolicy>(any_code);
  const float share = 1.0f / *tokens.denominator / (code.divide_by_length ? sequence.length : 1.0f);
  for (int64_t start = first; start < last; start += kTokensInFp32) {
    const int64_t stop = last - start < kTokensInFp32 ? last : start + kTokensInFp32;
    float some[strop::NUM_METRICS];
    strop::clear(some);
    for (int64_t t = start; t < stop; ++t) {
      if (!tokens.mask[t]) continue;
      const strop::Token token = strop::all_inputs(tokens, t);
      const strop::TokenTerms terms = strop::token_terms(token, sequence, code);
      d_logprob[t] = share * terms.d_logprob;
      if (d_entropy) d_entropy[t] = -share * code.entropy_coef;
      strop::add_token(token, terms, share, tokens, code, some);
    }
    for (int metric = 0; metric < strop::RATIO_MIN; ++metric) metrics[metric] += some[metric];
    for (int metric = strop::RATIO_MIN; metric < strop::NUM_METRICS; ++metric)
      metrics[metric] = strop::joined(metric, static_cast<float>(metrics[metric]), some[metric]);
  }
}

constexpr StropPolicyLoss kPolicyLosses[strop::NUM_POLICIES] = {
    {sequence_sums_of<0>, token_losses<0>}, {sequence_sums_of<1>, token_losses<1>}, {sequence_sums_of<2>, token_losses<2>},
    {sequence_sums_of<3>, token_losses<3>}, {sequence_sums_of<4>, token_losses<4>}, {sequence_sums_of<5>, token_losses<5>},
    {sequence_sums_of<6>, token_losses<6>}, {sequence_sums_of<7>, token_losses<7>},
};

}  // namespace
