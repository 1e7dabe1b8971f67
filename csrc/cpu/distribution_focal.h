// Distribution focal loss. Included inside each level's namespace, after softmax.h. Rows are short (16 bins): a vector
// holds one bin of neighbouring positions, and nothing is summed across lanes. A group of positions is brought into a
// tile [C, group] (Columns), which holds their logits, then the exponentials, then the gradient.

template <class T, bool want_grad>
static double distribution_focal_range(const DistributionArgs& d, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::V;
  constexpr int vectors = FUSED_LOSSES_VECTOR_BYTES == 64 ? 4 : 2;  // as many as the registers hold
  constexpr int lanes = Lanes<V>::count, group = vectors * lanes;

  const SoftmaxArgs& a = d.rows;
  const int64_t classes = a.classes, last = a.ndim - 1;
  const auto tile = std::unique_ptr<T[]>(new T[classes * group]), column = std::unique_ptr<T[]>(new T[classes]);
  T* const x = tile.get();  // [C, group]
  const T *target = static_cast<const T*>(d.target), *weight = static_cast<const T*>(d.weight);
  double total = 0;

  Cursor cursor(a, begin);
  int64_t logits_offset[group], grad_offset[group];
  for (int64_t p = begin; p < end; p += group) {
    const int64_t n = end - p < group ? end - p : group;
    const bool one_run = cursor.left_in_run() >= n;
    for (int64_t i = 0; i < n;) {
      const int64_t run = cursor.left_in_run() < n - i ? cursor.left_in_run() : n - i;
      for (int64_t k = 0; k < run; ++k) {
        logits_offset[i + k] = cursor.logits + k * a.logits_stride[last];
        grad_offset[i + k] = cursor.grad + k * a.grad_stride[last];
      }
      cursor.advance(run);
      i += run;
    }
    const auto columns = [&](const int64_t* offset, int64_t stride, int64_t class_stride) {
      return Columns<T>{a.dtype, offset, one_run ? stride : 0, class_stride, classes, n, group, column.get()};
    };
    columns(logits_offset, a.logits_stride[last], a.logits_class_stride).read(a.logits, x);

    alignas(64) T place[group] = {}, factor[group] = {}, scale[group] = {};  // a lane past the end counts for nothing
    for (int64_t i = 0; i < n; ++i) {
      place[i] = target[p + i];
      factor[i] = weight ? weight[p + i] : T{1};
      scale[i] = static_cast<T>(a.grad_scale * factor[i]);
    }
    for (int64_t i = 0; a.upstream && i < n; ++i) scale[i] *= load_scalar<T>(a.value_dtype, a.upstream, p + i);

    V highest[vectors];
#pragma GCC unroll 4
    for (V& vector : highest) vector = broadcast<V>(lowest<T>);
    for (int64_t c = 0; c < classes; ++c)
#pragma GCC unroll 4
      for (int u = 0; u < vectors; ++u) highest[u] = at_least(load(x + c * group + u * lanes), highest[u]);

    LongSum<V> rest[vectors];
    V ones[vectors] = {}, distances[vectors] = {};
    for (int64_t c = 0; c < classes; ++c) {
      const V bin = broadcast<V>(static_cast<T>(c));
#pragma GCC unroll 4
      for (int u = 0; u < vectors; ++u) {
        const V distance = highest[u] - load(x + c * group + u * lanes), term = exp_term(-distance);
        const V q = neighbour_weight(load(place + u * lanes), bin);
        if constexpr (want_grad) store(x + c * group + u * lanes, term);
        rest[u].add(select<V>(distance == 0, V{}, term));
        ones[u] += select<V>(distance == 0, broadcast<V>(1), V{});
        distances[u] += select<V>(q > 0, q * distance, V{});  // two terms, and a bin of -inf beside them is none
      }
      if (c % 4 == 3 || c + 1 == classes)
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) rest[u].end_run();
    }

    V inverse[vectors];
    BinSums<V> sums[vectors];
#pragma GCC unroll 4
    for (int u = 0; u < vectors; ++u) {
      sums[u] = {rest[u].total, ones[u], distances[u]};
      const V factors = load(factor + u * lanes);
      V value = factors * distribution_focal_value(sums[u]);
      if (n < group) {  // lanes past the end
        T lane[lanes];
        store(lane, value);
        const int64_t left = n - u * lanes;
        value = left > 0 ? load_part<V>(lane, left < lanes ? left : lanes, 0) : V{};
      }
      total += sum_lanes(to_double_sum(value));
      if (a.value) {
        T lane[lanes];
        store(lane, value);
        const int64_t left = n - u * lanes;
        if (left > 0) unstage_run(a.value_dtype, a.value, p + u * lanes, 1, left < lanes ? left : lanes, lane);
      }
      inverse[u] = load(scale + u * lanes) / (sums[u].rest + sums[u].ones);
    }

    if constexpr (want_grad) {
      for (int64_t c = 0; c < classes; ++c) {
        const V bin = broadcast<V>(static_cast<T>(c));
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) {
          T* at = x + c * group + u * lanes;
          const V q = neighbour_weight(load(place + u * lanes), bin);
          store(at, distribution_focal_slope(sums[u], load(at), q, inverse[u]));
        }
      }
      columns(grad_offset, a.grad_stride[last], a.grad_class_stride).write(a.grad, x);
    }
  }
  return total;
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
  const T *target = static_cast<const T*>(d.target), last = static_cast<T>(d.rows.classes - 1);
  for (int64_t p = begin; p < end;) {
    const int64_t until = p + 64 < end ? p + 64 : end, first = p;
    bool inside = true;
    for (; p < until; ++p) inside &= (target[p] >= 0) & (target[p] <= last);
    if (inside) continue;
    for (p = first; target[p] >= 0 && target[p] <= last;) ++p;
    return p;
  }
  return -1;
}
static int64_t find_outside_bins(const DistributionArgs& d, int64_t begin, int64_t end) {
  return d.rows.dtype == DType::f64 ? find_outside_bins_as<double>(d, begin, end)
                                    : find_outside_bins_as<float>(d, begin, end);
}
