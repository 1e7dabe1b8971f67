// Focal losses (Lin et al. 2017, arXiv:1708.02002): cross entropy times (1 - p of the truth)^gamma.

// The exponents worth a loop of their own; between 0 and 1 the derivative's u^(gamma - 1) has a pole at u = 0.
enum class Focusing { zero, below_one, one, three_halves, two, above_one };

// Params: gamma and gamma_minus_one in double, and `slope`: gamma, or 0 where the weight is not differentiated.

inline Focusing focusing_of(double gamma) {
  if (gamma == 0) return Focusing::zero;
  if (gamma < 1) return Focusing::below_one;
  if (gamma == 1) return Focusing::one;
  if (gamma == 1.5) return Focusing::three_halves;
  return gamma == 2 ? Focusing::two : Focusing::above_one;
}

template <class V>
struct Modulation {
  V factor, slope;  // u^g and its derivative
};

// u: how wrong the prediction is, 0 to 1; du: its derivative.
template <Focusing focusing, class V, class Params>
FL_FN Modulation<V> modulation(V u, V du, const Params& params) {
  if constexpr (focusing == Focusing::zero) {
    return {broadcast<V>(1), V{}};
  } else if constexpr (focusing == Focusing::one) {
    return {u, params.slope * du};
  } else if constexpr (focusing == Focusing::two) {
    return {u * u, params.slope * u * du};
  } else if constexpr (focusing == Focusing::three_halves) {
    const V root = square_root(u);
    return {root * u, params.slope * root * du};
  } else if constexpr (focusing == Focusing::above_one) {
    const V lower = power(u, params.gamma_minus_one);
    return {lower * u, params.slope * lower * du};
  } else {
    // du / u stays finite, so u^g takes the pole's place. u = 0 happens only where s has underflown.
    const V factor = params.gamma == 0.5 ? square_root(u) : power(u, params.gamma);
    return {factor, params.slope * factor * select<V>(u > 0, du / u, V{})};
  }
}

// A negative, t = 0: of every loss here there is left
//   value = a s^g softplus(x),  grad = a s^g (s + g (1 - s) softplus(x)),  a = alpha_negative.
// No pole and no difference. Most of a detector's elements are negatives, and cost a third of the general form.
template <Focusing focusing>
struct FocalNegative {
  static constexpr bool on_logits = true;
  template <class V, class Params>
  static FL_INLINE ValueGrad<V> apply(V x, Sigmoid<V> sigma, V, ElementWeights<V> weights, const Params& params) {
    const V near = 1 - sigma.far;
    const V s = select<V>(x >= 0, near, sigma.far), rest = select<V>(x >= 0, sigma.far, near);
    const V softplus = at_least(x, V{}) + sigma.log1p;
    const V factor = weights.alpha_negative * modulation<focusing>(s, V{}, params).factor;
    if constexpr (focusing == Focusing::zero) return {factor * softplus, factor * s};
    return {factor * softplus, factor * (s + params.slope * rest * softplus)};
  }
};

// With s = sigmoid(x), ce = binary cross entropy with pos_weight, and
//   u  = s (1 - t) + (1 - s) t          how wrong the prediction is
//   a  = alpha_positive t + alpha_negative (1 - t)
//   value = a u^g ce
//   grad  = a (u^g ce' + g u^(g-1) (1 - 2t) s (1 - s) ce)
template <Focusing focusing>
struct SigmoidFocal {
  static constexpr bool on_logits = true;
  using Negative = FocalNegative<focusing>;
  template <class V, class Params>
  static FL_INLINE ValueGrad<V> apply(V x, Sigmoid<V> sigma, V t, ElementWeights<V> weights, const Params& params) {
    const ValueGrad<V> ce = sigmoid_cross_entropy(x, t, weights.pos_weight, sigma);
    const V negative = 1 - t;
    const V other = select<V>(x >= 0, negative, t), difference = negative - t;  // u where far is 0
    const V u = other + select<V>(x >= 0, -difference, difference) * sigma.far;
    const V du = (sigma.far - sigma.far * sigma.far) * difference;
    const V alpha = weights.alpha_positive * t + weights.alpha_negative * negative;
    const Modulation<V> m = modulation<focusing>(u, du, params);
    return {alpha * m.factor * ce.value, alpha * (m.factor * ce.grad + m.slope * ce.value)};
  }
};
