// Losses over the softmax of a row, from what one pass over the row leaves behind.

// Relative to m, a number near the row's log sum of exp(x_j): e_j = exp(x_j - m). The target's own term is kept apart
// from the others: 1 - p_y = rest / (rest + e_y) then keeps its digits where p_y rounds to 1.
template <class V>
struct RowSums {
  V target_distance;  // m - x_y
  V target_term;      // e_y
  V rest;             // sum of e_j over j != y
};

template <class V>
struct RowLoss {
  V value;
  V softmax;  // gradient of the loss by x_j is softmax * p_j for j != y ...
  V target;   // ... and this for j = y
};

// log(sum of e_j), for a sum of about 1: e_y - 1 is exact where e_y is most of it, and `rest` - 1 where no target is
// kept apart. `lost`: what rounding took from `rest`, all that is left of a confident row's sum then.
template <class V>
FL_FN V log_sum(RowSums<V> row, V lost) {
  return log1p(select<V>(row.target_term >= 1, row.rest + (row.target_term - 1), row.rest - 1 + row.target_term) +
               lost);
}

// -log p_y. Where the target holds most of the sum it is log1p(rest / e_y), with all the digits of `rest`; elsewhere
// log sum + m - x_y, both positive.
template <class V>
FL_FN V negative_log(RowSums<V> row) {
  const auto holds = row.target_term > row.rest;
  return log1p(select<V>(holds, row.rest / row.target_term, row.rest - 1 + row.target_term)) +
         select<V>(holds, V{}, row.target_distance);
}

// Cross entropy with a class index:  value = w_y (log sum + m - x_y),  grad = w_y (p_j - 1_y).
template <class V>
FL_FN RowLoss<V> cross_entropy_row(RowSums<V> row, V weight, bool wants_value = true) {
  return {wants_value ? weight * negative_log(row) : V{}, weight, -weight * (row.rest / (row.rest + row.target_term))};
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
  const V nll = negative_log(row);
  const V focus = alpha * focusing_factor(q, gamma);
  // nll / q -> 1 as q -> 0
  const V ratio = select<V>(q > 0, nll / q, broadcast<V>(1));
  const V c = focus * (1 + broadcast<V>(gamma) * p * ratio);
  return {focus * nll, c, -c * q};
}
