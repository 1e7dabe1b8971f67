// Distribution focal loss. Included inside each level's namespace, after softmax.h. Rows are short (16 bins): a vector
// holds one bin of neighbouring positions, and nothing is summed across lanes. A group of positions is brought into a
// tile [C, group] (Columns), which holds their logits, then exp(x - shift), then the gradient.

template <class T, bool want_grad>
static double distribution_focal_range(const DistributionArgs& d, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::V;
  using I = typename Lanes<V>::Int;
  using Lane = decltype(I{}[0] + 0);
  constexpr int vectors = FUSED_LOSSES_VECTOR_BYTES == 64 ? 4 : 2;  // as many as the registers hold
  constexpr int lanes = Lanes<V>::count, group = vectors * lanes;
  constexpr int at_once = Lanes<typename BatchOf<T>::V>::count / lanes;  // exponentials

  const SoftmaxArgs& a = d.rows;
  const int64_t classes = a.classes, last = a.ndim - 1;
  const auto tile = std::unique_ptr<T[]>(new T[classes * group]),
             column = std::unique_ptr<T[]>(new T[classes * group + lanes]);
  const auto number = std::unique_ptr<T[]>(new T[classes]);
  for (int64_t c = 0; c < classes; ++c) number[c] = static_cast<T>(c);
  T* const x = tile.get();  // [C, group]
  const T *target = static_cast<const T*>(d.target), *weight = static_cast<const T*>(d.weight);
  vd total{};

  T staged[group];
  int64_t logits_offset[group], grad_offset[group];
  Cursor cursor(a, begin);
  for (int64_t p = begin; p < end; p += group) {
    const int64_t n = end - p < group ? end - p : group;
    const bool one_run = cursor.left_in_run() >= n;
    for (int64_t i = 0; i < (one_run ? 1 : n); ++i) {
      logits_offset[i] = cursor.logits;
      grad_offset[i] = cursor.grad;
      cursor.advance(one_run ? n : 1);
    }
    const auto columns = [&](const int64_t* offset, int64_t stride, int64_t class_stride) {
      return Columns<T>{a.dtype, offset, one_run, stride, class_stride, classes, n, group, column.get()};
    };
    const auto logits = columns(logits_offset, a.logits_stride[last], a.logits_class_stride);
    // 0 in a lane past the end.
    const auto of_positions = [&](const T* from, int u) {
      const int64_t rest = n - u * lanes;
      return rest >= lanes ? load(from + u * lanes) : rest > 0 ? load_part<V>(from + u * lanes, rest, 0) : V{};
    };
    logits.read(a.logits, x);

    const T* upstream = a.upstream ? stage_run(a.value_dtype, a.upstream, p, 1, n, staged) : nullptr;
    V factor[vectors], scale[vectors];
    for (int u = 0; u < vectors; ++u) {
      factor[u] = weight ? of_positions(weight + p, u) : broadcast<V>(1);
      scale[u] = factor[u] * static_cast<T>(a.grad_scale);
      if (upstream) scale[u] *= of_positions(upstream, u);
    }

    NeighbourSums<V> row[vectors];
    V left_bin[vectors], shift[vectors] = {};
    for (bool retried = false;; retried = true) {
      I misfit[vectors], any{};
      for (int u = 0; u < vectors; ++u) {  // one at a time: the sums of several would not fit the registers
        const V place = of_positions(target + p, u), nearest = round_to_integer(place);
        const V below = select<V>(nearest > place, nearest - 1, nearest);
        // The last bin is a right neighbour, where it is not the only one.
        const V left = at_least(at_most(below, broadcast<V>(static_cast<T>(classes - 2))), V{}), right = left + 1;
        V z_left{}, z_right = broadcast<V>(static_cast<T>(-__builtin_inf()));
        LongSum<V> others;
        const auto add_bins = [&](auto count, int64_t first) {
          V z[count.value], term[count.value];
#pragma GCC unroll 4
          for (int k = 0; k < count.value; ++k) z[k] = term[k] = load(x + (first + k) * group + u * lanes) - shift[u];
          exp_terms(term);
#pragma GCC unroll 4
          for (int k = 0; k < count.value; ++k) {
            const V bin = broadcast<V>(number[first + k]);
            const auto is_left = bin == left, is_right = bin == right;
            z_left = select<V>(is_left, z[k], z_left);
            z_right = select<V>(is_right, z[k], z_right);
            others.add(select<V>(is_left | is_right, V{}, term[k]));
            if constexpr (want_grad) store(x + (first + k) * group + u * lanes, term[k]);
          }
        };
        int64_t c = 0;
        for (; c + 4 <= classes; c += 4) {
#pragma GCC unroll 4
          for (int64_t k = 0; k < 4; k += at_once) add_bins(std::integral_constant<int, at_once>(), c + k);
          others.end_run();
        }
        for (; c < classes; ++c) add_bins(std::integral_constant<int, 1>(), c);
        others.end_run();
        left_bin[u] = left;
        row[u] = {right - place, place - left, z_left, z_right, exp_term(z_left), exp_term(z_right), others.total};
        misfit[u] = ~(serves_unshifted(row[u]) & serves_unshifted_sum(scale[u]));
        any |= misfit[u];
      }
      if (retried || !any_lane(any)) break;
      logits.read(a.logits, x);
      for (int u = 0; u < vectors; ++u) {
        V highest = broadcast<V>(lowest<T>);
        for (int64_t c = 0; c < classes; ++c) highest = at_least(load(x + c * group + u * lanes), highest);
        shift[u] = select<V>(misfit[u], highest, V{});
      }
    }

#pragma GCC unroll 4
    for (int u = 0; u < vectors; ++u) {
      const int64_t rest = n - u * lanes;
      V value = factor[u] * distribution_focal_value(row[u]);
      if (rest < lanes) value = select<V>(lane_numbers<V>() < I{} + static_cast<Lane>(rest), value, V{});
      total += to_double_sum(value);
      if (a.value && rest > 0) {
        T lane[lanes];
        store(lane, value);
        unstage_run(a.value_dtype, a.value, p + u * lanes, 1, rest < lanes ? rest : lanes, lane);
      }
    }

    if constexpr (want_grad) {
      for (int u = 0; u < vectors; ++u) {
        const NeighbourSums<V>& s = row[u];
        // Rounded once: they have more operations than the other bins' terms.
        const auto left_weight = wide(s.left_weight), right_weight = wide(s.right_weight);
        const auto e_left = wide(s.left), e_right = wide(s.right), others = wide(s.others);
        const auto exact = wide(scale[u]) / (others + (e_left + e_right));
        const V left_slope = round_once(neighbour_slope(left_weight, e_left, right_weight, e_right, others) * exact);
        const V right_slope = round_once(neighbour_slope(right_weight, e_right, left_weight, e_left, others) * exact);
        const V inverse = round_once(exact), left = left_bin[u], right = left + 1;
#pragma GCC unroll 4
        for (int64_t c = 0; c < classes; ++c) {
          T* const at = x + c * group + u * lanes;
          const V bin = broadcast<V>(number[c]);
          store(at, select<V>(bin == left, left_slope, select<V>(bin == right, right_slope, load(at) * inverse)));
        }
      }
      columns(grad_offset, a.grad_stride[last], a.grad_class_stride).write(a.grad, x);
    }
  }
  return sum_lanes(total);
}

static double distribution_focal(const DistributionArgs& d, int64_t begin, int64_t end) {
  const auto as = [&](auto type) {
    using T = decltype(type);
    return d.rows.grad ? distribution_focal_range<T, true>(d, begin, end)
                       : distribution_focal_range<T, false>(d, begin, end);
  };
  return d.rows.dtype == DType::f64 ? as(double{}) : as(float{});
}

// The lowest position in [begin, end) whose target is not in [0, classes - 1] (NaN is not), or -1.
template <class T>
static int64_t find_outside_bins_as(const DistributionArgs& d, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::V;
  constexpr int64_t lanes = Lanes<V>::count, block = 4 * lanes;
  const T *target = static_cast<const T*>(d.target), last = static_cast<T>(d.rows.classes - 1);
  for (int64_t p = begin; p < end; ++p) {
    for (; p + block <= end; p += block) {
      typename Lanes<V>::Int inside = ~typename Lanes<V>::Int{};
#pragma GCC unroll 4
      for (int64_t i = 0; i < block; i += lanes) inside &= (load(target + p + i) >= 0) & (load(target + p + i) <= last);
      if (any_lane(~inside)) break;
    }
    if (p < end && !(target[p] >= 0 && target[p] <= last)) return p;
  }
  return -1;
}
static int64_t find_outside_bins(const DistributionArgs& d, int64_t begin, int64_t end) {
  return d.rows.dtype == DType::f64 ? find_outside_bins_as<double>(d, begin, end)
                                    : find_outside_bins_as<float>(d, begin, end);
}
