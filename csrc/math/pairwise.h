// The classification cost of a detector's assigner: binary cross entropy summed over the classes, of every anchor's
// probabilities with every ground truth's one-hot target. With z_c the logit of p_c,
//   cost = sum_c softplus(z_c) - z_y        as softplus(-z) = softplus(z) - z:
// one sum an anchor and one number a pair, no sum a pair.
// torch's binary_cross_entropy takes log p and log(1 - p) for at least -100; so each z is taken into [-100, 100].
template <class V>
struct PairLogit {
  V z;
  V tail;  // log1p(exp(-|z|)), so softplus(z) = max(z, 0) + tail
};

// What the anchor's objectness logit o brings to each of its classes.
template <class V>
struct Objectness {
  V root, complement, half_nll;  // sqrt(sigmoid(o)), sigmoid(-o), -log(sigmoid(o)) / 2
};
template <class V>
FL_FN Objectness<V> objectness_of(V o) {
  const Sigmoid<V> sigma = sigmoid(o);
  const V near = 1 - sigma.far, zero = broadcast<V>(0);
  return {square_root(select<V>(o >= 0, near, sigma.far)), select<V>(o >= 0, sigma.far, near),
          (at_least(-o, zero) + sigma.log1p) * broadcast<V>(0.5)};
}

template <class V>
FL_FN PairLogit<V> into_range(V z, V tail) {
  return {at_most(at_least(z, broadcast<V>(-100)), broadcast<V>(100)), tail};
}

//   p = sigmoid(x):  z = x
struct SigmoidPair {
  template <class V>
  static FL_INLINE PairLogit<V> apply(V x, const Objectness<V>&) {
    return into_range(x, sigmoid(x).log1p);
  }
};

//   p = sqrt(sigmoid(x) sigmoid(o)):  z = -log(1 - p) + log p
// 1 - p^2 = sigmoid(-x) + sigmoid(x) sigmoid(-o) does not cancel, so the odds p / (1 - p) = p (1 + p) / (1 - p^2) have
// all their digits. In fp32 they overflow where log(1 - p) is below -88, and that is taken for -100.
struct ProductPair {
  template <class V>
  static FL_INLINE PairLogit<V> apply(V x, const Objectness<V>& o) {
    const Sigmoid<V> sigma = sigmoid(x);
    const V near = 1 - sigma.far, one = broadcast<V>(1);
    const V s = select<V>(x >= 0, near, sigma.far), complement = select<V>(x >= 0, sigma.far, near);
    const V p = square_root(s) * o.root;
    const V odds = p * (1 + p) / (complement + s * o.complement);
    const V nll = (at_least(-x, broadcast<V>(0)) + sigma.log1p) * broadcast<V>(0.5) + o.half_nll;
    return into_range(log1p(odds) - nll, log1p_unit(select<V>(odds > one, 1 / odds, odds)));
  }
};
