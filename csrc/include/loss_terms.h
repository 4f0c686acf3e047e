/* The policy loss of one token, its value and its slope, once for csrc/cpu and csrc/cuda.
 *
 * The definition is kernels/reference (policy_terms.py, correction.py, kl.py, policy_loss.py), where autograd makes the slopes;
 * here they are written out. Everything is fp32 and selects instead of branching on a token's values; branches on the code
 * are the same for all tokens, and vanish where the caller's copy of it holds constants (code.policy = strop::CLIP). So the
 * same text serves a float (one token a thread on a GPU) and a vector of floats (csrc/cpu/policy_loss.h).
 *
 * lp, old, rollout, ref: log-probs under the current policy, the one before the update, the sampler, the reference.
 * D = lp - old, clamped to log_ratio_limit; r = e^D; a = weight * advantage, 0 where the token is dropped.
 *
 * All of it trusts its arguments: is_sound() is what the entry points ask first.
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

/* A file that computes several tokens at once defines these before it includes this one: a vector of floats, what comparing
 * two of them gives, and the functions of a vector. Its tokens have a position of its own type, with read(array, position). */
#ifndef STROP_LOSS_REAL
#define STROP_LOSS_REAL float
#define STROP_LOSS_FLAG bool
#define STROP_LOSS_EXP expf
#define STROP_LOSS_EXPM1 expm1f
#define STROP_LOSS_LOG logf
#endif

namespace strop {

typedef STROP_LOSS_REAL Real;
typedef STROP_LOSS_FLAG Flag;

/* The same number for every token. */
STROP_HOST_DEVICE Real real(float x) { return Real{} + x; }

/* Choices of kernels/specs.py, in their order. */
enum Policy { CLIP, GSPO, GSPO_TOKEN, GMPO, CISPO, SAPO, VESPO, REINFORCE, NUM_POLICIES };
enum KlEstimator { K1, K2, K3, NUM_KL_ESTIMATORS };
enum KlGradient { NAIVE, STRAIGHT_THROUGH, UNBIASED, NUM_KL_GRADIENTS };
enum Correction { NO_CORRECTION, TIS, ICEPOP, MEAN_MASK, SEQUENCE_TRUNCATE, SEQUENCE_MASK, NUM_CORRECTIONS };

constexpr float VESPO_LOG_LOW = -18.420680743952367f, VESPO_LOG_HIGH = 20.0f; /* log 1e-8: the authors' clamp of log w */

/* Whether more of a sequence than its length decides about its tokens. */
STROP_HOST_DEVICE bool needs_sequence_sums(const strop_loss_code &code) {
  const bool ratio = code.policy == GSPO || code.policy == GSPO_TOKEN || code.policy == GMPO || code.policy == VESPO;
  return ratio || code.correction >= MEAN_MASK || code.has_opsm;
}

STROP_HOST_DEVICE bool needs_sequences(const strop_loss_code &code) {
  return code.divide_by_length || needs_sequence_sums(code);
}

STROP_HOST_DEVICE bool is_known(const strop_loss_code &code) {
  return code.policy >= 0 && code.policy < NUM_POLICIES && code.kl_estimator >= 0 && code.kl_estimator < NUM_KL_ESTIMATORS &&
         code.kl_gradient >= 0 && code.kl_gradient < NUM_KL_GRADIENTS && code.correction >= 0 &&
         code.correction < NUM_CORRECTIONS;
}

/* Whether a call can be served: its choices exist, and every input that the code reads is there (no token, no address). */
STROP_HOST_DEVICE bool is_sound(const strop_loss_tokens &in, const strop_loss_code &code, const float *d_entropy) {
  const bool sizes = in.num_tokens >= 0 && in.num_sequences >= 0 && (in.cu_seqlens || in.num_sequences == 0);
  const bool sequences = in.cu_seqlens || (!needs_sequences(code) && !in.sequence_stats);
  const bool sources = (in.rollout_logprob || (code.correction == NO_CORRECTION && !code.has_opsm)) &&
                       (in.ref_logprob || code.kl_coef == 0) && ((in.entropy && d_entropy) || code.entropy_coef == 0);
  return is_known(code) && sizes && sequences && (sources || in.num_tokens == 0);
}

/* NaN passes through all three, unlike fminf and fmaxf. */
STROP_HOST_DEVICE Real smaller(Real x, Real y) { return y < x || y != y ? y : x; }
STROP_HOST_DEVICE Real larger(Real x, Real y) { return y > x || y != y ? y : x; }
STROP_HOST_DEVICE Real clamped(Real x, float low, float high) { return x < low ? low : x > high ? high : x; }

STROP_HOST_DEVICE Real magnitude(Real x) { return x < 0 ? -x : x; }

/* e^d - d - 1. Below 1/4 by its series: expm1(d) - d would lose the digits that expm1 kept. */
STROP_HOST_DEVICE Real k3(Real d) {
  const Real series =
      d * d * (1.0f / 2 + d * (1.0f / 6 + d * (1.0f / 24 + d * (1.0f / 120 + d * (1.0f / 720 + d * (1.0f / 5040))))));
  const Real direct = STROP_LOSS_EXPM1(d) - d;
  return magnitude(d) < 0.25f ? series : direct;
}

/* A trainable token. Inputs that the call doesn't have are neutral: old = lp, rollout = old, ref = lp, entropy = 0. */
struct Token {
  Real logprob, old_logprob, advantage, rollout_logprob, ref_logprob, entropy;
};

STROP_HOST_DEVICE float read(const float *array, int64_t t) { return array[t]; }

/* The four that sequence statistics read; the other two are neutral. */
template <class Position>
STROP_HOST_DEVICE Token policy_inputs(const strop_loss_tokens &in, Position t) {
  Token token;
  token.logprob = read(in.logprob, t);
  token.old_logprob = in.old_logprob ? read(in.old_logprob, t) : token.logprob;
  token.advantage = read(in.advantages, t);
  token.rollout_logprob = in.rollout_logprob ? read(in.rollout_logprob, t) : token.old_logprob;
  token.ref_logprob = token.logprob;
  token.entropy = Real{};
  return token;
}

template <class Position>
STROP_HOST_DEVICE Token all_inputs(const strop_loss_tokens &in, Position t) {
  Token token = policy_inputs(in, t);
  if (in.ref_logprob) token.ref_logprob = read(in.ref_logprob, t);
  if (in.entropy) token.entropy = read(in.entropy, t);
  return token;
}

STROP_HOST_DEVICE Real log_ratio(const Token &token, const strop_loss_code &code) {
  return clamped(token.logprob - token.old_logprob, -code.log_ratio_limit, code.log_ratio_limit);
}

/* Factor of the policy term for a sampler that isn't the old policy, and whether a bound changed it. */
struct Weight {
  Real value;
  Flag truncated, masked;
};

/* e^log_weight inside [low, high]: outside, 0 where `drops`, else the nearer bound. */
STROP_HOST_DEVICE Weight bounded_weight(Real log_weight, bool drops, const strop_loss_code &code) {
  const Real weight = STROP_LOSS_EXP(log_weight);
  const Flag outside = weight < code.correction_low || weight > code.correction_high;
  if (drops) return {outside ? 0.0f : weight, Flag{}, outside};
  return {clamped(weight, code.correction_low, code.correction_high), outside, Flag{}};
}

/* What a token knows alone; 1 where its sequence decides. */
STROP_HOST_DEVICE Weight token_weight(const Token &token, const strop_loss_code &code) {
  const Real gap = token.old_logprob - token.rollout_logprob;
  if (code.correction == TIS || code.correction == ICEPOP) return bounded_weight(gap, code.correction == ICEPOP, code);
  return {code.correction == MEAN_MASK ? STROP_LOSS_EXP(gap) : real(1.0f), Flag{}, Flag{}};
}

/* gmpo's D: cut above where A > 0 and below elsewhere. */
STROP_HOST_DEVICE Real clipped_log_ratio(Real difference, Real advantage, const strop_loss_code &code) {
  const float low = logf(code.ratio_low), high = logf(code.ratio_high);
  return advantage > 0 ? (difference > high ? high : difference) : (difference < low ? low : difference);
}

/* Sums over the trainable tokens of a sequence: SEQUENCE_FIELDS of kernels/policy.py, in their order. */
struct SequenceSums {
  Real tokens, log_ratio, rollout_gap, rollout_drift, advantage_up, advantage_down;
};

/* What one token adds to them. */
STROP_HOST_DEVICE SequenceSums sequence_sums(const Token &token, const strop_loss_code &code) {
  const Weight weight = token_weight(token, code);
  Real ratio = log_ratio(token, code);
  if (code.policy == GMPO) ratio = clipped_log_ratio(ratio, token.advantage, code);
  if (code.policy == VESPO) { /* log w is taken from the gap: by way of e^gap, thousands of roundings add up */
    const Real gap = code.correction == NO_CORRECTION ? Real{} : token.old_logprob - token.rollout_logprob;
    const Real cut = weight.masked ? real(VESPO_LOG_LOW) : STROP_LOSS_LOG(weight.value);
    const Real log_weight = clamped(weight.masked || weight.truncated ? cut : gap, VESPO_LOG_LOW, VESPO_LOG_HIGH);
    ratio = clamped(ratio, -VESPO_LOG_HIGH, VESPO_LOG_HIGH) + log_weight;
  }
  const Real a = weight.value * token.advantage;
  return {real(1.0f), ratio, token.old_logprob - token.rollout_logprob, token.rollout_logprob - token.logprob,
          a < 0 ? 0.0f : a, a > 0 ? 0.0f : a};
}

STROP_HOST_DEVICE SequenceSums sum(const SequenceSums &x, const SequenceSums &y) {
  return {x.tokens + y.tokens, x.log_ratio + y.log_ratio, x.rollout_gap + y.rollout_gap, x.rollout_drift + y.rollout_drift,
          x.advantage_up + y.advantage_up, x.advantage_down + y.advantage_down};
}

/* What the tokens of a sequence share. */
struct Sequence {
  Real length;
  Weight weight;
  Flag drifted;          /* the off-policy sequence mask drops its tokens with A < 0 */
  Real ratio;            /* exp(mean D); vespo: w */
  Real slope;            /* gspo, gmpo: of each token's D, by way of the sequence's ratio */
  Real phi_up, phi_down; /* vespo's factor where a >= 0, and elsewhere */
};

/* For a call without sequences. */
STROP_HOST_DEVICE Sequence neutral_sequence() {
  return {real(1.0f), {real(1.0f), Flag{}, Flag{}}, Flag{}, real(1.0f), Real{}, Real{}, Real{}};
}

STROP_HOST_DEVICE Sequence sequence_of(const SequenceSums &sums, const strop_loss_code &code) {
  Sequence sequence = neutral_sequence();
  sequence.length = larger(sums.tokens, real(1.0f));
  if (!needs_sequence_sums(code)) return sequence;
  if (code.correction == MEAN_MASK) {
    const Weight kept = bounded_weight(sums.rollout_gap / sequence.length, true, code);
    sequence.weight = {kept.masked ? 0.0f : 1.0f, Flag{}, kept.masked};
  } else if (code.correction >= SEQUENCE_TRUNCATE) {
    sequence.weight = bounded_weight(sums.rollout_gap, code.correction == SEQUENCE_MASK, code);
  }
  if (code.has_opsm) sequence.drifted = sums.rollout_drift / sequence.length > code.opsm_delta;
  if (code.policy == VESPO) {
    const Real log_w = clamped(sums.log_ratio, VESPO_LOG_LOW, VESPO_LOG_HIGH);
    sequence.ratio = STROP_LOSS_EXP(log_w);
    sequence.phi_up = STROP_LOSS_EXP(code.vespo_lambda_positive + code.vespo_k_positive * log_w -
                                code.vespo_lambda_positive * sequence.ratio);
    sequence.phi_down = STROP_LOSS_EXP(code.vespo_lambda_negative + code.vespo_k_negative * log_w -
                                  code.vespo_lambda_negative * sequence.ratio);
    return sequence;
  }
  const Real ratio = sequence.ratio = STROP_LOSS_EXP(sums.log_ratio / sequence.length);
  const Real up = sums.advantage_up * sequence.weight.value;
  const Real down = (sequence.drifted ? 0.0f : sums.advantage_down) * sequence.weight.value;
  if (code.policy == GSPO) { /* ds/dlp = s / L for every token, times the a of all tokens that no bound cuts */
    const Flag up_lives = ratio <= code.ratio_high && up != 0;
    const Flag down_lives = ratio >= code.ratio_low && ratio <= code.ratio_cap && down != 0;
    sequence.slope = -(up * (up_lives ? ratio : 0.0f) + down * (down_lives ? ratio : 0.0f)) / sequence.length;
  } else if (code.policy == GMPO) {
    const Real total = up + down;
    sequence.slope = -total * (total == 0 ? 0.0f : ratio) / sequence.length;
  }
  return sequence;
}

/* The policy term. `slope` is the derivative in lp. */
struct PolicyTerm {
  Real loss, slope, ratio;
  Flag low, high, dual; /* which bound cuts the token */
};

/* -a clip(r): for a > 0 -a min(r, high), for a < 0 -a max(r, low), and not beyond the cap of dual_clip or delta.
 * `slope` in log r. A token with a = 0 has none even where r overflows. */
STROP_HOST_DEVICE PolicyTerm clipped(Real ratio, Real a, const strop_loss_code &code) {
  const Flag low = a < 0 && ratio < code.ratio_low, high = a > 0 && ratio > code.ratio_high;
  const Flag dual = a < 0 && ratio > code.ratio_cap;
  const Real bound = low ? code.ratio_low : high ? code.ratio_high : dual ? code.ratio_cap : 0.0f;
  const Flag cut = low || high || dual || a == 0;
  return {-a * (cut ? bound : ratio), cut ? 0.0f : -a * ratio, ratio, low, high, dual};
}

/* -a (4 / tau) sigmoid(tau (r - 1)); beyond 104 e^-x is 0 in fp32, but r may be infinite. */
STROP_HOST_DEVICE PolicyTerm sapo(Real difference, Real a, const strop_loss_code &code) {
  const Real tau = a > 0 ? code.sapo_tau_positive : code.sapo_tau_negative;
  const Real ratio = STROP_LOSS_EXP(difference), x = tau * STROP_LOSS_EXPM1(difference);
  const Flag saturated = x > 104.0f;
  const Real tail = STROP_LOSS_EXP(-magnitude(x)), whole = 1.0f / (1.0f + tail);
  const Real gate = a == 0 ? 0.5f : x < 0 ? tail * whole : whole;
  const Real slope = saturated || a == 0 ? 0.0f : -4.0f * a * (tail * whole * whole) * ratio;
  return {-a * 4.0f / tau * gate, slope, ratio, Flag{}, Flag{}, Flag{}};
}

STROP_HOST_DEVICE PolicyTerm policy_term(const Token &token, Real a, const Sequence &sequence, const strop_loss_code &code) {
  const Real lp = token.logprob, difference = log_ratio(token, code);
  const Real moves = magnitude(lp - token.old_logprob) > code.log_ratio_limit ? 0.0f : 1.0f; /* dD/dlp */
  const Real nothing = difference - difference; /* NaN where D isn't finite, so that the loss tells */
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
      const Real inside = clipped_log_ratio(difference, token.advantage, code);
      term.loss = -a * (a == 0 ? 0.0f : sequence.ratio) + sequence.slope * nothing;
      term.slope = inside == difference ? sequence.slope * moves : 0.0f;
      term.ratio = sequence.ratio;
      return term;
    }
    case CISPO: { /* -sg(clip(r)) a lp */
      const Real ratio = STROP_LOSS_EXP(difference);
      const Real slope = -clamped(ratio, code.ratio_low, code.ratio_high) * a;
      return {slope * lp, slope, ratio, a != 0 && ratio < code.ratio_low, a != 0 && ratio > code.ratio_high, Flag{}};
    }
    case SAPO: {
      PolicyTerm term = sapo(difference, a, code);
      term.slope *= moves;
      return term;
    }
    case VESPO: { /* -sg(phi) a lp */
      const Real slope = -(a >= 0 ? sequence.phi_up : sequence.phi_down) * a;
      return {slope * lp, slope, sequence.ratio, Flag{}, Flag{}, Flag{}};
    }
    case REINFORCE: return {-a * lp, -a, STROP_LOSS_EXP(difference), Flag{}, Flag{}, Flag{}};
    default: {
      PolicyTerm term = clipped(STROP_LOSS_EXP(difference), a, code);
      term.slope *= moves;
      return term;
    }
  }
}

/* KL to the reference of one token: the estimator's value, and what the loss adds before kl_coef. d = ref - lp. */
struct KlTerm {
  Real value, loss, slope;
};

STROP_HOST_DEVICE KlTerm kl_term(const Token &token, const strop_loss_code &code) {
  const Real d = token.ref_logprob - token.logprob;
  const Real value = code.kl_estimator == K1 ? -d : code.kl_estimator == K2 ? d * d / 2 : k3(d);
  if (code.kl_gradient == STRAIGHT_THROUGH) return {value, value, -d};
  if (code.kl_gradient == UNBIASED) { /* r k3, and r k3 + r (1 - e^d) = -r d; where D is clamped, r has no slope */
    const Real ratio = STROP_LOSS_EXP(log_ratio(token, code));
    const Flag limited = magnitude(token.logprob - token.old_logprob) > code.log_ratio_limit;
    return {value, ratio * value, -ratio * (limited ? STROP_LOSS_EXPM1(d) : d)};
  }
  return {value, value, code.kl_estimator == K1 ? real(1.0f) : code.kl_estimator == K2 ? -d : -STROP_LOSS_EXPM1(d)};
}

/* A token's part of the loss, before its share: 1 / denominator, and with divide_by_length 1 / length. */
struct TokenTerms {
  PolicyTerm policy;
  KlTerm kl;
  Real kl_loss, entropy_loss, d_logprob;
  Weight weight; /* of the rollout correction; e^(old - rollout), unused, without one */
  Flag dropped;  /* by the off-policy sequence mask */
};

STROP_HOST_DEVICE TokenTerms token_terms(const Token &token, const Sequence &sequence, const strop_loss_code &code) {
  TokenTerms terms;
  const Weight own = token_weight(token, code);
  terms.weight = {own.value * sequence.weight.value, own.truncated || sequence.weight.truncated,
                  own.masked || sequence.weight.masked};
  terms.dropped = sequence.drifted && token.advantage < 0;
  const Real factor = code.policy == VESPO ? real(1.0f) : terms.weight.value; /* vespo's phi holds the weight already */
  const Real a = (terms.dropped ? 0.0f : factor) * token.advantage;
  if (code.correction == NO_CORRECTION) terms.weight.value = STROP_LOSS_EXP(token.old_logprob - token.rollout_logprob);
  terms.policy = policy_term(token, a, sequence, code);
  terms.kl = kl_term(token, code);
  terms.kl_loss = code.kl_coef != 0 ? code.kl_coef * terms.kl.loss : Real{};
  terms.entropy_loss = code.entropy_coef != 0 ? -code.entropy_coef * token.entropy : Real{};
  terms.d_logprob = terms.policy.slope + (code.kl_coef != 0 ? code.kl_coef * terms.kl.slope : Real{});
  return terms;
}

}  // namespace strop

#endif
