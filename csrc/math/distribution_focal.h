// Distribution focal loss (Li et al. 2020, arXiv:2006.04388): a box's side is the mean of a distribution over bins, and
// the loss its cross entropy with the target's two neighbours.

// With l = floor(t): q_l = l + 1 - t, q_(l+1) = t - l, 0 elsewhere. Each is one subtraction, so that a small one keeps
// its digits. They sum to 1.
template <class V>
FL_FN V neighbour_weight(V t, V bin) {
  const V rising = t - (bin - 1), falling = (bin + 1) - t;
  return at_least(select<V>(rising < falling, rising, falling), broadcast<V>(0));
}

// What one pass over a row leaves behind, with m its maximum and e_j = exp(x_j - m). The maximum's own terms, which are
// 1, are counted apart: a confident row's sum is 1 and little, and its loss that little.
template <class V>
struct BinSums {
  V rest;  // sum of the e_j below the maximum
  V ones;  // how many reach it
  V distance;  // sum of q_j (m - x_j)
};

// value = sum of q_j (-log p_j)
template <class V>
FL_FN V distribution_focal_value(BinSums<V> row) {
  return row.distance + log1p(row.rest + (row.ones - 1));
}

// grad_j = p_j - q_j = (e_j - q_j (ones + rest)) / (ones + rest)
template <class V>
FL_FN V distribution_focal_slope(BinSums<V> row, V term, V q, V inverse_sum) {
  return ((term - q * row.ones) - q * row.rest) * inverse_sum;
}
