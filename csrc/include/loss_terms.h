/* The policy loss of one token, its value and its slope, once for csrc/cpu and csrc/cuda.
 *
 * The definition is kernels/reference (policy_terms.py, correction.py, kl.py, policy_loss.py), where autograd makes the slopes;
 * here they are written out. Everything is float and selects instead of branching on a token's values; branches on the code
 * are the same for all tokens, and vanish where the caller's copy of it holds constants (code.policy = strop::CLIP).
 *
 * lp, old, rollout, ref: log-probs under the current policy, the one before the update, the sampler, the reference.
 * D = lp - old, clamped to log_ratio_limit; r = e^D; a = weight * advantage, 0 where the token is dropped.
 *
 * strop_loss_code is trusted here: is_known() says whether its choices exist.
 */
#ifndef STROP_LOSS_TERMS_H
#define STROP_LOSS_TERMS_H

#include <math.h>

#include "strop.h"

#ifdef __CUDACC__
#define STROP_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define STROP_HOST_DEVICE static inline
#endif

/* A file with exponentials of its own, for example ones that vectorise, defines these three before it includes this one. */
#ifndef STROP_LOSS_EXP
#define STROP_LOSS_EXP expf
#define STROP_LOSS_EXPM1 expm1f
#define STROP_LOSS_LOG logf
#endif

namespace strop {

/* Choices of kernels/specs.py, in their order. */
enum Policy { CLIP, GSPO, GSPO_TOKEN, GMPO, CISPO, SAPO, VESPO, REINFORCE, NUM_POLICIES };
enum KlEstimator { K1, K2, K3, NUM_KL_ESTIMATORS };
enum KlGradient { NAIVE, STRAIGHT_THROUGH, UNBIASED, NUM_KL_GRADIENTS };
enum Correction { NO_CORRECTION, TIS, ICEPOP, MEAN_MASK, SEQUENCE_TRUNCATE, SEQUENCE_MASK, NUM_CORRECTIONS };

constexpr float VESPO_LOG_LOW = -18.420680743952367f, VESPO_LOG_HIGH = 20.0f; /* log 1e-8: the authors' clamp of log w */

STROP_HOST_DEVICE bool is_known(const strop_loss_code &code) {
  return code.policy >= 0 && code.policy < NUM_POLICIES && code.kl_estimator >= 0 && code.kl_estimator < NUM_KL_ESTIMATORS &&
         code.kl_gradient >= 0 && code.kl_gradient < NUM_KL_GRADIENTS && code.correction >= 0 &&
         code.correction < NUM_CORRECTIONS;
}

/* Whether more of a sequence than its length decides about its tokens. */
STROP_HOST_DEVICE bool needs_sequence_sums(const strop_loss_code &code) {
  const bool ratio = code.policy == GSPO || code.policy == GSPO_TOKEN || code.policy == GMPO || code.policy == VESPO;
  return ratio || code.correction >= MEAN_MASK || code.has_opsm;
}

STROP_HOST_DEVICE bool needs_sequences(const strop_loss_code &code) {
  return code.divide_by_length || needs_sequence_sums(code);
}

/* NaN passes through all three, unlike fminf and fmaxf. */
STROP_HOST_DEVICE float smaller(float x, float y) { return y < x || y != y ? y : x; }
STROP_HOST_DEVICE float larger(float x, float y) { return y > x || y != y ? y : x; }
STROP_HOST_DEVICE float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

/* e^d - d - 1. Below 1/4 by its series: expm1(d) - d would lose the digits that expm1 kept. */
STROP_HOST_DEVICE float k3(float d) {
  const float series =
      d * d * (1.0f / 2 + d * (1.0f / 6 + d * (1.0f / 24 + d * (1.0f / 120 + d * (1.0f / 720 + d * (1.0f / 5040))))));
  const float direct = STROP_LOSS_EXPM1(d) - d;
  return fabsf(d) < 0.25f ? series : direct;
}

/* A trainable token. Inputs that the call doesn't have are neutral: old = lp, rollout = old, ref = lp, entropy = 0. */
struct Token {
  float logprob, old_logprob, advantage, rollout_logprob, ref_logprob, entropy;
};

/* The four that sequence statistics read; the other two are neutral. */
STROP_HOST_DEVICE Token policy_inputs(const strop_loss_tokens &in, int64_t t) {
  Token token;
  token.logprob = in.logprob[t];
  token.old_logprob = in.old_logprob ? in.old_logprob[t] : token.logprob;
  token.advantage = in.advantages[t];
  token.rollout_logprob = in.rollout_logprob ? in.rollout_logprob[t] : token.old_logprob;
  token.ref_logprob = token.logprob;
  token.entropy = 0.0f;
  return token;
}

STROP_HOST_DEVICE Token all_inputs(const strop_loss_tokens &in, int64_t t) {
  Token token = policy_inputs(in, t);
  if (in.ref_logprob) token.ref_logprob = in.ref_logprob[t];
  if (in.entropy) token.entropy = in.entropy[t];
  return token;
}

STROP_HOST_DEVICE float log_ratio(const Token &token, const strop_loss_code &code) {
  return clamped(token.logprob - token.old_logprob, -code.log_ratio_limit, code.log_ratio_limit);
}

/* Factor of the policy term for a sampler that isn't the old policy, and whether a bound changed it. */
struct Weight {
  float value;
  bool truncated, masked;
};

/* e^log_weight inside [low, high]: outside, 0 where `drops`, else the nearer bound. */
STROP_HOST_DEVICE Weight bounded_weight(float log_weight, bool drops, const strop_loss_code &code) {
  const float weight = STROP_LOSS_EXP(log_weight);
  const bool outside = weight < code.correction_low || weight > code.correction_high;
  const float kept = drops ? (outside ? 0.0f : weight) : clamped(weight, code.correction_low, code.correction_high);
  return {kept, outside && !drops, outside && drops};
}

/* What a token knows alone; 1 where its sequence decides. */
STROP_HOST_DEVICE Weight token_weight(const Token &token, const strop_loss_code &code) {
  const float gap = token.old_logprob - token.rollout_logprob;
  if (code.correction == TIS || code.correction == ICEPOP) return bounded_weight(gap, code.correction == ICEPOP, code);
  return {code.correction == MEAN_MASK ? STROP_LOSS_EXP(gap) : 1.0f, false, false};
}

/* gmpo's D: cut above where A > 0 and below elsewhere. */
STROP_HOST_DEVICE float clipped_log_ratio(float difference, float advantage, const strop_loss_code &code) {
  const float low = STROP_LOSS_LOG(code.ratio_low), high = STROP_LOSS_LOG(code.ratio_high);
  return advantage > 0 ? (difference > high ? high : difference) : (difference < low ? low : difference);
}

/* Sums over the trainable tokens of a sequence: SEQUENCE_FIELDS of kernels/policy.py, in their order. */
struct SequenceSums {
  float tokens, log_ratio, rollout_gap, rollout_drift, advantage_up, advantage_down;
};

/* What one token adds to them. */
STROP_HOST_DEVICE SequenceSums sequence_sums(const Token &token, const strop_loss_code &code) {
  const Weight weight = token_weight(token, code);
  float ratio = log_ratio(token, code);
  if (code.policy == GMPO) ratio = clipped_log_ratio(ratio, token.advantage, code);
  if (code.policy == VESPO) {
    const float log_weight = clamped(STROP_LOSS_LOG(weight.value), VESPO_LOG_LOW, VESPO_LOG_HIGH);
    ratio = clamped(ratio, -VESPO_LOG_HIGH, VESPO_LOG_HIGH) + log_weight;
  }
  const float a = weight.value * token.advantage;
  return {1.0f, ratio, token.old_logprob - token.rollout_logprob, token.rollout_logprob - token.logprob, a < 0 ? 0.0f : a,
          a > 0 ? 0.0f : a};
}

STROP_HOST_DEVICE SequenceSums sum(const SequenceSums &x, const SequenceSums &y) {
  return {x.tokens + y.tokens, x.log_ratio + y.log_ratio, x.rollout_gap + y.rollout_gap, x.rollout_drift + y.rollout_drift,
          x.advantage_up + y.advantage_up, x.advantage_down + y.advantage_down};
}

/* What the tokens of a sequence share. Neutral for a call without sequences. */
struct Sequence {
  float length = 1.0f;
  Weight weight = {1.0f, false, false};
  bool drifted = false; /* the off-policy sequence mask drops its tokens with A < 0 */
  float ratio = 1.0f;   /* exp(mean D); vespo: w */
  float slope = 0.0f;   /* gspo, gmpo: of each token's D, by way of the sequence's ratio */
  float phi_up = 0.0f, phi_down = 0.0f; /* vespo's factor where a >= 0, and elsewhere */
};

STROP_HOST_DEVICE Sequence sequence_of(const SequenceSums &sums, const strop_loss_code &code) {
  Sequence sequence;
  sequence.length = larger(sums.tokens, 1.0f);
  if (!needs_sequence_sums(code)) return sequence;
  if (code.correction == MEAN_MASK) {
    const Weight kept = bounded_weight(sums.rollout_gap / sequence.length, true, code);
    sequence.weight = {kept.masked ? 0.0f : 1.0f, false, kept.masked};
  } else if (code.correction >= SEQUENCE_TRUNCATE) {
    sequence.weight = bounded_weight(sums.rollout_gap, code.correction == SEQUENCE_MASK, code);
  }
  sequence.drifted = code.has_opsm && sums.rollout_drift / sequence.length > code.opsm_delta;
  if (code.policy == VESPO) {
    const float log_w = clamped(sums.log_ratio, VESPO_LOG_LOW, VESPO_LOG_HIGH);
    sequence.ratio = STROP_LOSS_EXP(log_w);
    sequence.phi_up = STROP_LOSS_EXP(code.vespo_lambda_positive + code.vespo_k_positive * log_w -
                                code.vespo_lambda_positive * sequence.ratio);
    sequence.phi_down = STROP_LOSS_EXP(code.vespo_lambda_negative + code.vespo_k_negative * log_w -
                                  code.vespo_lambda_negative * sequence.ratio);
    return sequence;
  }
  const float ratio = sequence.ratio = STROP_LOSS_EXP(sums.log_ratio / sequence.length);
  const float up = sums.advantage_up * sequence.weight.value;
  const float down = (sequence.drifted ? 0.0f : sums.advantage_down) * sequence.weight.value;
  if (code.policy == GSPO) { /* ds/dlp = s / L for every token, times the a of all tokens that no bound cuts */
    const bool up_lives = ratio <= code.ratio_high && up != 0;
    const bool down_lives = ratio >= code.ratio_low && ratio <= code.ratio_cap && down != 0;
    sequence.slope = -(up * (up_lives ? ratio : 0.0f) + down * (down_lives ? ratio : 0.0f)) / sequence.length;
  } else if (code.policy == GMPO) {
    const float total = up + down;
    sequence.slope = -total * (total == 0 ? 0.0f : ratio) / sequence.length;
  }
  return sequence;
}

/* The policy term. `slope` is the derivative in lp. */
struct PolicyTerm {
  float loss, slope, ratio;
  bool low, high, dual; /* which bound cuts the token */
};

/* -a clip(r): for a > 0 -a min(r, high), for a < 0 -a max(r, low), and not beyond the cap of dual_clip or delta.
 * `slope` in log r. A token with a = 0 has none even where r overflows. */
STROP_HOST_DEVICE PolicyTerm clipped(float ratio, float a, const strop_loss_code &code) {
  const bool low = a < 0 && ratio < code.ratio_low, high = a > 0 && ratio > code.ratio_high;
  const bool dual = a < 0 && ratio > code.ratio_cap;
  const float bound = low ? code.ratio_low : high ? code.ratio_high : dual ? code.ratio_cap : 0.0f;
  const bool cut = low || high || dual || a == 0;
  return {-a * (cut ? bound : ratio), cut ? 0.0f : -a * ratio, ratio, low, high, dual};
}

/* -a (4 / tau) sigmoid(tau (r - 1)); beyond 104 e^-x is 0 in fp32, but r may be infinite. */
STROP_HOST_DEVICE PolicyTerm sapo(float difference, float a, const strop_loss_code &code) {
  const float tau = a > 0 ? code.sapo_tau_positive : code.sapo_tau_negative;
  const float ratio = STROP_LOSS_EXP(difference), x = tau * STROP_LOSS_EXPM1(difference);
  const bool saturated = x > 104.0f;
  const float tail = STROP_LOSS_EXP(-fabsf(x)), whole = 1.0f / (1.0f + tail);
  const float gate = a == 0 ? 0.5f : x < 0 ? tail * whole : whole;
  const float slope = saturated || a == 0 ? 0.0f : -4.0f * a * (tail * whole * whole) * ratio;
  return {-a * 4.0f / tau * gate, slope, ratio, false, false, false};
}

STROP_HOST_DEVICE PolicyTerm policy_term(const Token &token, float a, const Sequence &sequence, const strop_loss_code &code) {
  const float lp = token.logprob, difference = log_ratio(token, code);
  const float moves = fabsf(lp - token.old_logprob) > code.log_ratio_limit ? 0.0f : 1.0f; /* dD/dlp */
  const float nothing = difference - difference; /* NaN where D isn't finite, so that the loss tells */
  switch (code.policy) {
    case GSPO: {
      PolicyTerm term = clipped(sequence.ratio, a, code);
      term.loss += sequence.slope * nothing;
      term.slope = sequence.slope * moves;
      return term;
    }
    case GSPO_TOKEN: { /* the sequence's ratio, each token's own slope */
      PolicyTerm term = clipped(sequence.ratio + nothing, a, code);
      term.slope *= moves;
      return term;
    }
    case GMPO: { /* -a s, the bounds cut each token's D */
      PolicyTerm term = clipped(STROP_LOSS_EXP(difference), a, code);
      const float inside = clipped_log_ratio(difference, token.advantage, code);
      term.loss = -a * (a == 0 ? 0.0f : sequence.ratio) + sequence.slope * nothing;
      term.slope = inside == difference ? sequence.slope * moves : 0.0f;
      term.ratio = sequence.ratio;
      return term;
    }
    case CISPO: { /* -sg(clip(r)) a lp */
      const float ratio = STROP_LOSS_EXP(difference);
      const float slope = -clamped(ratio, code.ratio_low, code.ratio_high) * a;
      return {slope * lp, slope, ratio, a != 0 && ratio < code.ratio_low, a != 0 && ratio > code.ratio_high, false};
    }
    case SAPO: {
      PolicyTerm term = sapo(difference, a, code);
      term.slope *= moves;
      return term;
    }
    case VESPO: { /* -sg(phi) a lp */
      const float slope = -(a >= 0 ? sequence.phi_up : sequence.phi_down) * a;
      return {slope * lp, slope, sequence.ratio, false, false, false};
    }
    case REINFORCE: return {-a * lp, -a, STROP_LOSS_EXP(difference), false, false, false};
    default: {
      PolicyTerm term = clipped(STROP_LOSS_EXP(difference), a, code);
      term.slope *= moves;
      return term;
    }
  }
}

/* KL to the reference of one token: the estimator's value, and what the loss adds before kl_coef. d = ref - lp. */
struct KlTerm {
  float value, loss, slope;
};

STROP_HOST_DEVICE KlTerm kl_term(const Token &token, const strop_loss_code &code) {
  const float d = token.ref_logprob - token.logprob;
  const float value = code.kl_estimator == K1 ? -d : code.kl_estimator == K2 ? d * d / 2 : k3(d);
  if (code.kl_gradient == STRAIGHT_THROUGH) return {value, value, -d};
  if (code.kl_gradient == UNBIASED) { /* r k3, and r k3 + r (1 - e^d) = -r d; where D is clamped, r has no slope */
    const float ratio = STROP_LOSS_EXP(log_ratio(token, code));
    const bool limited = fabsf(token.logprob - token.old_logprob) > code.log_ratio_limit;
    return {value, ratio * value, -ratio * (limited ? STROP_LOSS_EXPM1(d) : d)};
  }
  return {value, value, code.kl_estimator == K1 ? 1.0f : code.kl_estimator == K2 ? -d : -STROP_LOSS_EXPM1(d)};
}

/* A token's part of the loss, before its share: 1 / denominator, and with divide_by_length 1 / length. */
struct TokenTerms {
  PolicyTerm policy;
  KlTerm kl;
  float kl_loss, entropy_loss, d_logprob;
  Weight weight; /* of the rollout correction; e^(old - rollout), unused, without one */
  bool dropped;  /* by the off-policy sequence mask */
};

STROP_HOST_DEVICE TokenTerms token_terms(const Token &token, const Sequence &sequence, const strop_loss_code &code) {
  TokenTerms terms;
  const Weight own = token_weight(token, code);
  terms.weight = {own.value * sequence.weight.value, own.truncated || sequence.weight.truncated,
                  own.masked || sequence.weight.masked};
  terms.dropped = sequence.drifted && token.advantage < 0;
  const float factor = code.policy == VESPO ? 1.0f : terms.weight.value; /* vespo's phi holds the weight already */
  const float a = (terms.dropped ? 0.0f : factor) * token.advantage;
  if (code.correction == NO_CORRECTION) terms.weight.value = STROP_LOSS_EXP(token.old_logprob - token.rollout_logprob);
  terms.policy = policy_term(token, a, sequence, code);
  terms.kl = kl_term(token, code);
  terms.kl_loss = code.kl_coef != 0 ? code.kl_coef * terms.kl.loss : 0.0f;
  terms.entropy_loss = code.entropy_coef != 0 ? -code.entropy_coef * token.entropy : 0.0f;
  terms.d_logprob = terms.policy.slope + (code.kl_coef != 0 ? code.kl_coef * terms.kl.slope : 0.0f);
  return terms;
}

}  // namespace strop

#endif
