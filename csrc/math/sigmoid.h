// What every sigmoid loss needs of one logit, from one exponential and one division. No includes and no include
// guard: each back end includes the formulas inside its own namespace, after defining FL_FN and FL_INLINE and, for
// its number type V (a float, a double, or a vector of them): exp, log, log1p, log1p_unit, log_unit, log_complement and
// odds (on [0, 1]), power, square_root, select, magnitude, at_least, broadcast.

// Of sigmoid(x) and 1 - sigmoid(x), `far` is the smaller one, with all its digits; the other is 1 - far. A formula
// that starts from far never subtracts two numbers that are nearly equal.
template <class V>
struct Sigmoid {
  V far;  // sigmoid(-|x|)
  V distance;  // |x|
  V log1p;  // log(1 + exp(-|x|)), so softplus(x) = max(x, 0) + log1p
};

// With e = exp(-|x|), for who has it already.
template <class V>
FL_FN Sigmoid<V> sigmoid(V x, V e) {
  return {odds(e), magnitude(x), log1p_unit(e)};
}
template <class V>
FL_FN Sigmoid<V> sigmoid(V x) {
  return sigmoid(x, exp(-magnitude(x)));
}

// Binary cross entropy with a weight on the positives, (1 - t) softplus(x) + pw t softplus(-x), for a logit and a
// soft target. On the wrong side of x = 0 stands the weight `wrong`: 1 - t for x >= 0, pw t for x < 0.
//   value = wrong |x| + (1 - t + pw t) log1p
//   grad  = sign(x) (wrong - (1 - t + pw t) far)
template <class V>
struct ValueGrad {
  V value, grad;  // the loss of one element and its derivative by the input
};
template <class V>
FL_FN ValueGrad<V> sigmoid_cross_entropy(V x, V t, V pos_weight, Sigmoid<V> sigma) {
  const V negative = 1 - t, positive = pos_weight * t, both = negative + positive;
  const auto right = x >= 0;
  const V wrong = select<V>(right, negative, positive);
  const V slope = wrong - both * sigma.far;
  return {wrong * sigma.distance + both * sigma.log1p, select<V>(right, slope, -slope)};
}

// The factors of one element.
template <class V>
struct ElementWeights {
  V pos_weight, alpha_positive, alpha_negative;
};
