// Focal losses (Lin et al. 2017, arXiv:1708.02002): cross entropy times (1 - p of the truth)^gamma.

// The exponents worth a loop of their own; between 0 and 1 the derivative's u^(gamma - 1) has a pole at u = 0.
enum class Focusing { zero, below_one, one, three_halves, two, above_one };

inline Focusing focusing_of(double gamma) {
  if (gamma == 0) return Focusing::zero;
  if (gamma < 1) return Focusing::below_one;
  if (gamma == 1) return Focusing::one;
  if (gamma == 1.5) return Focusing::three_halves;
  return gamma == 2 ? Focusing::two : Focusing::above_one;
}

// With s = sigmoid(x), ce = binary cross entropy with pos_weight, and
//   u  = s (1 - t) + (1 - s) t          how wrong the prediction is
//   a  = alpha_positive t + alpha_negative (1 - t)
//   value = a u^g ce
//   grad  = a (u^g ce' + g u^(g-1) (1 - 2t) s (1 - s) ce)
template <Focusing focusing>
struct SigmoidFocal {
  template <class V, class Params>
  static FL_INLINE ValueGrad<V> apply(V x, V t, V pos_weight, const Params& params) {
    const Sigmoid<V> sigma = sigmoid(x);
    const ValueGrad<V> ce = sigmoid_cross_entropy(x, t, pos_weight, sigma);
    const V negative = 1 - t;
    const V other = select<V>(x >= 0, negative, t), difference = negative - t;  // u where far is 0
    const V u = other + select<V>(x >= 0, -difference, difference) * sigma.far;
    const V sq = (sigma.far - sigma.far * sigma.far) * difference;
    const V alpha = params.alpha_positive * t + params.alpha_negative * negative;

    V factor, slope;  // u^g, and g u^(g-1) (1 - 2t) s (1 - s)
    if constexpr (focusing == Focusing::zero) {
      factor = broadcast<V>(1);
      slope = V{};
    } else if constexpr (focusing == Focusing::one) {
      factor = u;
      slope = sq;
    } else if constexpr (focusing == Focusing::two) {
      factor = u * u;
      slope = 2 * u * sq;
    } else if constexpr (focusing == Focusing::three_halves) {
      const V root = square_root(u);
      factor = root * u;
      slope = params.gamma * root * sq;
    } else if constexpr (focusing == Focusing::above_one) {
      const V lower = power(u, params.gamma_minus_one);
      factor = lower * u;
      slope = params.gamma * lower * sq;
    } else {
      // s (1 - s) / u stays finite, so u^g takes the pole's place. u = 0 happens only where s has underflown.
      factor = power(u, params.gamma_double);
      slope = params.gamma * factor * select<V>(u > 0, sq / u, V{});
    }
    return {alpha * factor * ce.value, alpha * (factor * ce.grad + slope * ce.value)};
  }
};
