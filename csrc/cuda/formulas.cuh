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
template <class V>
FL_FN V at_least(V a, V low) {  // a NaN in `a` stays
  return a < low ? low : a;
}
template <class V>
FL_FN V at_most(V a, V high) {
  return a > high ? high : a;
}
FL_FN float exp(float x) { return ::expf(x); }
FL_FN double exp(double x) { return ::exp(x); }
FL_FN float log(float x) { return ::logf(x); }
FL_FN double log(double x) { return ::log(x); }
FL_FN float log1p(float x) { return ::log1pf(x); }
FL_FN double log1p(double x) { return ::log1p(x); }
FL_FN float log1p_unit(float x) { return ::log1pf(x); }
FL_FN double log1p_unit(double x) { return ::log1p(x); }
template <class T>
FL_FN T odds(T e) {  // e / (1 + e), and what 1 + e has lost
  const T d = 1 + e, quotient = e / d;
  return quotient - quotient * ((e - (d - 1)) / d);
}
FL_FN float power(float x, double y) { return ::powf(x, static_cast<float>(y)); }
FL_FN double power(double x, double y) { return ::pow(x, y); }
FL_FN float square_root(float x) { return ::sqrtf(x); }
FL_FN double square_root(double x) { return ::sqrt(x); }
FL_FN float magnitude(float x) { return ::fabsf(x); }
FL_FN double magnitude(double x) { return ::fabs(x); }

#include "math/sigmoid.h"

#include "math/focal.h"
#include "math/pairwise.h"

#include "math/bce.h"
#include "math/cross_entropy.h"
#include "math/distribution_focal.h"
#include "math/quality_focal.h"
#include "math/varifocal.h"

}  // namespace fused_losses::cuda
