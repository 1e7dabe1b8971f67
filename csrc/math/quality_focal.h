// Quality focal loss (Li et al. 2020, arXiv:2006.04388): the target is how good the box is, not only whether there is
// one.

//   u     = |t - s|
//   value = u^g ce,  grad = u^g (s - t) + g u^(g-1) sign(s - t) s (1 - s) ce
// For g below 1 and a soft t the derivative has no limit at s = t; 0 is taken there.
template <Focusing focusing>
struct QualityFocal {
  static constexpr bool on_logits = true;
  using Negative = FocalNegative<focusing>;
  template <class V, class Params>
  static FL_INLINE ValueGrad<V> apply(V x, Sigmoid<V> sigma, V t, ElementWeights<V>, const Params& params) {
    const ValueGrad<V> ce = sigmoid_cross_entropy(x, t, broadcast<V>(1), sigma);
    const V difference = ce.grad, both = sigma.far - sigma.far * sigma.far;
    const V du = select<V>(difference > 0, both, select<V>(difference < 0, -both, V{}));
    const Modulation<V> m = modulation<focusing>(magnitude(difference), du, params);
    return {m.factor * ce.value, m.factor * ce.grad + m.slope * ce.value};
  }
};
