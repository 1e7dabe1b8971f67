// Binary cross entropy, on logits and on probabilities.

//   value = (1 - t) softplus(x) + pw t softplus(-x)
//   grad  = (1 - t) s - pw t (1 - s)
// torch writes the value as (1 - t) x + (1 + (pw - 1) t) softplus(-x), whose two terms cancel where x is far
// below zero and t = 0, which is where a detector's background lives. See sigmoid.h for a form that does not.
struct BceWithLogits {
  static constexpr bool on_logits = true;
  using Negative = FocalNegative<Focusing::zero>;
  template <class V, class Params>
  static FL_INLINE ValueGrad<V> apply(V x, Sigmoid<V> sigma, V t, ElementWeights<V> weights, const Params&) {
    return sigmoid_cross_entropy(x, t, weights.pos_weight, sigma);
  }
};

//   value = -t max(log p, -100) - (1 - t) max(log(1 - p), -100)
//   grad  = (p - t) / max(p (1 - p), 1e-12)
// The clamps are torch's (1e-12 a float in every dtype): they keep value and gradient finite at p = 0 and p = 1. A
// probability or a target outside [0, 1] makes the value NaN: the host looks for them only where it meets one.
struct Bce {
  static constexpr bool on_logits = false;  // and not on a Sigmoid
  template <class V, class Params>
  static FL_INLINE ValueGrad<V> apply(V p, Sigmoid<V>, V t, ElementWeights<V>, const Params&) {
    const V floor = broadcast<V>(-100);
    const V value = (t - 1) * at_least(log_complement(p), floor) - t * at_least(log_unit(p), floor);
    const auto inside = (t >= 0) & (t <= 1) & (p >= 0) & (p <= 1);
    const V checked = select<V>(inside, value, broadcast<V>(__builtin_nan("")));
    return {checked, (p - t) / at_least((1 - p) * p, broadcast<V>(1e-12f))};
  }
};
