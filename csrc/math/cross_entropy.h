// Losses over the softmax of a row, from what one pass over the row leaves behind.

// With m the row's maximum and e_j = exp(x_j - m). The target's own term is kept apart from the others:
// 1 - p_y = rest / (rest + e_y) then keeps its digits where p_y rounds to 1.
template <class V>
struct RowSums {
  V target_distance;  // m - x_y >= 0
  V target_term;      // e_y
  V rest;             // sum of e_j over j != y
};

template <class V>
struct RowLoss {
  V value;
  V softmax;  // gradient of the loss by x_j is softmax * p_j for j != y ...
  V target;   // ... and this for j = y
};

// log(sum of e_j). The maximum's term is exactly 1, so the sum is 1 + something; where the target holds the
// maximum, that something is `rest`, with all its digits.
template <class V>
FL_FN V log_sum(RowSums<V> row) {
  return log1p(select<V>(row.target_term >= 1, row.rest + (row.target_term - 1), row.rest - 1 + row.target_term));
}

// Cross entropy with a class index:  value = w_y (log sum + m - x_y),  grad = w_y (p_j - 1_y).
template <class V>
FL_FN RowLoss<V> cross_entropy_row(RowSums<V> row, V weight) {
  const V inverse = 1 / (row.rest + row.target_term);
  return {weight * (log_sum(row) + row.target_distance), weight, -weight * row.rest * inverse};
}

// q^gamma, for the customary exponents without a logarithm.
template <class V>
FL_FN V focusing_factor(V q, double gamma) {
  return gamma == 2 ? q * q : gamma == 1 ? q : power(q, gamma);
}

// Softmax focal loss (arXiv:1708.02002 on a softmax):  value = -a_y q^g log p_y,  q = 1 - p_y,
//   grad = c (p_j - 1_y),  c = a_y q^g (1 - g p_y log p_y / q).
// q = 0 happens where p_y rounds to 1: the value and c are 0 then for every g > 0.
template <class V>
FL_FN RowLoss<V> softmax_focal_row(RowSums<V> row, V alpha, double gamma) {
  const V sum = row.rest + row.target_term;
  // q is raised to a power, which multiplies its error: take it from the smaller of the two terms.
  const V p = row.target_term / sum, q = select<V>(row.target_term < row.rest, 1 - p, row.rest / sum);
  const V nll = log_sum(row) + row.target_distance;
  const V focus = alpha * focusing_factor(q, gamma);
  // nll / q -> 1 as q -> 0
  const V ratio = select<V>(q > 0, nll / q, broadcast<V>(1));
  const V c = focus * (1 + broadcast<V>(gamma) * p * ratio);
  return {focus * nll, c, -c * q};
}
