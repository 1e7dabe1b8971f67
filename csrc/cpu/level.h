// The kernels of one instruction-set level. A level's file includes the standard headers, then sets the
// compiler's target, then includes this inside a namespace of its own with FUSED_LOSSES_VECTOR_BYTES defined.
#include "cpu/simd.h"
#include "cpu/vector_math.h"
#include "math/sigmoid.h"

#include "math/focal.h"

#include "math/bce.h"
#include "math/cross_entropy.h"
#include "math/distribution_focal.h"
#include "math/pairwise.h"
#include "math/quality_focal.h"
#include "math/varifocal.h"

#include "cpu/staging.h"

#include "cpu/elementwise.h"
#include "cpu/softmax.h"

#include "cpu/distribution_focal.h"
#include "cpu/pairwise.h"

template <class S>
static void scale_range(S* data, int64_t count, typename ComputeOf<S>::T factor) {
  using V = typename VectorOf<typename ComputeOf<S>::T>::V;
  constexpr int lanes = Lanes<V>::count;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(data + i, load(data + i) * factor);
  if (i < count) store_part(data + i, count - i, load_part<V>(data + i, count - i, 0) * factor);
}

static void scale(void* data, DType dtype, int64_t count, double factor) {
  switch (dtype) {
    case DType::f64: return scale_range(static_cast<double*>(data), count, factor);
    case DType::bf16: return scale_range(static_cast<bf16*>(data), count, static_cast<float>(factor));
    case DType::f16: return scale_range(static_cast<f16*>(data), count, static_cast<float>(factor));
    case DType::f32: return scale_range(static_cast<float*>(data), count, static_cast<float>(factor));
  }
}

// y[i] = function(x[i]): how the tests measure the error of the vector functions.
template <class T>
static bool evaluate_as(const char* function, const T* x, T* y, int64_t count, double parameter) {
  using V = typename VectorOf<T>::V;
  constexpr int lanes = Lanes<V>::count;
  const auto is = [&](const char* name) { return __builtin_strcmp(function, name) == 0; };
  const auto map = [&](auto f) {
    for (int64_t i = 0; i < count; i += lanes) {
      const int64_t n = count - i < lanes ? count - i : lanes;
      store_part(y + i, n, f(load_part<V>(x + i, n, 1)));
    }
    return true;
  };
  if (is("exp")) return map([](V v) { return exp(v); });
  if (is("exp_term")) return map([](V v) { return exp_term(v); });
  if constexpr (sizeof(T) == 4) {
    if (is("exp_term_coarse")) return map([](V v) { return exp_term_coarse(v); });
    if (is("exp_minus_magnitude_coarse")) return map([](V v) { return exp_minus_magnitude_coarse(v); });
    if (is("log1p_unit_coarse")) return map([](V v) { return log1p_unit_coarse(v); });
    if (is("odds_coarse")) return map([](V v) { return odds_coarse(v); });
  }
  if (is("exp_minus_magnitude")) return map([](V v) { return exp_minus_magnitude(v); });
  if (is("log_unit")) return map([](V v) { return log_unit(v); });
  if (is("log_complement")) return map([](V v) { return log_complement(v); });
  if (is("log")) return map([](V v) { return log(v); });
  if (is("log1p")) return map([](V v) { return log1p(v); });
  if (is("log1p_unit")) return map([](V v) { return log1p_unit(v); });
  if (is("odds")) return map([](V v) { return odds(v); });
  if (is("sqrt")) return map([](V v) { return square_root(v); });
  if (is("pow")) return map([&](V v) { return power(v, parameter); });
  return false;
}

static bool evaluate(const char* function, const void* x, void* y, int64_t count, DType dtype, double parameter) {
  if (dtype == DType::f64)
    return evaluate_as(function, static_cast<const double*>(x), static_cast<double*>(y), count, parameter);
  return evaluate_as(function, static_cast<const float*>(x), static_cast<float*>(y), count, parameter);
}
