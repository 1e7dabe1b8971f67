// The formulas of csrc/math for one number in a CUDA thread.
#pragma once
#include "cuda/simt.cuh"

#define FL_INLINE __device__ __forceinline__
#define FL_FN static __device__ __forceinline__

namespace fused_losses::cuda {

template <class V, class T>
FL_FN V broadcast(T value) {
  return static_cast<V>(value);
}
template <class V>
FL_FN V select(bool condition, V yes, V no) {
  return condition ? yes : no;
}
FL_FN float at_least(float a, float low) { return maximum(a, low); }  // a NaN in `a` stays
FL_FN double at_least(double a, double low) { return a < low ? low : a; }
FL_FN float at_most(float a, float high) { return minimum(a, high); }
FL_FN double at_most(double a, double high) { return a > high ? high : a; }
FL_FN float exp(float x) { return expf(x); }
FL_FN double exp(double x) { return ::exp(x); }
FL_FN float log(float x) { return logf(x); }
FL_FN double log(double x) { return ::log(x); }
FL_FN float log1p(float x) { return log1pf(x); }
FL_FN double log1p(double x) { return ::log1p(x); }
// log(1 + x) on [0, 1], to an ulp: x + x^2 times a polynomial. A third of log1pf's instructions.
FL_FN float log1p_unit(float x) {
  float p = -0.0044662116f;
  p = fma(p, x, 0.0252240543f);
  p = fma(p, x, -0.0667577251f);
  p = fma(p, x, 0.115618454f);
  p = fma(p, x, -0.158475657f);
  p = fma(p, x, 0.198541062f);
  p = fma(p, x, -0.249865262f);
  p = fma(p, x, 0.333328419f);
  p = fma(p, x, -0.49999997f);
  return fma(x * x, p, x);
}
FL_FN double log1p_unit(double x) { return ::log1p(x); }
// e / (1 + e) for e in [0, 1], and what 1 + e has lost. No division: between 1 and 2 none needs the way out, a branch
// and a call, that an IEEE quotient has, and takes for every dividend of 0.
FL_FN float odds(float e) {
  const float d = 1 + e, inverse = approximate_reciprocal(d), quotient = e * inverse;
  return fma(inverse, fma(-quotient, e - (d - 1), fma(-quotient, d, e)), quotient);
}
FL_FN double odds(double e) {
  const double d = 1 + e, quotient = e / d;
  return quotient - quotient * ((e - (d - 1)) / d);
}
FL_FN float power(float x, double y) { return powf(x, static_cast<float>(y)); }
FL_FN double power(double x, double y) { return ::pow(x, y); }
FL_FN float square_root(float x) { return ::sqrtf(x); }
FL_FN double square_root(double x) { return ::sqrt(x); }
FL_FN float magnitude(float x) { return ::fabsf(x); }
FL_FN double magnitude(double x) { return ::fabs(x); }
FL_FN float larger(float a, float b) { return ::fmaxf(a, b); }  // of a NaN and a number, the number
FL_FN double larger(double a, double b) { return ::fmax(a, b); }

FL_FN float quick_exp(float x) { return approximate_exp2(x * 1.44269504f); }

// A float whose division and functions are an instruction or a few, good to about 20 bits and a logarithm of 1 + x to
// 14: for results that will be rounded to the 11 or 8 of 16-bit storage.
struct Quick {
  float x;
  Quick() = default;
  FL_INLINE Quick(float value) : x(value) {}
  FL_INLINE explicit operator float() const { return x; }
  friend FL_INLINE Quick operator-(Quick a) { return -a.x; }
  friend FL_INLINE Quick operator+(Quick a, Quick b) { return a.x + b.x; }
  friend FL_INLINE Quick operator-(Quick a, Quick b) { return a.x - b.x; }
  friend FL_INLINE Quick operator*(Quick a, Quick b) { return a.x * b.x; }
  friend FL_INLINE Quick operator/(Quick a, Quick b) { return a.x * approximate_reciprocal(b.x); }
  friend FL_INLINE bool operator<(Quick a, Quick b) { return a.x < b.x; }
  friend FL_INLINE bool operator>(Quick a, Quick b) { return a.x > b.x; }
  friend FL_INLINE bool operator<=(Quick a, Quick b) { return a.x <= b.x; }
  friend FL_INLINE bool operator>=(Quick a, Quick b) { return a.x >= b.x; }
};
FL_FN Quick at_least(Quick a, Quick low) { return maximum(a.x, low.x); }
FL_FN Quick exp(Quick a) { return quick_exp(a.x); }
FL_FN Quick log(Quick a) { return logf(a.x); }
FL_FN Quick log1p(Quick a) { return log1pf(a.x); }
FL_FN Quick log1p_unit(Quick a) {  // log(1 + a) / a as a polynomial, to 6.3e-5 of it: a quarter of fp16's half ulp
  float p = 0.040663436f;
  p = fma(p, a.x, -0.15602952f);
  p = fma(p, a.x, 0.30539998f);
  p = fma(p, a.x, -0.49678874f);
  p = fma(p, a.x, 0.9999368f);
  return p * a.x;
}
FL_FN Quick odds(Quick e) { return e / (1 + e); }
FL_FN Quick power(Quick a, double y) {  // 0 to the 0 is 1, and not exp2(0 * -inf)
  const float exponent = static_cast<float>(y);
  return exponent == 0 ? 1.0f : approximate_exp2(exponent * approximate_log2(a.x));
}
FL_FN Quick square_root(Quick a) { return approximate_square_root(a.x); }
FL_FN Quick magnitude(Quick a) { return ::fabsf(a.x); }

template <class V>
FL_FN V log_unit(V p) {
  return log(p);
}
template <class V>
FL_FN V log_complement(V p) {
  return log1p(-p);
}

// The number a formula is computed with, for elements stored as S.
template <class S>
struct FormulaOf {
  using V = std::conditional_t<sizeof(S) == 2, Quick, typename ComputeOf<S>::T>;
};
// A term of a softmax.
template <class S, class T>
FL_FN T exp_term(T x) {
  if constexpr (sizeof(S) == 2)
    return quick_exp(x);
  else
    return exp(x);
}

#include "math/sigmoid.h"

#include "math/focal.h"
#include "math/pairwise.h"

#include "math/bce.h"
#include "math/cross_entropy.h"
#include "math/distribution_focal.h"
#include "math/quality_focal.h"
#include "math/varifocal.h"

}  // namespace fused_losses::cuda
