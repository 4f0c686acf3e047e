// Vectors of fp32 in GCC's and Clang's vector extension, and the functions of them that the kernels need.
//
// Included once by each level's source (baseline.cpp, avx2.cpp, avx512.cpp), which says how wide a vector is; everything lies
// in an unnamed namespace, so that no level's code can be linked into another one.
//
// Coefficients are minimax fits made for this file. Errors, measured against fp64 (tests/kernels/test_cpu_simd.py):
//   exp_of    1.1 ulp; 0 below ln 2^-126 (no subnormal numbers), inf above 127.5 ln 2 = 88.376; NaN stays NaN
//   expm1_of  2 ulp;   inf above 88.376
//   tanh_of   2 ulp;   its slope 1 - tanh^2, where 1 - t * t would cancel, 5 ulp, and 0 beyond |x| = 43.6
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = STROP_VECTOR_BYTES / 4;
typedef float F __attribute__((vector_size(STROP_VECTOR_BYTES)));
typedef int32_t I __attribute__((vector_size(STROP_VECTOR_BYTES)));
typedef uint32_t U __attribute__((vector_size(STROP_VECTOR_BYTES)));
typedef uint16_t Half __attribute__((vector_size(STROP_VECTOR_BYTES / 2)));
typedef uint8_t Bytes __attribute__((vector_size(STROP_VECTOR_BYTES / 4)));

inline F all(float value) { return F{} + value; }

// The larger one, b where either is NaN: the very semantics of maxps.
template <class V>
V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
V smaller(V a, V b) {
  return a < b ? a : b;
}

inline U bits_of(F x) { return (U)x; }
inline F of_bits(U bits) { return (F)bits; }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Halves on halves: what is left of the vector, then of its first half, and so on.
template <int kCount>
float sum_of(const float *x) {
  float half[kCount / 2 + 1];
  for (int i = 0; i < kCount / 2; ++i) half[i] = x[i] + x[i + kCount / 2];
  return kCount == 2 ? half[0] : sum_of<(kCount > 2 ? kCount / 2 : 2)>(half);
}

template <int kCount>
float maximum_of(const float *x) {
  float half[kCount / 2 + 1];
  for (int i = 0; i < kCount / 2; ++i) half[i] = x[i] > x[i + kCount / 2] ? x[i] : x[i + kCount / 2];
  return kCount == 2 ? half[0] : maximum_of<(kCount > 2 ? kCount / 2 : 2)>(half);
}

inline float sum_of(F x) { return sum_of<kLanes>((const float *)&x); }
inline float maximum_of(F x) { return maximum_of<kLanes>((const float *)&x); }

constexpr float kLowest = -87.33654f;   // above ln 2^-126: below it e^x counts as 0
constexpr float kHighest = 88.37626f;   // below 127.5 ln 2: above it e^x counts as inf
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // their sum is ln 2; n * kLn2High is exact

// The exponentials are for vectors and for single numbers (V is F or float).

// x = n ln 2 + r with |r| <= ln 2 / 2, and 2^n, for x in kLowest..kHighest or NaN.
template <class V>
struct Reduced {
  V r, power;
};
template <class V>
inline Reduced<V> reduced(V x) {
  const V shifted = x * 1.44269504f + 12582912.0f;  // + 1.5 2^23 rounds to an integer, in the low bits of the mantissa
  const V n = shifted - 12582912.0f;
  return {(x - n * kLn2High) - n * kLn2Low, of_bits((bits_of(shifted) << 23) + 0x3f800000u)};
}

// e^x for x in kLowest..kHighest or NaN.
template <class V>
inline V exp_in_range(V x) {
  const Reduced<V> at = reduced(x);
  V q = at.r * 0.001381459878757596f + 0.008368716575205326f;
  q = q * at.r + 0.04166838899254799f;
  q = q * at.r + 0.1666652113199234f;
  q = q * at.r + 0.4999999403953552f;
  return ((q * at.r) * at.r + at.r + 1.0f) * at.power;
}

// e^x for x <= kHighest or NaN.
template <class V>
inline V exp_of_log_probability(V x) {
  return x < kLowest ? V{} : exp_in_range(larger(V{} + kLowest, x));
}

template <class V>
inline V exp_of(V x) {
  return x > kHighest ? V{} + INFINITY : exp_of_log_probability(smaller(V{} + kHighest, x));
}

template <class V>
inline V expm1_of(V x) {
  const Reduced<V> at = reduced(larger(V{} + kLowest, smaller(V{} + kHighest, x)));
  V q = at.r * 0.0001984595728572458f + 0.0013941640499979258f;
  q = q * at.r + 0.008333391509950161f;
  q = q * at.r + 0.04166634753346443f;
  q = q * at.r + 0.1666666567325592f;
  q = q * at.r + 0.5f;
  const V e = at.power * ((q * at.r) * at.r + at.r) + (at.power - 1.0f);
  return x > kHighest ? V{} + INFINITY : e;
}

// t = tanh x and its slope 1 - t^2, from e = e^-2|x|: t = 1 - 2 e / (1 + e), slope = 4 e / (1 + e)^2; a small x, which the
// first would lose to the 1, has t = x + x^3 q(x^2).
struct Tanh {
  F t, slope;
};
inline Tanh tanh_of(F x) {
  const F size = of_bits(bits_of(x) & 0x7fffffffu);
  const F e = exp_of_log_probability(size * -2.0f);
  const F share = 1.0f / (1.0f + e);
  const F large = 1.0f - 2.0f * e * share;
  const F square = x * x;
  F q = square * -0.005704986397176981f + 0.02063908614218235f;
  q = q * square + -0.05373971536755562f;
  q = q * square + 0.13331441581249237f;
  q = q * square + -0.3333328068256378f;
  const F small = x + (x * square) * q;
  const F signed_large = of_bits(bits_of(large) | (bits_of(x) & 0x80000000u));
  return {size < 0.625f ? small : signed_large, 4.0f * e * share * share};
}

#if STROP_VECTOR_BYTES >= 32
constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif

// How each type of strop_type is read and written, kLanes at a time. Rounding is to nearest, ties to even.
struct Fp32 {
  typedef float Element;
  static F load(const Element *p) {
    F x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(Element *p, F x) { memcpy(p, &x, sizeof x); }
};

struct Bf16 {
  typedef uint16_t Element;
  static F load(const Element *p) {
    Half x;
    memcpy(&x, p, sizeof x);
    return (F)(__builtin_convertvector(x, U) << 16);
  }
  static void store(Element *p, F x) {
    const U bits = (U)x, quiet = bits | 0x400000u;  // a NaN must not round up to inf
    const U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Half half = __builtin_convertvector((x != x ? quiet : rounded) >> 16, Half);
    memcpy(p, &half, sizeof half);
  }
};

struct Fp16 {
  typedef uint16_t Element;
#if STROP_VECTOR_BYTES == 64
  static F load(const Element *p) { return (F)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i *)p)); }
  static void store(Element *p, F x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_maskz_cvtps_ph(-1, (__m512)x, kToNearest));
  }
#elif STROP_VECTOR_BYTES == 32
  static F load(const Element *p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
  static void store(Element *p, F x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, kToNearest));
  }
#else  // without instructions for it: the exponent moves by a multiplication, which gets subnormal numbers right as well
  static F load(const Element *p) {
    Half half;
    memcpy(&half, p, sizeof half);
    const U x = __builtin_convertvector(half, U);
    const F finite = (F)((x & 0x7fffu) << 13) * 0x1p112f;
    const U size = (x & 0x7c00u) == 0x7c00u ? ((x & 0x7fffu) << 13) | 0x7f800000u : (U)finite;
    return (F)(size | (x & 0x8000u) << 16);
  }
  static void store(Element *p, F x) {
    const U sign = (U)x & 0x80000000u, size = (U)x ^ sign;
    const U normal = (size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
    const U subnormal = (U)((F)size + 0.5f) - 0x3f000000u;  // + 0.5 leaves units of 2^-24, rounded as they should be
    U half = size < 0x38800000u ? subnormal : normal;
    half = size >= 0x477ff000u ? U{} + 0x7c00u : half;
    half = size > 0x7f800000u ? U{} + 0x7e00u : half;
    const Half packed = __builtin_convertvector(half | sign >> 16, Half);
    memcpy(p, &packed, sizeof packed);
  }
#endif
};

// The first `count` elements, 0 behind them: no byte behind the end is touched.
template <class Type>
F load_some(const typename Type::Element *p, int count) {
  typename Type::Element padded[kLanes] = {};
  memcpy(padded, p, count * sizeof padded[0]);
  return Type::load(padded);
}

template <class Type>
void store_some(typename Type::Element *p, F x, int count) {
  typename Type::Element padded[kLanes];
  Type::store(padded, x);
  memcpy(p, padded, count * sizeof padded[0]);
}

// Bytes that are not 0.
inline I load_flags(const uint8_t *p, int count) {
  Bytes bytes = {};
  memcpy(&bytes, p, count);
  return __builtin_convertvector(bytes, I) != 0;
}

}  // namespace
