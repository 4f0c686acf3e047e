/* What the policy loss reports beside its value: the slots of kernels/metrics.py, as kernels/reference/metrics.py has them. */
#ifndef STROP_LOSS_METRICS_H
#define STROP_LOSS_METRICS_H

#include "loss_terms.h"

namespace strop {

/* METRIC_FIELDS of kernels/metrics.py, in their order: sums, then minima, then maxima. */
enum Metric {
  TOKENS, SEQUENCES, NONFINITE, LOSS, POLICY_LOSS, KL_LOSS, ENTROPY_LOSS, CLIP_LOW, CLIP_HIGH, CLIP_DUAL, RATIO_SUM,
  OLD_K1_SUM, OLD_K3_SUM, LOG_RATIO_ABS_SUM, LOG_RATIO_LIMITED, REF_TOKENS, REF_KL_SUM, ENTROPY_TOKENS, ENTROPY_SUM,
  ROLLOUT_TOKENS, ROLLOUT_GAP_ABS_SUM, WEIGHT_SUM, WEIGHT_SQUARE_SUM, WEIGHT_TRUNCATED, WEIGHT_MASKED, OPSM_MASKED,
  RATIO_MIN, WEIGHT_MIN,
  RATIO_MAX, WEIGHT_MAX, LOG_RATIO_ABS_MAX, ROLLOUT_GAP_ABS_MAX,
  NUM_METRICS
};

/* What a metric is before its first token. */
STROP_HOST_DEVICE float identity(int metric) {
  return metric < RATIO_MIN ? 0.0f : metric < RATIO_MAX ? HUGE_VALF : -HUGE_VALF;
}

/* Joins a metric of two batches. */
STROP_HOST_DEVICE Real joined(int metric, Real x, Real y) {
  return metric < RATIO_MIN ? x + y : metric < RATIO_MAX ? smaller(x, y) : larger(x, y);
}

STROP_HOST_DEVICE void clear(Real *metrics) {
  for (int metric = 0; metric < NUM_METRICS; ++metric) metrics[metric] = real(identity(metric));
}

STROP_HOST_DEVICE Flag is_finite(Real x) { return x - x == 0; }

/* One trainable token into metrics [NUM_METRICS]; LOSS is left to the end, SEQUENCES to whoever knows the sequences. */
STROP_HOST_DEVICE void add_token(const Token &token, const TokenTerms &terms, Real share, const strop_loss_tokens &given,
                                 const strop_loss_code &code, Real *metrics) {
  const Real difference = token.logprob - token.old_logprob;
  const Flag finite = is_finite(token.logprob) && is_finite(token.old_logprob) && is_finite(token.advantage) &&
                      is_finite(token.rollout_logprob) && is_finite(token.ref_logprob) && is_finite(token.entropy);
  metrics[TOKENS] += 1.0f;
  metrics[NONFINITE] += finite ? 0.0f : 1.0f;
  metrics[POLICY_LOSS] += share * terms.policy.loss;
  metrics[KL_LOSS] += share * terms.kl_loss;
  metrics[ENTROPY_LOSS] += share * terms.entropy_loss;
  metrics[CLIP_LOW] += terms.policy.low ? 1.0f : 0.0f;
  metrics[CLIP_HIGH] += terms.policy.high ? 1.0f : 0.0f;
  metrics[CLIP_DUAL] += terms.policy.dual ? 1.0f : 0.0f;
  metrics[RATIO_SUM] += terms.policy.ratio;
  metrics[RATIO_MIN] = smaller(metrics[RATIO_MIN], terms.policy.ratio);
  metrics[RATIO_MAX] = larger(metrics[RATIO_MAX], terms.policy.ratio);
  metrics[OLD_K1_SUM] -= difference;
  metrics[OLD_K3_SUM] += k3(difference);
  metrics[LOG_RATIO_ABS_SUM] += magnitude(difference);
  metrics[LOG_RATIO_ABS_MAX] = larger(metrics[LOG_RATIO_ABS_MAX], magnitude(difference));
  metrics[LOG_RATIO_LIMITED] += magnitude(difference) > code.log_ratio_limit ? 1.0f : 0.0f;
  if (given.ref_logprob) {
    metrics[REF_TOKENS] += 1.0f;
    metrics[REF_KL_SUM] += terms.kl.value;
  }
  if (given.entropy) {
    metrics[ENTROPY_TOKENS] += 1.0f;
    metrics[ENTROPY_SUM] += token.entropy;
  }
  if (given.rollout_logprob) {
    const Real gap = magnitude(token.old_logprob - token.rollout_logprob), weight = terms.weight.value;
    metrics[ROLLOUT_TOKENS] += 1.0f;
    metrics[ROLLOUT_GAP_ABS_SUM] += gap;
    metrics[ROLLOUT_GAP_ABS_MAX] = larger(metrics[ROLLOUT_GAP_ABS_MAX], gap);
    metrics[WEIGHT_SUM] += weight;
    metrics[WEIGHT_SQUARE_SUM] += weight * weight;
    metrics[WEIGHT_MIN] = smaller(metrics[WEIGHT_MIN], weight);
    metrics[WEIGHT_MAX] = larger(metrics[WEIGHT_MAX], weight);
    metrics[WEIGHT_TRUNCATED] += terms.weight.truncated ? 1.0f : 0.0f;
    metrics[WEIGHT_MASKED] += terms.weight.masked ? 1.0f : 0.0f;
    metrics[OPSM_MASKED] += terms.dropped ? 1.0f : 0.0f;
  }
}

}  // namespace strop

#endif
