// Cross entropy and softmax focal loss. Included inside each level's namespace. Two loops, one result:
//
// softmax_rows: classes are contiguous, a vector holds neighbouring classes of one row. The row is read from
//   memory once: its exponentials are summed and stored; a second sweep over the stored exponentials, now in L2, turns
//   them into the gradient. Between the two stand the row's formulas, evaluated for a group of short rows at once.
// softmax_columns: a vector holds the same class of neighbouring positions, so nothing is summed across lanes. A group
//   of positions is brought into a tile [C, group] and their gradient back, by copies where the positions are
//   contiguous, as in (N, C, d1, ...) logits, and by transpositions where the classes are.
//
// Memory traffic of both: each logit in once, each gradient out once.
//
// A target is an index y with weight A = w_y (1 - label_smoothing), a dense part
//   q_j = w_j ((1 - label_smoothing) t_j + label_smoothing / C)          (t_j = 0 for an index target),
// or both. With Q = sum of q_j, D = sum of q_j (m - x_j) and the row's log sum of exp(x_j - m):
//   value = A (log sum + m - x_y) + D + Q log sum
//   grad  = (A + Q) p_j - q_j - A 1_y

template <bool flag>
struct Flag {
  static constexpr bool value = flag;
};

// The dense part: none, the same for every class (label smoothing alone), or any.
enum class Dense { none, uniform, any };

template <class T>
struct DenseTarget {
  using V = typename VectorOf<T>::V;
  const T* weight;  // [C] or nullptr
  T keep, smooth;   // 1 - label_smoothing, label_smoothing / C

  // q of the classes from j on, t their targets; t is nullptr where the target is an index.
  template <class S>
  FL_INLINE V whole(int64_t j, const S* t) const {
    const V q = keep * (t ? load(t) : V{}) + smooth;
    return weight ? load(weight + j) * q : q;
  }
  // The same for n < lanes classes; the other lanes are 0.
  template <class S>
  FL_INLINE V part(int64_t j, const S* t, int64_t n) const {
    const V q = keep * (t ? load_part<V>(t, n, 0) : V{}) + smooth;
    return load_part<V>(weight ? weight + j : ones, n, 0) * q;
  }
  static constexpr T ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
};

// exp_term of one number.
template <class T>
FL_FN T exp_scalar(T x) {
  return exp_term(broadcast<typename VectorOf<T>::V>(x))[0];
}

// Steps through the positions, keeping an offset for each of up to three arrays.
struct Cursor {
  const SoftmaxArgs& a;
  int64_t index[kMaxDims];
  int64_t logits = 0, grad = 0, probability = 0;

  Cursor(const SoftmaxArgs& args, int64_t position) : a(args) {
    for (int d = a.ndim - 1; d >= 0; --d) {
      index[d] = position % a.size[d];
      position /= a.size[d];
      move(d, index[d]);
    }
  }
  void move(int d, int64_t steps) {
    logits += steps * a.logits_stride[d];
    grad += steps * a.grad_stride[d];
    probability += steps * a.probability_stride[d];
  }
  int64_t left_in_run() const { return a.size[a.ndim - 1] - index[a.ndim - 1]; }
  void advance(int64_t steps) {  // at most to the end of the run
    int d = a.ndim - 1;
    move(d, steps);
    index[d] += steps;
    for (; d > 0 && index[d] == a.size[d]; --d) {
      move(d, -index[d]);
      index[d] = 0;
      move(d - 1, 1);
      ++index[d - 1];
    }
  }
};

// What rounding `exact` to `rounded` lost. The gradient (A + Q) p_j - q_j is a difference of numbers that may be close:
// its factor (A + Q) / sum is kept in two parts. 0 where the factor is not finite.
FL_FN double what_is_left(double exact, double rounded) {
  const double left = exact - rounded;
  return left == left ? left : 0;
}
FL_FN vf what_is_left(Wide exact, vf rounded) {
  const vf left = round_once(exact - wide(rounded));
  return select<vf>(left == left, left, vf{});
}
FL_FN vd what_is_left(vd, vd) { return vd{}; }

FL_FN double plain_nan(double x) { return x == x ? x : __builtin_nan(""); }

// ---- terms ----------------------------------------------------------------------------------------------------
// The terms are exp(x - shift), and no maximum is looked for as long as the same shift will do: nothing but overflow
// and underflow depends on it, for a sum that is off by a power of two has the same digits. It is 0 as long as that
// does, for then nothing is rounded; else it is the maximum, and the next row is tried with it.

template <class V>
FL_FN V shift_of(V maximum) {
  return select<V>((maximum > -28) & (maximum < 52), V{}, maximum);
}
// The second try, where `shift` did not fit.
template <class V>
FL_FN V other_shift(V shift, V maximum) {
  const V other = shift_of(maximum);
  return select<V>(other == shift, maximum, other);
}
// Whether the sum of the others and the target's distance above the shift are numbers to reckon with. x - shift is
// exact where x is nearer to the shift than to 0.
template <class V>
FL_FN auto in_range(V shift, V above, V rest) {
  const auto zero = shift == 0;
  return (rest >= select<V>(zero, broadcast<V>(0x1p-45), broadcast<V>(0x1p-4))) &
         (rest <= select<V>(zero, broadcast<V>(0x1p80), broadcast<V>(0x1p16))) & (above < 60);
}

// Whether a row's factor, its scale over the sum, is a normal number for every sum that shift 0 allows. Relative to the
// maximum the sum is a small number, and serves any scale.
template <class V>
FL_FN auto serves_unshifted_sum(V scale) {
  const V size = magnitude(scale);
  return (size == 0) | ((size > 0x1p-38) & (size < 0x1p78));
}

// The same relative to a power of two near the sum of all: shift + k log(2) stands for RowSums's m.
constexpr double kLog2 = 0.69314718055994530942;
template <class V>
struct NearSum {
  V k, unit;  // unit = 2^-k

  NearSum(V above, V rest, bool index) {
    const V others = exponent_of(rest);
    k = index ? at_least(round_to_integer(above * static_cast<typename Lanes<V>::Scalar>(1 / kLog2)), others) : others;
    unit = times_power_of_two(broadcast<V>(1), -k);
  }
  auto moved() const { return wide(k) * kLog2; }
  RowSums<V> sums(V above, V rest, bool index) const {
    return {round_once(moved() - wide(above)), index ? exp_term_scaled(above, k) : V{}, rest * unit};
  }
};

template <class T>
constexpr T lowest = __is_same(T, double) ? static_cast<T>(-__DBL_MAX__) : static_cast<T>(-__FLT_MAX__);

// ---- rows -----------------------------------------------------------------------------------------------------

// Classes: only the block that holds the target tells its term from the others. Where an addition has a mask of its
// own, that costs less than another block.
constexpr int64_t kBlock = FUSED_LOSSES_VECTOR_BYTES == 64 ? 1024 : 128;
constexpr int64_t kGroup = 8192;     // logits: those of a group of short rows stay in L2
constexpr int64_t kPrefetch = 4096;  // logits ahead, or a group, so that memory has the time of its gradients, too

// bf16 and fp16: the gradient's memory does not hold an exponential. A second, coarse one costs less than a row of
// them in fp32, which is twice the row's size.
template <class S>
constexpr bool is_narrow = sizeof(S) == 2;

template <bool coarse, class V>
FL_FN V term_of(V x) {
  if constexpr (coarse)
    return exp_term_coarse(x);
  else
    return exp_term(x);
}

// A group of rows, a lane a row: where they lie, and what one pass over them leaves behind.
template <class S>
struct RowGroup {
  using T = typename ComputeOf<S>::T;
  static constexpr int lanes = Lanes<typename VectorOf<T>::V>::count;
  int count;
  int64_t position[lanes], target[lanes];  // -1: the target is no index
  const S* logits[lanes];                  // [C]
  const S* probability[lanes];             // [C] or nullptr
  S* term[lanes];                          // [C] exponentials: the gradient's memory, or as much apart; or nullptr
  S* grad[lanes];                          // [C] or nullptr
  T shift[lanes];                          // the row's terms are exp(x - shift); the next three go with it
  alignas(64) double rest[lanes], q_sum[lanes], q_distance[lanes];
  alignas(64) T target_logit[lanes], weight[lanes];
  alignas(64) double scale[lanes], factor[lanes], at_target[lanes];
};

template <class S>
FL_CALL typename ComputeOf<S>::T find_maximum(const S* x, int64_t n) {
  using T = typename ComputeOf<S>::T;
  using V = typename VectorOf<T>::V;
  constexpr int lanes = Lanes<V>::count;
  V highest[4];
  for (V& vector : highest) vector = broadcast<V>(lowest<T>);
  int64_t j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) highest[u] = at_least(load(x + j + u * lanes), highest[u]);
  for (; j + lanes <= n; j += lanes) highest[0] = at_least(load(x + j), highest[0]);
  if (j < n) highest[1] = at_least(load_part<V>(x + j, n - j, lowest<T>), highest[1]);
  const T top = max_lanes(at_least(at_least(highest[0], highest[1]), at_least(highest[2], highest[3])));
  return top > lowest<T> ? top : lowest<T>;
}

// The sums over the rows [first, last). The target's own term is kept out of `rest`.
template <class S, Dense dense, bool keep>
FL_CALL void add_terms(RowGroup<S>& rows, int first, int last, int64_t n,
                       const DenseTarget<typename ComputeOf<S>::T>& target, bool narrow_value) {
  using T = typename ComputeOf<S>::T;
  using V = typename VectorOf<T>::V;
  using I = typename Lanes<V>::Int;
  using Lane = decltype(I{}[0] + 0);
  using Batch = typename BatchOf<T>::V;
  constexpr int lanes = Lanes<V>::count;
  const int64_t next = n * rows.count, ahead_of_use = next > kPrefetch && next <= kGroup ? next : kPrefetch;
  for (int i = first; i < last; ++i) {
    const S* x = rows.logits[i];
    const S* t = rows.probability[i];
    S* e = rows.term[i];
    const V shift = broadcast<V>(rows.shift[i]);
    vd total_term{}, total_q{}, total_q_distance{};
    V sum{}, sum_q{}, sum_q_distance{};

    const auto sum_up = [&](auto holds_target, auto coarse, int64_t j, int64_t end) __attribute__((always_inline)) {
      I ahead = lane_numbers<V>() - static_cast<Lane>(holds_target.value ? rows.target[i] - j : 0);
      const auto add = [&](V term) {
        if constexpr (holds_target.value) term = select<V>(ahead == 0, V{}, term);
        ahead += lanes;
        sum += term;
      };
      while (j < end) {
        // Few additions in T before the sum goes on in double: in a confident row one lane holds a 1 to round at.
        const int64_t stop = j + 8 * lanes < end ? j + 8 * lanes : end;
        if constexpr (is_pair<Batch> && dense != Dense::any)
          for (; j + 2 * lanes <= stop; j += 2 * lanes) {
            __builtin_prefetch(x + j + ahead_of_use);
            const Batch distance = load_as<Batch>(x + j) - shift, term = term_of<coarse.value>(distance);
            if constexpr (keep) store(e + j, term);
            add(term.first);
            add(term.second);
            if constexpr (dense == Dense::uniform) sum_q_distance -= distance.first + distance.second;
          }
        for (; j + lanes <= stop; j += lanes) {
          __builtin_prefetch(x + j + ahead_of_use);
          const V distance = load(x + j) - shift, term = term_of<coarse.value>(distance);
          if constexpr (keep) store(e + j, term);
          add(term);
          if constexpr (dense == Dense::uniform) sum_q_distance -= distance;
          if constexpr (dense == Dense::any) {
            const V q = target.whole(j, t ? t + j : nullptr);
            sum_q += q;
            sum_q_distance -= q * distance;
          }
        }
        if (const int64_t left = stop - j; left > 0) {
          const V distance = load_part<V>(x + j, left, -static_cast<T>(__builtin_inf())) - shift;
          const V term = term_of<coarse.value>(distance);
          if constexpr (keep) store_part(e + j, left, term);
          add(term);
          if constexpr (dense != Dense::none) {
            const V q = dense == Dense::uniform ? broadcast<V>(1) : target.part(j, t ? t + j : nullptr, left);
            sum_q += q;
            sum_q_distance -= select<V>(lane_numbers<V>() < I{} + static_cast<Lane>(left), q * distance, V{});
          }
          j = end;
        }
        total_term += to_double_sum(sum);
        sum = V{};
        if constexpr (dense == Dense::any) {
          total_q += to_double_sum(sum_q);
          sum_q = V{};
        }
        if constexpr (dense != Dense::none) {
          total_q_distance += to_double_sum(sum_q_distance);
          sum_q_distance = V{};
        }
      }
    };
    const auto sum_blocks = [&](auto coarse) __attribute__((always_inline)) {
      for (int64_t begin = 0, end; begin < n; begin = end) {
        end = begin + kBlock < n ? begin + kBlock : n;
        if (rows.target[i] >= begin && rows.target[i] < end)
          sum_up(Flag<true>{}, coarse, begin, end);
        else
          sum_up(Flag<false>{}, coarse, begin, end);
      }
    };
    if (is_narrow<S> && narrow_value)
      sum_blocks(Flag<is_narrow<S>>{});
    else  // a float32 loss has the digits to show a coarse term
      sum_blocks(Flag<false>{});
    rows.rest[i] = sum_lanes(total_term);
    if constexpr (dense == Dense::uniform) {
      rows.q_sum[i] = static_cast<double>(target.smooth) * n;
      rows.q_distance[i] = static_cast<double>(target.smooth) * sum_lanes(total_q_distance);
    }
    if constexpr (dense == Dense::any) {
      rows.q_sum[i] = sum_lanes(total_q);
      rows.q_distance[i] = sum_lanes(total_q_distance);
    }
  }
}

// The gradient.
template <class S, Dense dense>
FL_CALL void write_gradient(const RowGroup<S>& rows, int64_t n, const DenseTarget<typename ComputeOf<S>::T>& target) {
  using T = typename ComputeOf<S>::T;
  using V = typename VectorOf<T>::V;
  constexpr int lanes = Lanes<V>::count;
  for (int i = 0; i < rows.count; ++i) {
    const S* from = is_narrow<S> ? rows.logits[i] : rows.term[i];
    const S* t = rows.probability[i];
    S* to = rows.grad[i];
    const V shift = broadcast<V>(rows.shift[i]);
    const double factor = plain_nan(rows.factor[i]);
    const V high = broadcast<V>(static_cast<T>(factor));
    const V low = broadcast<V>(static_cast<T>(what_is_left(factor, high[0])));
    const V scale = broadcast<V>(static_cast<T>(plain_nan(rows.scale[i]))), same = scale * target.smooth;
    const auto gradient = [&](auto term, V q) {
      if constexpr (is_narrow<S>) term = exp_term_coarse(term - shift);
      auto sum = term * high;  // the large numbers' difference first: it is small, and may be exact
      if constexpr (dense == Dense::uniform) sum -= same;
      if constexpr (dense == Dense::any) sum -= scale * q;
      if constexpr (!is_narrow<S>) sum += term * low;
      return sum;
    };
    const auto whole = [&](int64_t j) __attribute__((always_inline)) {
      return gradient(load(from + j), dense == Dense::any ? target.whole(j, t ? t + j : nullptr) : V{});
    };
    // The row's end, if not of whole vectors, is a vector that others overlap, for the next row's first one would wait
    // for a masked store to leave, whatever its mask. It is read before they have written.
    const bool overlaps = n % lanes != 0 && n >= lanes;
    const V end = overlaps ? whole(n - lanes) : V{};
    int64_t j = 0;
    if constexpr (is_narrow<S> && dense != Dense::any)
      for (; j + 2 * lanes <= n; j += 2 * lanes) {
        const Pair<V> terms = load_two(from + j);
        if constexpr (is_pair<typename BatchOf<T>::V>)
          store_two(to + j, gradient(terms, V{}));
        else
          store_two(to + j, {gradient(terms.first, V{}), gradient(terms.second, V{})});
      }
    for (; j + lanes <= n; j += lanes) store(to + j, whole(j));
    if (overlaps)
      store(to + n - lanes, end);
    else if (const int64_t left = n - j; left > 0)
      store_part(to + j, left,
                 gradient(load_part<V>(from + j, left, 0),
                          dense == Dense::any ? target.part(j, t ? t + j : nullptr, left) : V{}));
    if (const int64_t y = rows.target[i]; y >= 0) {
      double grad = rows.at_target[i];
      if constexpr (dense != Dense::none)
        grad -= rows.scale[i] * static_cast<double>(target.smooth) * (target.weight ? target.weight[y] : T{1});
      store_one(to + y, static_cast<T>(grad));
    }
  }
}

template <class S, Dense dense, bool want_grad>
static double softmax_rows_range(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using T = typename ComputeOf<S>::T;
  using V = typename VectorOf<T>::V;
  constexpr int lanes = Lanes<V>::count;
  constexpr bool keep = want_grad && !is_narrow<S>;

  const int64_t classes = a.classes;
  // The formulas of a row cost as much for one row as for a vector of them: short rows are taken in groups.
  const int64_t fit = kGroup / classes, group = fit < 1 ? 1 : fit < lanes ? fit : lanes;
  const DenseTarget<T> target{static_cast<const T*>(a.weight),
                              static_cast<T>(a.probability ? 1 - a.label_smoothing : 0),
                              static_cast<T>(a.label_smoothing / classes)};
  // A gradient in place of the logits has its terms apart, for with terms there would be no second try. Where they are
  // too many the maximum comes first, and for sums of q (shift - x), which want small distances.
  const bool in_place = keep && a.grad == a.logits, has_room = classes <= kGroup;
  const bool at_maximum = dense == Dense::any, maximum_first = at_maximum || (in_place && !has_room);
  const auto apart = std::unique_ptr<S[]>(in_place && has_room ? new S[group * classes] : nullptr);
  const bool narrow_value = a.value_dtype == a.dtype, wants_value = a.value || !a.upstream;
  T shift = 0;
  double total = 0;

  RowGroup<S> rows;
  Cursor cursor(a, begin);
  for (int64_t p = begin; p < end;) {
    for (int i = 0; i < lanes; ++i) {  // harmless numbers where there is no row
      rows.target_logit[i] = rows.weight[i] = rows.shift[i] = 0;
      rows.rest[i] = 1;
      rows.q_sum[i] = rows.q_distance[i] = rows.scale[i] = 0;
    }
    int i = 0;
    for (; p < end && i < group; ++p, cursor.advance(1)) {
      S* grad = want_grad ? static_cast<S*>(a.grad) + cursor.grad : nullptr;
      const int64_t y = a.index ? a.index[p] : -1;
      if (a.index && y == a.ignore_index) {
        if constexpr (want_grad) __builtin_memset(grad, 0, classes * sizeof(S));
        if (a.value) store_scalar(a.value_dtype, a.value, p, T{0});
        continue;
      }
      rows.position[i] = p;
      rows.target[i] = y;
      rows.logits[i] = static_cast<const S*>(a.logits) + cursor.logits;
      rows.probability[i] = a.probability ? static_cast<const S*>(a.probability) + cursor.probability : nullptr;
      rows.grad[i] = grad;
      rows.term[i] = apart ? apart.get() + i * classes : grad;
      rows.scale[i] = a.grad_scale * (a.upstream ? load_scalar<T>(a.value_dtype, a.upstream, p) : 1);
      if (y >= 0) {
        rows.target_logit[i] = load_one(rows.logits[i] + y);
        rows.weight[i] = (target.weight ? target.weight[y] : T{1}) * static_cast<T>(1 - a.label_smoothing);
      }
      ++i;
    }
    rows.count = i;

    bool by_maximum[lanes];
    for (i = 0; i < rows.count; ++i) {
      const T scale = static_cast<T>(dense == Dense::none ? rows.scale[i] * rows.weight[i] : rows.scale[i]);
      by_maximum[i] = at_maximum || (want_grad && !serves_unshifted_sum(broadcast<V>(scale))[0]);
      rows.shift[i] = shift;
      if (!maximum_first && !by_maximum[i]) continue;
      const T maximum = find_maximum(rows.logits[i], classes);
      rows.shift[i] = by_maximum[i] ? maximum : shift_of(broadcast<V>(maximum))[0];
    }
    add_terms<S, dense, keep>(rows, 0, rows.count, classes, target, narrow_value);
    if (!maximum_first) {
      const V first_shift = load(rows.shift), above = load(rows.target_logit) - first_shift;
      const auto fits = in_range(first_shift, above, round_once(load_wide(rows.rest, V{})));
      for (i = 0; i < rows.count; ++i) {
        if (fits[i] || by_maximum[i]) continue;
        const V maximum = broadcast<V>(find_maximum(rows.logits[i], classes));
        rows.shift[i] = other_shift(first_shift, maximum)[i];
        shift = shift_of(maximum)[0];
        add_terms<S, dense, keep>(rows, i, i + 1, classes, target, narrow_value);
      }
    }

    // The rows' formulas, a lane a row.
    const auto rest = load_wide(rows.rest, V{}), q = load_wide(rows.q_sum, V{});
    const V above = load(rows.target_logit) - load(rows.shift), others = round_once(rest);
    const NearSum<V> near(above, others, a.index);
    const RowSums<V> sums = near.sums(above, others, a.index);
    RowLoss<V> loss{};
    if (a.index)
      loss = a.gamma > 0 ? softmax_focal_row(sums, load(rows.weight), a.gamma)
                         : cross_entropy_row(sums, load(rows.weight), wants_value);
    auto value = wide(loss.value);
    if constexpr (dense != Dense::none)
      value = value + load_wide(rows.q_distance, V{}) +
              q * (near.moved() + wide(log_sum(sums, round_once(rest * wide(near.unit) - wide(sums.rest)))));
    total += sum_lanes(to_double_sum(value));
    if (a.value) {
      T lane[lanes];
      store(lane, round_once(value));
      for (i = 0; i < rows.count; ++i) store_scalar(a.value_dtype, a.value, rows.position[i], lane[i]);
    }

    if constexpr (want_grad) {
      const auto others_term = rest * wide(near.unit), all = others_term + wide(sums.target_term);
      const auto scale = load_wide(rows.scale, V{});
      store_wide(rows.factor, (wide(loss.softmax) + q) * scale * wide(near.unit) / all);
      // Cross entropy's from a 1 - p_y that is not rounded.
      const auto slope = a.gamma > 0 ? wide(loss.target) : wide(-loss.softmax) * (others_term / all);
      store_wide(rows.at_target, (slope + q * wide(sums.target_term) / all) * scale);
      write_gradient<S, dense>(rows, classes, target);
    }
  }
  return total;
}

// ---- columns --------------------------------------------------------------------------------------------------

// What reads and writes the memory of n positions, `step` apart where the next is as far as the one before, else 0.
template <class T>
struct Columns {
  using V = typename VectorOf<T>::V;
  static constexpr int lanes = Lanes<V>::count;
  DType dtype;
  const int64_t* offset;  // [n] of each position's first logit; [1] where they are `step` apart
  bool even;  // whether they are
  int64_t step, class_stride, classes, n, pitch;
  T* column;  // room for all their logits and a vector more

  // Whether a loop may as well read and write the memory as a tile.
  bool lies_as_tile() const { return neighbours() && dtype == compute_dtype<T> && n == pitch; }

  // To a tile [C, pitch].
  __attribute__((noinline)) void read(const void* data, T* tile) const {
    if (narrow_neighbours()) {
      if constexpr (__is_same(T, float))
        dtype == DType::bf16 ? widen_runs<bf16>(data, tile) : widen_runs<f16>(data, tile);
    } else if (neighbours()) {
      for (int64_t c = 0; c < classes; ++c) {
        T* to = tile + c * pitch;
        const T* run = stage_run(dtype, data, offset[0] + c * class_stride, 1, n, to);
        if (run != to)
          for (int64_t i = 0; i < n; i += lanes) move(run + i, to + i, n - i);
      }
    } else if (as_they_lie()) {
      const T* from = static_cast<const T*>(data);
      for (int64_t i = 0; i < n; i += lanes) transpose_in<false>(from, i, tile + i);
    } else if (class_stride == 1) {
      each_run([&](int64_t at, int64_t length, T* to) {
        const T* run = stage_run(dtype, data, at, 1, length, to);
        for (int64_t j = 0; run != to && j < length; j += lanes) move(run + j, to + j, length - j);
      });
      for (int64_t i = 0; i < n; i += lanes) in_column().template transpose_in<true>(column, i, tile + i);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const T* from = stage_run(dtype, data, at(i), class_stride, classes, column);
        for (int64_t c = 0; c < classes; ++c) tile[c * pitch + i] = from[c];
      }
    }
    for (int64_t c = 0; n < pitch && c < classes; ++c)
      for (int64_t i = n; i < pitch; ++i) tile[c * pitch + i] = 0;
  }
  // From it.
  __attribute__((noinline)) void write(void* data, const T* tile) const {
    if (narrow_neighbours()) {
      if constexpr (__is_same(T, float))
        dtype == DType::bf16 ? narrow_runs<bf16>(tile, data) : narrow_runs<f16>(tile, data);
    } else if (neighbours()) {
      for (int64_t c = 0; c < classes; ++c) {
        const T* run = tile + c * pitch;
        T* to = static_cast<T*>(data) + offset[0] + c * class_stride;
        if (dtype == compute_dtype<T>)
          for (int64_t i = 0; i < n; i += lanes) move(run + i, to + i, n - i);
        else
          unstage_run(dtype, data, offset[0] + c * class_stride, 1, n, run);
      }
    } else if (as_they_lie()) {
      T* to = static_cast<T*>(data);
      for (int64_t i = 0; i < n; i += lanes) transpose_out<false>(tile + i, i, to);
    } else if (class_stride == 1) {
      for (int64_t i = 0; i < n; i += lanes) in_column().template transpose_out<true>(tile + i, i, column);
      each_run([&](int64_t at, int64_t length, const T* run) { unstage_run(dtype, data, at, 1, length, run); });
    } else {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < classes; ++c) column[c] = tile[c * pitch + i];
        unstage_run(dtype, data, at(i), class_stride, classes, column);
      }
    }
  }

 private:
  bool neighbours() const { return even && step == 1; }
  bool narrow_neighbours() const { return neighbours() && dtype != compute_dtype<T> && n == pitch; }
  // Whole tiles of them. Short runs far apart: no processor sees the next ones coming.
  template <class S>
  FL_INLINE void widen_runs(const void* data, T* tile) const {
    constexpr int line = 64 / sizeof(S);
    const int64_t ahead = pitch < line ? line : pitch;
    for (int64_t c = 0; c < classes; ++c) {
      const S* run = static_cast<const S*>(data) + offset[0] + c * class_stride;
      for (int64_t i = 0; i < pitch; i += line) __builtin_prefetch(run + ahead + i);
      for (int64_t i = 0; i < pitch; i += lanes) store(tile + c * pitch + i, load(run + i));
    }
  }
  template <class S>
  FL_INLINE void narrow_runs(const T* tile, void* data) const {
    for (int64_t c = 0; c < classes; ++c) {
      S* run = static_cast<S*>(data) + offset[0] + c * class_stride;
      for (int64_t i = 0; i < pitch; i += lanes) store(run + i, load(tile + c * pitch + i));
    }
  }
  FL_INLINE int64_t at(int64_t i) const { return even ? offset[0] + i * step : offset[i]; }
  bool packed() const { return even && step == classes; }
  // Rows that squares are read from and written to directly. What a vector has beyond a row's end takes a mask, or
  // where there is none a loop: that costs more than to copy packed rows.
  bool as_they_lie() const {
    constexpr bool masks = FUSED_LOSSES_VECTOR_BYTES == 64;
    return class_stride == 1 && dtype == compute_dtype<T> && (masks || classes % lanes == 0 || !packed());
  }
  // The rows as `column` has them: packed.
  Columns in_column() const {
    static constexpr int64_t first = 0;
    return {compute_dtype<T>, &first, true, classes, 1, classes, n, pitch, nullptr};
  }
  // f(offset, length, of which in `column`) of the contiguous runs of rows.
  template <class F>
  FL_INLINE void each_run(const F& f) const {
    if (packed()) return f(offset[0], n * classes, column);
    for (int64_t i = 0; i < n; ++i) f(at(i), classes, column + i * classes);
  }
  FL_FN void move(const T* from, T* to, int64_t left) {
    if (left >= lanes)
      store(to, load(from));
    else
      store_part(to, left, load_part<V>(from, left, 0));
  }
  // f(k, offset) of row i + k, those past the end left out: full squares of evenly spaced rows by one pointer, for what
  // a row's own would take is as much as its shuffles.
  template <class F>
  FL_INLINE void each_row(int64_t i, const F& f) const {
    if (even && i + lanes <= n) {
      const int64_t first = offset[0] + i * step;
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) f(k, first + k * step);
    } else {
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k)
        if (i + k < n) f(k, at(i + k));
    }
  }
  // Squares of lanes x lanes, in registers. `whole`: vectors may go beyond the end of a row, over what comes next.
  template <bool whole>
  FL_INLINE void transpose_in(const T* from, int64_t i, T* tile) const {
    for (int64_t c = 0; c < classes; c += lanes) {
      const int64_t width = classes - c < lanes ? classes - c : lanes;
      V square[lanes] = {};
      if (whole || width == lanes)
        each_row(i, [&](int k, int64_t row) { square[k] = load(from + row + c); });
      else
        each_row(i, [&](int k, int64_t row) { square[k] = load_part<V>(from + row + c, width, 0); });
      transpose(square);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k)
        if (k < width) store(tile + (c + k) * pitch, square[k]);
    }
  }
  template <bool whole>
  FL_INLINE void transpose_out(const T* tile, int64_t i, T* to) const {
    // The last classes first: what they write beyond a row's end is the next row's first, written after them.
    for (int64_t c = (classes - 1) / lanes * lanes; c >= 0; c -= lanes) {
      const int64_t width = classes - c < lanes ? classes - c : lanes;
      V square[lanes];
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) square[k] = k < width ? load(tile + (c + k) * pitch) : V{};
      transpose(square);
      if (whole || width == lanes)
        each_row(i, [&](int k, int64_t row) { store(to + row + c, square[k]); });
      else
        each_row(i, [&](int k, int64_t row) { store_part(to + row + c, width, square[k]); });
    }
  }
};

// A sum of many terms in T: short runs, added up with Kahan's compensation.
template <class V>
struct LongSum {
  V total{}, lost{}, run{};
  FL_INLINE void add(V term) { run += term; }
  FL_INLINE void end_run() {
    const V y = run - lost, sum = total + y;
    keep(sum, (sum - total) - y);
  }
  // Each term by itself, the larger and the smaller of the two in any order (Knuth): for a sum of which most is
  // subtracted again.
  FL_INLINE void add_exactly(V term) {
    const V y = term - lost, sum = total + y, added = sum - total;
    keep(sum, ((sum - added) - total) + (added - y));
  }

 private:
  FL_INLINE void keep(V sum, V rounded) {
    lost = select<V>(rounded == rounded, rounded, V{});  // an infinite total has lost nothing
    total = sum;
    run = V{};
  }
};

template <class T, bool dense, bool want_grad>
static double softmax_columns_range(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::V;
  using I = typename Lanes<V>::Int;
  using Lane = decltype(I{}[0] + 0);
  constexpr int vectors = FUSED_LOSSES_VECTOR_BYTES == 64 ? 4 : 2;  // as many as the registers hold
  constexpr int lanes = Lanes<V>::count, group = vectors * lanes;
  constexpr int at_once = Lanes<typename BatchOf<T>::V>::count / lanes;  // exponentials

  const DType dtype = a.dtype;
  const int64_t classes = a.classes, last = a.ndim - 1;
  const bool wants_value = a.value || !a.upstream;
  const auto room = [](bool wanted, int64_t size) { return std::unique_ptr<T[]>(wanted ? new T[size] : nullptr); };
  // The logits go through a tile even where they lie as the loop wants them: in images whose size is a power of two,
  // the classes of one position compete for the same few lines of every cache.
  const auto tile = room(true, classes * group), target_tile = room(a.probability, classes * group),
             column = room(true, classes * group + lanes);
  const DenseTarget<T> target{nullptr, static_cast<T>(a.probability ? 1 - a.label_smoothing : 0),
                              static_cast<T>(a.label_smoothing / classes)};
  const T* weight = static_cast<const T*>(a.weight);
  double total = 0;

  Cursor cursor(a, begin);
  V next_shift[vectors] = {};
  int64_t logits_offset[group], grad_offset[group], probability_offset[group];
  for (int64_t p = begin; p < end; p += group) {
    const int64_t n = end - p < group ? end - p : group;
    const bool one_run = cursor.left_in_run() >= n;
    for (int64_t i = 0; i < (one_run ? 1 : n); ++i) {
      logits_offset[i] = cursor.logits;
      grad_offset[i] = cursor.grad;
      probability_offset[i] = cursor.probability;
      cursor.advance(one_run ? n : 1);
    }
    const auto columns = [&](const int64_t* offset, int64_t stride, int64_t class_stride) {
      return Columns<T>{dtype, offset, one_run, stride, class_stride, classes, n, group, column.get()};
    };
    const auto logits = columns(logits_offset, a.logits_stride[last], a.logits_class_stride),
               grad = columns(grad_offset, a.grad_stride[last], a.grad_class_stride);
    T* x = tile.get();  // [C, group] logits, exponentials, gradient
    const T* t = target_tile.get();

    const bool direct = logits.lies_as_tile();
    const T* const from = direct ? static_cast<const T*>(a.logits) + logits_offset[0] : x;
    const int64_t from_pitch = direct ? a.logits_class_stride : group;
    const auto find_maxima = [&](V(&highest)[vectors]) __attribute__((noinline)) {
#pragma GCC unroll 4
      for (V& vector : highest) vector = broadcast<V>(lowest<T>);
      for (int64_t c = 0; c < classes; ++c)
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) highest[u] = at_least(load(from + c * from_pitch + u * lanes), highest[u]);
    };
    if (!direct) logits.read(a.logits, x);
    if (dense && a.probability)
      columns(probability_offset, a.probability_stride[last], a.probability_class_stride)
          .read(a.probability, target_tile.get());

    // Targets and weights, a lane a position. A lane past the end counts as ignored.
    T index_lane[group], weight_lane[group], upstream_lane[group];
    if (!a.index) {
      for (int64_t i = 0; i < group; ++i) index_lane[i] = bits<T>(static_cast<Lane>(i < n ? -1 : -2));
    } else if (n == group) {
      for (int64_t i = 0; i < group; i += lanes)
        store(index_lane + i, bits<V>(load_indices(a.index + p + i, a.ignore_index, -2, I{})));
    } else {
      for (int64_t i = 0; i < group; ++i) {
        const int64_t y = i < n ? a.index[p + i] : a.ignore_index;
        index_lane[i] = bits<T>(static_cast<Lane>(y == a.ignore_index ? -2 : y));
      }
    }
    if (weight)
      for (int64_t i = 0; i < group; ++i) {
        const Lane y = bits<Lane>(index_lane[i]);
        weight_lane[i] = y >= 0 ? weight[y] : T{0};
      }
    if (a.upstream) {
      const T* upstream = stage_run(a.value_dtype, a.upstream, p, 1, n, upstream_lane);
      for (int64_t i = 0; i < n; ++i) upstream_lane[i] = static_cast<T>(a.grad_scale * upstream[i]);
      for (int64_t i = n; i < group; ++i) upstream_lane[i] = 0;
    }

    bool by_maximum = dense;
    if constexpr (want_grad && !dense) {
      I serves = ~I{};
      for (int64_t i = 0; i < group; i += lanes) {
        V scale = broadcast<V>(static_cast<T>(a.upstream ? 1 : a.grad_scale));
        if (weight) scale *= load(weight_lane + i);
        if (a.upstream) scale *= load(upstream_lane + i);
        serves &= serves_unshifted_sum(scale);
      }
      by_maximum = any_lane(~serves);
    }
    if (by_maximum) find_maxima(next_shift);
    V shift[vectors];
#pragma GCC unroll 4
    for (int u = 0; u < vectors; ++u) shift[u] = next_shift[u];

    const bool in_place = want_grad && grad.lies_as_tile();
    T* to = in_place ? static_cast<T*>(a.grad) + grad_offset[0] : x;
    const int64_t to_pitch = in_place ? a.grad_class_stride : group;
    I y[vectors];
    LongSum<V> rest[vectors], q_sum[vectors], q_distance[vectors];
    V above[vectors];  // the target's logit - shift
#pragma GCC unroll 4
    for (int u = 0; u < vectors; ++u) y[u] = bits<I>(load(index_lane + u * lanes));
    for (bool again = false;; again = true) {
#pragma GCC unroll 4
      for (int u = 0; u < vectors; ++u) {
        rest[u] = q_sum[u] = q_distance[u] = {};
        above[u] = V{};
      }
      for (int64_t c = 0; c < classes; ++c) {
        const T class_weight = weight ? weight[c] : T{1};
#pragma GCC unroll 4
        for (int first = 0; first < vectors; first += at_once) {
          V distance[at_once], term[at_once];
#pragma GCC unroll 4
          for (int k = 0; k < at_once; ++k) {
            const int u = first + k;
            // Short runs far apart: no processor sees them coming. The next logits, and where this gradient will go.
            if (direct) __builtin_prefetch(from + c * from_pitch + u * lanes + group);
            if (in_place) __builtin_prefetch(to + c * to_pitch + u * lanes, 1);
            distance[k] = term[k] = load(from + c * from_pitch + u * lanes) - shift[u];
          }
          exp_terms(term);
#pragma GCC unroll 4
          for (int k = 0; k < at_once; ++k) {
            const int u = first + k;
            const I is_target = y[u] == I{} + static_cast<Lane>(c);
            if constexpr (want_grad) store(x + c * group + u * lanes, term[k]);
            // Without an index a confident row's sum is 1 and little more, and its loss the little.
            if (dense && !a.index)
              rest[u].add_exactly(term[k]);
            else
              rest[u].add(select<V>(is_target, V{}, term[k]));
            above[u] = select<V>(is_target, distance[k], above[u]);
            if constexpr (dense) {
              const V q = class_weight * (target.keep * (t ? load(t + c * group + u * lanes) : V{}) + target.smooth);
              q_sum[u].add(q);
              q_distance[u].add(-q * distance[k]);
            }
          }
        }
        if (c % 4 == 3 || c + 1 == classes) {
#pragma GCC unroll 4
          for (int u = 0; u < vectors; ++u) {
            rest[u].end_run();
            if constexpr (dense) {
              q_sum[u].end_run();
              q_distance[u].end_run();
            }
          }
        }
      }
      if (by_maximum || again) break;
      I misfit[vectors], any{};
#pragma GCC unroll 4
      for (int u = 0; u < vectors; ++u) {
        misfit[u] = ~in_range(shift[u], above[u], rest[u].total) & (y[u] != I{} - static_cast<Lane>(2));
        any |= misfit[u];
      }
      if (!any_lane(any)) break;
      if (!direct) logits.read(a.logits, x);
      V highest[vectors];
      find_maxima(highest);
      for (int u = 0; u < vectors; ++u) {
        next_shift[u] = select<V>(misfit[u], shift_of(highest[u]), shift[u]);
        shift[u] = select<V>(misfit[u], other_shift(shift[u], highest[u]), shift[u]);
      }
    }

    V softmax[vectors], softmax_low[vectors] = {}, at_target[vectors], scale[vectors];
    I live[vectors];
#pragma GCC unroll 4
    for (int u = 0; u < vectors; ++u) {
      live[u] = y[u] != I{} - static_cast<Lane>(2);
      const NearSum<V> near(above[u], rest[u].total, a.index);
      const RowSums<V> sums = near.sums(above[u], rest[u].total, a.index);
      const V row_weight = weight ? load(weight_lane + u * lanes) : broadcast<V>(1);
      RowLoss<V> loss{};
      if (a.index)
        loss = a.gamma > 0 ? softmax_focal_row(sums, row_weight, a.gamma)
                           : cross_entropy_row(sums, row_weight * static_cast<T>(1 - a.label_smoothing), wants_value);
      const V lost = -rest[u].lost * near.unit;
      V value = loss.value;
      if constexpr (dense)
        value += q_distance[u].total + q_sum[u].total * (round_once(near.moved()) + log_sum(sums, lost));
      value = select<V>(live[u], value, V{});
      total += sum_lanes(to_double_sum(value));
      if (a.value) {
        T lane[lanes];
        store(lane, value);
        const int64_t left = n - u * lanes;
        if (left > 0) unstage_run(a.value_dtype, a.value, p + u * lanes, 1, left < lanes ? left : lanes, lane);
      }
      if constexpr (want_grad) {
        scale[u] = a.upstream ? load(upstream_lane + u * lanes) : broadcast<V>(static_cast<T>(a.grad_scale));
        const V all = sums.rest + sums.target_term;
        if constexpr (dense) {
          const V q_total = q_sum[u].total;
          const auto factor = (wide(loss.softmax) + wide(q_total)) * wide(scale[u] * near.unit) /
                              (wide(sums.rest) + wide(lost) + wide(sums.target_term));
          softmax[u] = round_once(factor);
          softmax_low[u] = what_is_left(factor, softmax[u]);
          at_target[u] = (loss.target + q_total * (sums.target_term / all)) * scale[u];
        } else {
          // Rounded once: where a wrong class has all of the sum, its gradient is the scale itself.
          const auto factor = wide(loss.softmax * near.unit) / wide(all);
          softmax[u] = round_once(a.upstream ? factor * wide(scale[u]) : factor * a.grad_scale);
          at_target[u] = loss.target * scale[u];
        }
      }
    }

    if constexpr (want_grad) {
      for (int64_t c = 0; c < classes; ++c) {
        const T class_weight = weight ? weight[c] : T{1};
#pragma GCC unroll 4
        for (int u = 0; u < vectors; ++u) {
          const V term = load(x + c * group + u * lanes);
          V gradient = term * softmax[u], at_this = at_target[u];
          if constexpr (dense) {
            const V q = class_weight * (target.keep * (t ? load(t + c * group + u * lanes) : V{}) + target.smooth);
            gradient = (gradient - scale[u] * q) + term * softmax_low[u];
            at_this -= scale[u] * q;
          }
          gradient = select<V>(y[u] == I{} + static_cast<Lane>(c), at_this, gradient);
          store(to + c * to_pitch + u * lanes, select<V>(live[u], gradient, V{}));
        }
      }
      if (!in_place) grad.write(a.grad, x);
    }
  }
  return total;
}

// ---- targets --------------------------------------------------------------------------------------------------

template <class T>
static double weigh_targets(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  double sum = 0;
  for (int64_t p = begin; p < end; ++p) sum += a.index[p] == a.ignore_index ? T{0} : weight[a.index[p]];
  return sum;
}

static double count_targets(const SoftmaxArgs& a, int64_t begin, int64_t end, int64_t* invalid) {
  constexpr int lanes = Lanes<vl>::count;
  vl ignored{}, wrong{};  // a true comparison is -1
  int64_t p = begin;
  for (; p + lanes <= end; p += lanes) {
    vl y;
    __builtin_memcpy(&y, a.index + p, sizeof y);
    const vl skip = y == a.ignore_index;
    ignored += skip;
    wrong |= ((y < 0) | (y >= a.classes)) & ~skip;
  }
  bool any_wrong = false;
  int64_t count = end - begin;
  for (int i = 0; i < lanes; ++i) {
    count += ignored[i];
    any_wrong |= wrong[i] != 0;
  }
  for (; p < end; ++p) {
    const int64_t y = a.index[p];
    if (y == a.ignore_index)
      --count;
    else
      any_wrong |= y < 0 || y >= a.classes;
  }
  if (any_wrong) {
    p = begin;
    while (a.index[p] == a.ignore_index || (a.index[p] >= 0 && a.index[p] < a.classes)) ++p;
    *invalid = p;
    return 0;
  }
  if (!a.weight || !a.count_weights) return static_cast<double>(count);
  return a.dtype == DType::f64 ? weigh_targets<double>(a, begin, end) : weigh_targets<float>(a, begin, end);
}

// ---- instantiations -------------------------------------------------------------------------------------------

template <class S, bool want_grad>
static double softmax_rows_of(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  if (a.probability || (a.weight && a.label_smoothing != 0))
    return softmax_rows_range<S, Dense::any, want_grad>(a, begin, end);
  if (a.label_smoothing != 0) return softmax_rows_range<S, Dense::uniform, want_grad>(a, begin, end);
  return softmax_rows_range<S, Dense::none, want_grad>(a, begin, end);
}

static double softmax_rows(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  const auto as = [&](auto stored) {
    using S = decltype(stored);
    return a.grad ? softmax_rows_of<S, true>(a, begin, end) : softmax_rows_of<S, false>(a, begin, end);
  };
  switch (a.dtype) {
    case DType::f64: return as(double{});
    case DType::bf16: return as(bf16{});
    case DType::f16: return as(f16{});
    case DType::f32: break;
  }
  return as(float{});
}

static double softmax_columns(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  const bool dense = a.probability || a.label_smoothing != 0;
  const auto as = [&](auto type) {
    using T = decltype(type);
    if (dense)
      return a.grad ? softmax_columns_range<T, true, true>(a, begin, end)
                    : softmax_columns_range<T, true, false>(a, begin, end);
    return a.grad ? softmax_columns_range<T, false, true>(a, begin, end)
                  : softmax_columns_range<T, false, false>(a, begin, end);
  };
  return a.dtype == DType::f64 ? as(double{}) : as(float{});
}
