// What every sigmoid loss needs of one logit, from one exponential and one division, without cancellation on
// either side. No includes and no include guard: each back end includes the formulas inside its own namespace,
// after defining FL_FN and, for its number type V (a float, a double, or a vector of them): exp, log, log1p,
// log1p_unit (on [0, 1]), power, square_root, select, magnitude, at_least, broadcast.

template <class V>
struct Sigmoid {
  V s, q;                     // sigmoid(x), and 1 - sigmoid(x) with all its digits
  V softplus, softplus_minus;  // log(1 + exp(x)) = -log q, log(1 + exp(-x)) = -log s
};

template <class V>
FL_FN Sigmoid<V> sigmoid(V x) {
  const V e = exp(-magnitude(x));
  const V near = 1 / (1 + e), far = e * near;
  const V l = log1p_unit(e);
  const auto positive = x >= 0;
  return {select<V>(positive, near, far), select<V>(positive, far, near), at_least(x, V{}) + l, at_least(-x, V{}) + l};
}

template <class V>
struct ValueGrad {
  V value, grad;  // the loss of one element and its derivative by the input
};
