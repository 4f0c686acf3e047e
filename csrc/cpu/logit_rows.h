// The row kernels of a softmax over logits, one block of columns at a time: kernels/reference/softmax.py has the formulas.
//
// A block (4 KB of v) stays in the first-level cache between its steps: logits to v and their maximum, then sums or gradient.
// Sums run in fp32 over a block, each lane adding kBlock / kLanes terms, and in fp64 over the blocks: a vocabulary of 150,000
// costs no accuracy.
//
// v is z before the temperature: differences of large logits are exact, so they are taken first and then multiplied by 1 / T.
#pragma once

#include "level.h"
#include "simd.h"

namespace {

constexpr int kBlock = 1024;

// What all of a row's columns share.
struct Row {
  const char *logits;
  const void *bias;
  const uint8_t *keep_mask;
  int bias_type;
  float scale, softcap, softcap_reciprocal;

  Row(const strop_logits &rows, int64_t row) {
    const int64_t bytes = rows.logit_type == STROP_FLOAT32 ? 4 : 2;
    logits = static_cast<const char *>(rows.logits) + row * rows.row_stride * bytes;
    bias = rows.bias;
    bias_type = rows.bias_type;
    keep_mask = rows.keep_mask ? rows.keep_mask + row * rows.mask_stride : nullptr;
    scale = rows.inverse_temperature ? rows.inverse_temperature[row] : rows.scale;
    softcap = rows.softcap;
    softcap_reciprocal = softcap != 0 ? 1.0f / softcap : 0.0f;
  }
};

template <class Type>
F load_some_at(const void *array, int64_t index, int count) {
  const auto *p = static_cast<const typename Type::Element *>(array) + index;
  return count == kLanes ? Type::load(p) : load_some<Type>(p, count);
}

inline F load_bias(const Row &row, int64_t column, int count) {
  switch (row.bias_type) {
    case STROP_BFLOAT16:
      return load_some_at<Bf16>(row.bias, column, count);
    case STROP_FLOAT16:
      return load_some_at<Fp16>(row.bias, column, count);
  }
  return load_some_at<Fp32>(row.bias, column, count);
}

// v of `count` columns from `column` on, and z's derivative dz/du; in a plain row v is the logit.
struct Shaped {
  F v, slope;
};
template <class Type, bool kPlain>
Shaped shape(const Row &row, int64_t column, int count) {
  F u = load_some_at<Type>(row.logits, column, count);
  if (kPlain) return {u, all(row.scale)};
  if (row.bias) u += load_bias(row, column, count);
  F slope = all(row.scale);
  if (row.softcap != 0) {
    const Tanh capped = tanh_of(u * row.softcap_reciprocal);
    u = capped.t * row.softcap;
    slope *= capped.slope;
  }
  if (row.keep_mask) {
    const I kept = load_flags(row.keep_mask + column, count);
    u = kept ? u : all(-INFINITY);
    slope = kept ? slope : F{};
  }
  return {u, slope};
}

inline F only_first(F x, int count, float others) {
  for (int i = count; i < kLanes; ++i) x[i] = others;
  return x;
}

// With d = (v - maximum) scale: the running maximum of v, sum e^d and sum e^d d of a row.
struct OnlineSoftmax {
  float scale, maximum = -INFINITY;
  double total = 0, weighted = 0;

  // -inf (nothing kept so far) -> 0, so that -inf - base is -inf instead of NaN.
  float base() const { return maximum == -INFINITY ? 0 : maximum; }

  void raise(float higher) {
    if (maximum == -INFINITY) {  // times 0 and not = 0: a NaN among the -inf must stay
      total *= 0;
      weighted *= 0;
    } else {
      const double shift = (static_cast<double>(maximum) - higher) * scale, factor = exp(shift);
      weighted = factor * (weighted + shift * total);
      total *= factor;
    }
    maximum = higher;
  }

  // v [count], -inf behind it up to a whole vector; ahead: memory that a later block will read.
  void add(const float *v, int count, float block_maximum, const char *ahead, int bytes) {
    if (block_maximum > maximum) raise(block_maximum);
    scale == 1 ? sum<false>(v, count, ahead, bytes) : sum<true>(v, count, ahead, bytes);
  }

  template <bool kScaled>
  void sum(const float *v, int count, const char *ahead, int bytes) {
    const F start = all(base()), lowest = all(kLowest);
    F totals = {}, products = {};
    for (int i = 0; i < count; i += kLanes) {
      __builtin_prefetch(ahead + i * bytes, 0, 2);
      const F below = Fp32::load(v + i) - start;
      const F difference = larger(lowest, kScaled ? below * scale : below);  // e^lowest adds nothing to a total of at least 1
      const F e = exp_in_range(difference);
      totals += e;
      products += e * difference;
    }
    total += sum_of(totals);
    weighted += sum_of(products);
  }
};

template <class Type, bool kPlain>
OnlineSoftmax row_softmax(const Row &row, int64_t vocab) {
  OnlineSoftmax softmax{row.scale};
  alignas(64) float v[kBlock];
  constexpr int kBytes = sizeof(typename Type::Element);
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int width = vocab - start < kBlock ? static_cast<int>(vocab - start) : kBlock, whole = width / kLanes * kLanes;
    F maximum = all(-INFINITY);
    for (int i = 0; i < whole; i += kLanes) {
      const F block = shape<Type, kPlain>(row, start + i, kLanes).v;
      maximum = larger(block, maximum);
      Fp32::store(v + i, block);
    }
    if (whole < width) {
      const int rest = width - whole;
      const F block = only_first(shape<Type, kPlain>(row, start + whole, rest).v, rest, -INFINITY);
      maximum = larger(block, maximum);
      Fp32::store(v + whole, block);
    }
    // Two blocks ahead, into the second-level cache. (It helped one thread; with two, one block ahead was never clearly worse.)
    softmax.add(v, width, maximum_of(maximum), row.logits + (start + 2 * kBlock) * kBytes, kBytes);
  }
  if (softmax.maximum == -INFINITY && softmax.total == softmax.total) softmax.total = softmax.weighted = 0;
  // So little is only what e^lowest has left of tokens that are not there: a row of one token has entropy 0, not 1e-35.
  if (softmax.weighted > -1e-30) softmax.weighted = 0;
  return softmax;
}

template <class Type, bool kPlain>
void statistics_rows(const strop_logits &rows, bool partial, float *out, int64_t first, int64_t last) {
  const int64_t n = rows.num_rows;
  for (int64_t i = first; i < last; ++i) {
    const int64_t target = rows.targets[i];
    if (target == STROP_IGNORED) {
      for (int field = 0; field < (partial ? 5 : 3); ++field) out[field * n + i] = partial && field == 0 ? -INFINITY : 0;
      continue;
    }
    const Row row(rows, i);
    const OnlineSoftmax softmax = row_softmax<Type, kPlain>(row, rows.vocab);
    const bool found = target >= 0 && target < rows.vocab;
    const float v = found ? shape<Type, kPlain>(row, target, 1).v[0] : 0;
    if (partial) {
      const float fields[] = {softmax.maximum * row.scale, static_cast<float>(softmax.total),
                              static_cast<float>(softmax.weighted), v * row.scale, found ? 1.0f : 0.0f};
      for (int field = 0; field < 5; ++field) out[field * n + i] = fields[field];
    } else {
      const double base = softmax.base(), log_total = log(softmax.total);
      out[i] = found ? static_cast<float>((v - base) * row.scale - log_total) : NAN;
      out[n + i] = static_cast<float>(log_total - softmax.weighted / softmax.total);
      out[2 * n + i] = static_cast<float>(base * row.scale + log_total);
    }
  }
}

// p_j (constant - h log p_j) for every column, log p_j = (v_j - anchor) scale + offset; the target's entry is added by
// `gradient_rows`. In a plain row constant and h hold the slope already.
struct RowGradient {
  float anchor, scale, offset, constant, h;
};

template <class In, class Out, bool kPlain>
F gradient_of(const Row &row, const RowGradient &of, int64_t column, int count) {
  const Shaped at = shape<In, kPlain>(row, column, count);
  const F log_p = (at.v - of.anchor) * of.scale + of.offset, finite_log_p = larger(all(kLowest), log_p);
  const F p = log_p < kLowest ? F{} : exp_in_range(finite_log_p);
  const F dz = p * (of.constant - of.h * finite_log_p);
  if (kPlain) return dz;
  const F du = dz * at.slope;
  return row.keep_mask ? (at.slope == 0.0f ? F{} : du) : du;  // outside keep_mask 0, whatever comes from upstream
}

template <class In, class Out, bool kPlain>
void gradient_row(const Row &row, const RowGradient &of, int64_t vocab, typename Out::Element *out) {
  int64_t column = 0;
  for (; column + kLanes <= vocab; column += kLanes)
    Out::store(out + column, gradient_of<In, Out, kPlain>(row, of, column, kLanes));
  if (column < vocab) {
    const int rest = static_cast<int>(vocab - column);
    store_some<Out>(out + column, gradient_of<In, Out, kPlain>(row, of, column, rest), rest);
  }
}

template <class In, class Out, bool kPlain>
void gradient_rows(const strop_logits &rows, const StropGradient &gradient, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    auto *out = static_cast<typename Out::Element *>(gradient.out) + i * gradient.out_stride;
    const float g = gradient.g ? gradient.g[i] : 0, h = gradient.h ? gradient.h[i] : 0, k = gradient.k ? gradient.k[i] : 0;
    const int64_t target = rows.targets[i];
    if (target == STROP_IGNORED || (g == 0 && h == 0 && k == 0)) {
      memset(out, 0, rows.vocab * sizeof *out);
      continue;
    }
    const Row row(rows, i);
    const float entropy = gradient.entropy[i], logprob = gradient.logprob[i], logsumexp = gradient.logsumexp[i];
    const bool found = target >= 0 && target < rows.vocab;
    const Shaped at_target = found ? shape<In, kPlain>(row, target, 1) : Shaped{};  // before `out` overwrites it
    const float base = h == 0 ? k : k - h * entropy;  // an infinite entropy without an upstream gradient makes no NaN
    // The nearer of two points on the line: fp32 holds a logsumexp near 1e4 to 5e-4 only, the distance to the target's exactly.
    const float v = at_target.v[0];
    const bool near = found && fabsf(logprob) < fabsf(logsumexp) && fabsf(v) < INFINITY;
    const float slope = kPlain ? row.scale : 1;
    const RowGradient of{near ? v : 0, row.scale, near ? logprob : -logsumexp, (base - g) * slope, h * slope};
    gradient_row<In, Out, kPlain>(row, of, rows.vocab, out);
    if (!found) continue;
    const bool kept = kPlain || !row.keep_mask || row.keep_mask[target];
    const float log_p = logprob < kLowest ? kLowest : logprob;
    // g (1 - p) as -g expm1(log p): a rounded p would cost all digits of a small 1 - p that log p has.
    const float dz = expf(logprob) * (base - h * log_p) - g * expm1f(logprob);
    store_some<Out>(out + target, all(kept ? dz * at_target.slope[0] : 0.0f), 1);
  }
}

template <class In>
void statistics_of(const strop_logits &rows, bool partial, float *out, int64_t first, int64_t last) {
  const bool plain = !rows.bias && !rows.keep_mask && rows.softcap == 0;
  (plain ? statistics_rows<In, true> : statistics_rows<In, false>)(rows, partial, out, first, last);
}

template <class In, class Out>
void gradient_into(const strop_logits &rows, const StropGradient &gradient, int64_t first, int64_t last) {
  const bool plain = !rows.bias && !rows.keep_mask && rows.softcap == 0;
  (plain ? gradient_rows<In, Out, true> : gradient_rows<In, Out, false>)(rows, gradient, first, last);
}

template <class In>
void gradient_from(const strop_logits &rows, const StropGradient &gradient, int64_t first, int64_t last) {
  switch (gradient.out_type) {
    case STROP_FLOAT32:
      return gradient_into<In, Fp32>(rows, gradient, first, last);
    case STROP_BFLOAT16:
      return gradient_into<In, Bf16>(rows, gradient, first, last);
    case STROP_FLOAT16:
      return gradient_into<In, Fp16>(rows, gradient, first, last);
  }
}

void logit_statistics(const strop_logits &rows, bool partial, float *out, int64_t first, int64_t last) {
  switch (rows.logit_type) {
    case STROP_FLOAT32:
      return statistics_of<Fp32>(rows, partial, out, first, last);
    case STROP_BFLOAT16:
      return statistics_of<Bf16>(rows, partial, out, first, last);
    case STROP_FLOAT16:
      return statistics_of<Fp16>(rows, partial, out, first, last);
  }
}

void logit_gradient(const strop_logits &rows, const StropGradient &gradient, int64_t first, int64_t last) {
  switch (rows.logit_type) {
    case STROP_FLOAT32:
      return gradient_from<Fp32>(rows, gradient, first, last);
    case STROP_BFLOAT16:
      return gradient_from<Bf16>(rows, gradient, first, last);
    case STROP_FLOAT16:
      return gradient_from<Fp16>(rows, gradient, first, last);
  }
}

}  // namespace
