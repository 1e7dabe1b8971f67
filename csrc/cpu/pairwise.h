// The (G, A) classification cost of an assigner, see math/pairwise.h. Included inside each level's namespace.
//
// A vector's lanes are neighbouring anchors. A tile of 64 of them is transposed once, [C, 64], and turned into the
// logits z; each ground truth then takes the row of its class from it. Memory traffic: the logits in once, the cost
// out once.

constexpr int kPairAnchors = 64;

template <class Pair, class T>
static void pairwise_range(const PairwiseArgs& a, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::V;
  constexpr int lanes = Lanes<V>::count, group = kPairAnchors;
  const int64_t classes = a.classes;
  const std::unique_ptr<T[]> tile(new T[classes * group]), column(new T[classes * group + lanes]);  // [C, group]
  T objectness[group] = {};
  // Apart and in double: where the target's z is most of `positive`, subtracting it leaves the others' digits.
  double positive[group], tail[group];  // sums over the classes of max(z, 0) and of log1p(exp(-|z|))

  for (int64_t p = begin; p < end; p += group) {
    const int64_t n = end - p < group ? end - p : group;
    const int64_t offset = p * a.anchor_stride;
    Columns<T>{a.dtype, &offset, true, a.anchor_stride, a.class_stride, classes, n, group, column.get()}.read(
        a.logits, tile.get());
    if (a.objectness) {
      const T* o = stage_run(a.dtype, a.objectness, p * a.objectness_stride, a.objectness_stride, n, objectness);
      if (o != objectness) read_run(o, 1, n, objectness);
    }
    for (int u = 0; u < group; u += lanes) {
      const Objectness<V> anchor = objectness_of(load(objectness + u));
      auto positive_sum = wide(V{}), tail_sum = wide(V{});
      for (int64_t c = 0; c < classes; ++c) {
        T* z = tile.get() + c * group + u;
        const PairLogit<V> logit = Pair::apply(load(z), anchor);
        store(z, logit.z);
        positive_sum = positive_sum + wide(at_least(logit.z, V{}));
        tail_sum = tail_sum + wide(logit.tail);
      }
      store_wide(positive + u, positive_sum);
      store_wide(tail + u, tail_sum);
    }
    for (int64_t g = 0; g < a.truths; ++g) {
      const T* z = tile.get() + a.index[g] * group;
      T* cost = static_cast<T*>(a.cost) + g * a.anchors + p;
      for (int u = 0; u < n; u += lanes) {
        const V value = round_once(load_wide(positive + u, V{}) - wide(load(z + u)) + load_wide(tail + u, V{}));
        if (u + lanes <= n)
          store(cost + u, value);
        else
          store_part(cost + u, n - u, value);
      }
    }
  }
}

static void pairwise(const PairwiseArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::f64)
    return a.objectness ? pairwise_range<ProductPair, double>(a, begin, end)
                        : pairwise_range<SigmoidPair, double>(a, begin, end);
  return a.objectness ? pairwise_range<ProductPair, float>(a, begin, end)
                      : pairwise_range<SigmoidPair, float>(a, begin, end);
}
