// Varifocal loss (Zhang et al. 2021, arXiv:2008.13367): positives count by their quality, negatives as in focal loss.

//   t > 0:  value = w ce,                  grad = w (s - t),   w = t, or 1 where alpha_positive is 0
//   else:   value = a s^g ce,              grad = a (s^g ce' + g s^g (1 - s) ce),   a = alpha_negative
// alpha_positive is 1 or 0; with params.slope = 0 the weight a s^g is a constant to the gradient.
template <Focusing focusing>
struct Varifocal {
  static constexpr bool on_logits = true;
  using Negative = FocalNegative<focusing>;
  template <class V, class Params>
  static FL_INLINE ValueGrad<V> apply(V x, Sigmoid<V> sigma, V t, ElementWeights<V> weights, const Params& params) {
    const ValueGrad<V> ce = sigmoid_cross_entropy(x, t, broadcast<V>(1), sigma);
    const ValueGrad<V> negative = Negative::apply(x, sigma, t, weights, params);
    const V weight = weights.alpha_positive * t + (1 - weights.alpha_positive);
    return {select<V>(t > 0, weight * ce.value, negative.value), select<V>(t > 0, weight * ce.grad, negative.grad)};
  }
};
