// Distribution focal loss (Li et al. 2020, arXiv:2006.04388): a box's side is the mean of a distribution over bins, and
// the loss its cross entropy with the target's two neighbours, l = floor(t) and l + 1, weighted by q_l = l + 1 - t and
// q_(l+1) = t - l. Each weight is one subtraction, so that a small one keeps its digits; they sum to 1.

// What one pass over a row leaves behind: z_j = x_j - shift and e_j = exp(z_j) of the two neighbours, and the sum of
// the other e_j. Apart from the others, a confident row's loss and gradient are as small as they are.
template <class V>
struct NeighbourSums {
  V left_weight, right_weight;  // q
  V left_logit, right_logit;  // z
  V left, right;  // e
  V others;
};
template <class V>
FL_FN V sum_of(const NeighbourSums<V>& row) {
  return row.others + (row.left + row.right);
}

// Whether shift 0 serves, without the row's maximum: the quotient of the sum and the larger neighbour is a number, too.
template <class V>
FL_FN auto serves_unshifted(const NeighbourSums<V>& row) {
  const V nearer = at_least(row.left, row.right);
  return (nearer > 0x1p-60) & (sum_of(row) < 0x1p60);
}

// value = sum of q_j (-log p_j) = q_b (z_a - z_b) + log(sum / e_a), a the neighbour of the larger logit, b the other.
template <class V>
FL_FN V distribution_focal_value(const NeighbourSums<V>& row) {
  const auto rises = row.left_logit < row.right_logit;
  const V high = select<V>(rises, row.right_logit, row.left_logit);
  const V low = select<V>(rises, row.left_logit, row.right_logit);
  const V low_weight = select<V>(rises, row.left_weight, row.right_weight);
  const V nearer = select<V>(rises, row.right, row.left), farther = select<V>(rises, row.left, row.right);
  // A neighbour of weight 0 counts for nothing, and may be -inf; so may both.
  const V apart = select<V>((low_weight > 0) & (low < high), low_weight * (high - low), V{});
  // Far below the shift, the row's maximum then, log(sum / e_a) = log(sum) - z_a, and z_a keeps the digits.
  const auto far = nearer < 0x1p-60;
  const V ratio = select<V>(far, sum_of(row) - 1, (row.others + farther) / nearer);
  return apart + (log1p(ratio) - select<V>(far, high, V{}));
}

// sum (p_j - q_j) of a neighbour, from its weight and term and the other's: (1 - q) e - q (rest), and 1 - q is the
// other's weight. Of any other bin it is e_j.
template <class Number>
FL_FN Number neighbour_slope(Number weight, Number term, Number other_weight, Number other_term, Number others) {
  return other_weight * term - weight * (others + other_term);
}
