// One loop for every element-wise loss. Included inside each level's namespace.
//
// The elements are taken in tiles that stay in the L1 cache. An operand that lies in memory as the loop wants
// it (compute type, contiguous) is used where it is; any other (bf16, fp16, strided, broadcast) is staged into
// a tile of the compute type first, and a gradient that must go elsewhere is written out after. So the loop
// itself knows neither strides nor storage types. Memory traffic: each operand in once, the gradient out once.
//
// An index target is one more way to stage the target's tile. Vectors that hold nothing but negatives, most of them,
// go through a formula without a target; the others are listed while the tile is staged.

constexpr int kTile = 1024;

template <class T>
struct ElementwiseParams {
  T alpha_positive, alpha_negative, slope;
  double gamma, gamma_minus_one;
};

// Where a tile starts: its linear number and its index along every dimension.
struct Position {
  int64_t linear;
  int64_t index[kMaxDims];

  Position(const ElementwiseArgs& a, int64_t start) : linear(start) {
    for (int d = a.ndim - 1; d >= 0; --d) {
      index[d] = start % a.size[d];
      start /= a.size[d];
    }
  }
};

// Calls run(pointer offset, first tile element, count, its index) for each innermost run of the tile.
template <class Run>
FL_FN void for_each_run(const ElementwiseArgs& a, const Position& at, const int64_t* stride, int64_t n, Run run) {
  int64_t index[kMaxDims], offset = 0;
  for (int d = 0; d < a.ndim; ++d) {
    index[d] = at.index[d];
    offset += index[d] * stride[d];
  }
  const int last = a.ndim - 1;
  for (int64_t done = 0; done < n;) {
    const int64_t left = a.size[last] - index[last], count = left < n - done ? left : n - done;
    run(offset, done, count, index);
    done += count;
    offset += count * stride[last];
    index[last] += count;
    for (int d = last; d > 0 && index[d] == a.size[d]; --d) {
      offset += stride[d - 1] - index[d] * stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <class T>
FL_CALL const T* stage(const ElementwiseArgs& a, const Position& at, const Operand& operand, int64_t n, T* tile) {
  if (!operand.data) return nullptr;
  if (operand.linear) return stage_run(operand.dtype, operand.data, at.linear, 1, n, tile);
  const int64_t stride = operand.stride[a.ndim - 1];
  for_each_run(a, at, operand.stride, n, [&](int64_t offset, int64_t first, int64_t count, const int64_t*) {
    const T* run = stage_run(operand.dtype, operand.data, offset, stride, count, tile + first);
    if (run != tile + first) read_run(run, 1, count, tile + first);
  });
  return tile;
}

// Where the loop shall write this operand's tile: in place if it can, else into `tile`, for unstage() to move.
template <class T>
FL_FN T* destination(const Position& at, const Operand& operand, T* tile) {
  if (!operand.data) return nullptr;
  return operand.linear && operand.dtype == compute_dtype<T> ? static_cast<T*>(operand.data) + at.linear : tile;
}

template <class T>
FL_CALL void unstage(const ElementwiseArgs& a, const Position& at, const Operand& operand, int64_t n, const T* tile) {
  if (operand.linear) return unstage_run(operand.dtype, operand.data, at.linear, 1, n, tile);
  const int64_t stride = operand.stride[a.ndim - 1];
  for_each_run(a, at, operand.stride, n, [&](int64_t offset, int64_t first, int64_t count, const int64_t*) {
    unstage_run(operand.dtype, operand.data, offset, stride, count, tile + first);
  });
}

// An index target's tile: `negative` but for the few elements written here, in their order. Their vectors are listed.
template <class T>
struct IndexTile {
  static constexpr int lanes = Lanes<typename BatchOf<T>::V>::count;
  alignas(64) T target[kTile];
  int listed[kTile / lanes], count = 0;

  IndexTile(bool wanted, T negative) {
    if (!wanted) return;
    for (T& t : target) t = negative;
  }
  void set(int64_t i, T t) {
    const int vector = static_cast<int>(i) / lanes;
    target[i] = t;
    if (count == 0 || listed[count - 1] != vector) listed[count++] = vector;
  }
  void clear(T negative) {
    for (int k = 0; k < count; ++k) store(target + listed[k] * lanes, broadcast<typename BatchOf<T>::V>(negative));
    count = 0;
  }
};

// Stands in the target's tile for an ignored anchor: a NaN whose low bits no score has.
template <class T>
constexpr auto ignored_bits = int32_t{0x7fdeadf1};
template <>
constexpr auto ignored_bits<double> = int64_t{0x7ff8dead5eedf00d};

template <class V>
FL_FN typename Lanes<V>::Int is_ignored(V t) {
  using I = typename Lanes<V>::Int;
  return bits<I>(t) == I{} + ignored_bits<typename Lanes<V>::Scalar>;
}

template <class T>
FL_CALL void stage_index(const ElementwiseArgs& a, const Position& at, int64_t n, IndexTile<T>& tile) {
  const IndexTarget& target = a.index;
  const T ignored = bits<T>(ignored_bits<T>);
  const auto positive = [&](int64_t anchor) {
    return target.score ? static_cast<const T*>(target.score)[anchor] : static_cast<T>(target.positive);
  };
  const int last = a.ndim - 1;
  // The classes of one anchor from `from` on: count elements of the tile, from `first` on.
  const auto stage_anchor = [&](int64_t offset, int64_t first, int64_t count, int64_t from) {
    const int32_t code = target.code[offset];
    if (code == kIgnored) {
      for (int64_t i = 0; i < count; ++i) tile.set(first + i, ignored);
    } else if (code >= from && code < from + count) {
      tile.set(first + code - from, positive(offset));
    }
  };
  if (target.class_dim == last && a.ndim == 2) {
    const int64_t classes = a.size[last];
    int64_t from = at.index[last], offset = at.index[0] * target.stride[0];
    int32_t others = 0;  // most tiles have none
    for (int64_t first = -from, anchor = offset; first < n; first += classes, anchor += target.stride[0])
      others |= target.code[anchor] ^ kBackground;
    if (others == 0) return;
    for (int64_t first = 0; first < n; offset += target.stride[0]) {
      const int64_t left = classes - from, count = left < n - first ? left : n - first;
      if (target.code[offset] != kBackground) stage_anchor(offset, first, count, from);
      first += count;
      from = 0;
    }
    return;
  }
  for_each_run(a, at, target.stride, n, [&](int64_t offset, int64_t first, int64_t count, const int64_t* index) {
    const int64_t from = index[target.class_dim];
    if (target.class_dim == last) return stage_anchor(offset, first, count, from);
    const int64_t stride = target.stride[last];
    for (int64_t i = 0; i < count; ++i) {  // anchors, and one class
      const int32_t code = target.code[offset + i * stride];
      if (code == from) tile.set(first + i, positive(offset + i * stride));
      if (code == kIgnored) tile.set(first + i, ignored);
    }
  });
}

// The operands of one tile, in the compute type; a null pointer is an absent operand.
template <class T>
struct Tile {
  const T *input, *target, *weight, *pos_weight, *alpha, *upstream;
  T *value, *grad, *probability;
  bool indexed;  // the target may hold ignored_bits

  // The tile from element i on, where it is known whether there are ignored anchors.
  FL_INLINE Tile from(int64_t i, bool may_be_ignored) const {
    const auto later = [&](auto* p) { return p ? p + i : p; };
    return {later(input),    later(target), later(weight), later(pos_weight),  later(alpha),
            later(upstream), later(value),  later(grad),   later(probability), may_be_ignored};
  }
};

// n elements, n a multiple of the lanes. Returns the sum of the values. `coarse`: to 18 bits. The exponentials come
// first, in a loop of their own: together the two chains are longer than what the processor looks ahead, and it would
// wait for most of the time.
template <class Loss, bool want_value, bool want_grad, bool coarse, class T>
FL_CALL double tile_loop(const Tile<T>& given_tile, int64_t n, T grad_scale, const ElementwiseParams<T>& given_params) {
  using V = typename BatchOf<T>::V;
  constexpr int lanes = Lanes<V>::count;
  const Tile<T> tile = given_tile;  // copies, which no store in the loop can change
  const ElementwiseParams<T> params = given_params;
  alignas(64) T exponential[kTile];  // exp(-|x|)
  if constexpr (Loss::on_logits)
    for (int64_t i = 0; i < n; i += lanes) {
      const V x = load_as<V>(tile.input + i);
      if constexpr (coarse)
        store(exponential + i, exp_minus_magnitude_coarse(x));
      else
        store(exponential + i, exp_minus_magnitude(x));
    }
  vd total{};
  V partial{};
  int pending = 0;
  for (int64_t i = 0; i < n; i += lanes) {
    ElementWeights<V> weights{tile.pos_weight ? load_as<V>(tile.pos_weight + i) : broadcast<V>(1),
                              broadcast<V>(params.alpha_positive), broadcast<V>(params.alpha_negative)};
    if (tile.alpha) {
      weights.alpha_positive = load_as<V>(tile.alpha + i);
      weights.alpha_negative = 1 - weights.alpha_positive;
    }
    const V x = load_as<V>(tile.input + i), t = load_as<V>(tile.target + i);
    Sigmoid<V> sigma{};
    if constexpr (Loss::on_logits) {
      const V e = load_as<V>(exponential + i);
      if constexpr (coarse)
        sigma = {odds_coarse(e), magnitude(x), log1p_unit_coarse(e)};
      else
        sigma = sigmoid(x, e);
    }
    ValueGrad<V> r = Loss::apply(x, sigma, t, weights, params);
    if (tile.weight) {
      const V weight = load_as<V>(tile.weight + i);
      r.value *= weight;
      r.grad *= weight;
    }
    if (tile.probability) store(tile.probability + i, select<V>(x >= 0, 1 - sigma.far, sigma.far));
    if constexpr (want_grad) {
      r.grad *= grad_scale;
      if (tile.upstream) r.grad *= load_as<V>(tile.upstream + i);
    }
    if (tile.indexed) {  // last, so that nothing of an ignored anchor gets through: a mean of none divides by 0
      const auto ignored = is_ignored(t);
      r.value = select<V>(ignored, V{}, r.value);
      r.grad = select<V>(ignored, V{}, r.grad);
    }
    if constexpr (want_grad) store(tile.grad + i, r.grad);
    if constexpr (want_value) {
      if (tile.value) store(tile.value + i, r.value);
      partial += r.value;
      if (++pending == 4) {  // few enough additions in float to keep its last digit
        total += to_double_sum(partial);
        partial = V{};
        pending = 0;
      }
    }
  }
  return want_value ? sum_lanes(total + to_double_sum(partial)) : 0;
}

template <class T>
using TileLoop = double (*)(const Tile<T>&, int64_t n, T grad_scale, const ElementwiseParams<T>&);

template <class T>
struct TileLoops {
  TileLoop<T> any, negative;  // for any target, for one of 0 only (nullptr: none)
};

// The vectors of a tile: those listed by the loop for any target, the others by the negatives'.
template <class T>
FL_CALL double indexed_tile(const Tile<T>& tile, const IndexTile<T>& index, int64_t n, T grad_scale,
                            const ElementwiseParams<T>& params, TileLoops<T> loops) {
  constexpr int lanes = IndexTile<T>::lanes;
  double sum = 0;
  int64_t done = 0;
  for (int k = 0; k < index.count && index.listed[k] * lanes < n;) {
    const int64_t from = index.listed[k] * lanes;
    if (from > done) sum += loops.negative(tile.from(done, false), from - done, grad_scale, params);
    for (done = from; k < index.count && index.listed[k] * lanes == done && done < n; ++k) done += lanes;
    sum += loops.any(tile.from(from, true), done - from, grad_scale, params);
  }
  if (done < n) sum += loops.negative(tile.from(done, false), n - done, grad_scale, params);
  return sum;
}

// The longest tile of whole rows and whole vectors, or the longest there is.
FL_FN int64_t tile_length(const ElementwiseArgs& a, int64_t lanes) {
  for (int64_t length = kTile; length > 0; length -= lanes)
    if (length % a.size[a.ndim - 1] == 0) return length;
  return kTile;
}
// Whether an operand is the same row over and over, and so the same in every tile of whole rows.
FL_FN bool repeats(const ElementwiseArgs& a, const Operand& operand, int64_t length) {
  bool same = !operand.linear && length % a.size[a.ndim - 1] == 0;
  for (int d = 0; d + 1 < a.ndim; ++d) same &= operand.stride[d] == 0;
  return same;
}

template <class T>
static double elementwise_range(const ElementwiseArgs& a, int64_t begin, int64_t end, TileLoops<T> loops) {
  constexpr int lanes = Lanes<typename BatchOf<T>::V>::count;
  const ElementwiseParams<T> params{static_cast<T>(a.alpha_positive), static_cast<T>(a.alpha_negative),
                                    static_cast<T>(a.detach_weight ? 0 : a.gamma), a.gamma, a.gamma - 1};
  const T grad_scale = static_cast<T>(a.grad_scale), negative = static_cast<T>(a.index.negative);
  const bool indexed = a.index.code, split = indexed && negative == 0 && loops.negative;
  alignas(64) T buffer[9][kTile];
  IndexTile<T> index_tile(indexed, negative);
  const int64_t length = tile_length(a, lanes);
  const auto stage_again = [&](const Position& at, const Operand& operand, int64_t n, T* tile) -> const T* {
    if (operand.data && at.linear != begin && repeats(a, operand, length)) return tile;
    return stage(a, at, operand, n, tile);
  };
  double sum = 0;
  for (int64_t start = begin; start < end; start += length) {
    const int64_t n = end - start < length ? end - start : length;
    const Position at(a, start);
    if (indexed) stage_index(a, at, n, index_tile);
    const Tile<T> tile{
        stage(a, at, a.input, n, buffer[0]),       indexed ? index_tile.target : stage(a, at, a.target, n, buffer[1]),
        stage_again(at, a.weight, n, buffer[2]),   stage_again(at, a.pos_weight, n, buffer[3]),
        stage_again(at, a.alpha, n, buffer[4]),    stage(a, at, a.upstream, n, buffer[5]),
        destination(at, a.value, buffer[6]),       destination(at, a.grad, buffer[7]),
        destination(at, a.probability, buffer[8]), indexed};
    const int64_t whole = n / lanes * lanes, rest = n - whole;
    if (split)
      sum += indexed_tile(tile, index_tile, whole, grad_scale, params, loops);
    else
      sum += loops.any(tile, whole, grad_scale, params);
    if (rest) {
      // The last few elements go through a vector of their own: nothing is read or written past the end.
      T last[9][lanes] = {};
      const auto take = [&](const T* from, T* to) -> const T* {
        if (!from) return nullptr;
        for (int64_t i = 0; i < rest; ++i) to[i] = from[whole + i];
        return to;
      };
      const Tile<T> tail{take(tile.input, last[0]),
                         take(tile.target, last[1]),
                         take(tile.weight, last[2]),
                         take(tile.pos_weight, last[3]),
                         take(tile.alpha, last[4]),
                         take(tile.upstream, last[5]),
                         last[6],
                         last[7],
                         tile.probability ? last[8] : nullptr,
                         indexed};
      loops.any(tail, lanes, grad_scale, params);
      for (int64_t i = 0; i < rest; ++i) {
        sum += last[6][i];
        if (tile.value) tile.value[whole + i] = last[6][i];
        if (tile.grad) tile.grad[whole + i] = last[7][i];
        if (tile.probability) tile.probability[whole + i] = last[8][i];
      }
    }
    if (tile.value == buffer[6]) unstage(a, at, a.value, n, tile.value);
    if (tile.grad == buffer[7]) unstage(a, at, a.grad, n, tile.grad);
    if (tile.probability == buffer[8]) unstage(a, at, a.probability, n, tile.probability);
    if (indexed) index_tile.clear(negative);
  }
  return sum;
}

// Loss64 is the formula for double, Negative (void: none) that of a target of 0.
template <class Loss, class Loss64, class Negative>
static double elementwise_loss(const ElementwiseArgs& a, int64_t begin, int64_t end) {
  const bool want_value = a.value.data || a.want_sum;
  const auto loop_of = [&](auto type, auto loss) -> TileLoop<decltype(type)> {
    using T = decltype(type);
    using L = decltype(loss);
    const auto of = [&](auto precision) -> TileLoop<T> {
      constexpr bool coarse = decltype(precision)::value;
      if (!a.grad.data) return tile_loop<L, true, false, coarse, T>;
      return want_value ? tile_loop<L, true, true, coarse, T> : tile_loop<L, false, true, coarse, T>;
    };
    if constexpr (sizeof(T) == 4 && (__is_same(L, BceWithLogits) || __is_same(L, BceWithLogits::Negative)))
      if (a.input.dtype == DType::bf16 && a.value_dtype == DType::bf16)  // all that comes out is rounded to 8 bits
        return of(std::true_type{});
    return of(std::false_type{});
  };
  const auto as = [&](auto type, auto loss) {
    TileLoops<decltype(type)> loops{loop_of(type, loss), nullptr};
    if constexpr (!__is_same(Negative, void))
      if (a.index.code) loops.negative = loop_of(type, Negative{});
    return elementwise_range(a, begin, end, loops);
  };
  return a.input.dtype == DType::f64 ? as(double{}, Loss64{}) : as(float{}, Loss{});
}

// The table of element-wise losses: one line a formula.
static double elementwise(const ElementwiseArgs& a, int64_t begin, int64_t end) {
  const auto loss = [&](auto formula) {
    using Loss = decltype(formula);
    return elementwise_loss<Loss, Loss, typename Loss::Negative>(a, begin, end);
  };
  const auto loss32 = [&](auto formula, auto formula64) {  // in double, not worth its code once more
    using Loss = decltype(formula);
    return elementwise_loss<Loss, decltype(formula64), typename Loss::Negative>(a, begin, end);
  };
  const Focusing focusing = focusing_of(a.gamma);
  switch (a.loss) {
    case Elementwise::bce_with_logits: return loss(BceWithLogits{});
    case Elementwise::bce: return elementwise_loss<Bce, Bce, void>(a, begin, end);
    case Elementwise::quality_focal:
      switch (focusing) {
        case Focusing::zero: return loss(BceWithLogits{});
        case Focusing::below_one: return loss(QualityFocal<Focusing::below_one>{});
        case Focusing::two: return loss32(QualityFocal<Focusing::two>{}, QualityFocal<Focusing::above_one>{});
        default: return loss(QualityFocal<Focusing::above_one>{});
      }
    case Elementwise::varifocal:
      switch (focusing) {
        case Focusing::zero: return loss(Varifocal<Focusing::zero>{});
        case Focusing::below_one: return loss(Varifocal<Focusing::below_one>{});
        case Focusing::two: return loss32(Varifocal<Focusing::two>{}, Varifocal<Focusing::above_one>{});
        default: return loss(Varifocal<Focusing::above_one>{});
      }
    case Elementwise::sigmoid_focal: break;
  }
  using AnyFocal = SigmoidFocal<Focusing::above_one>;
  switch (focusing) {
    case Focusing::zero: return loss(SigmoidFocal<Focusing::zero>{});
    case Focusing::below_one: return loss(SigmoidFocal<Focusing::below_one>{});
    case Focusing::one: return loss32(SigmoidFocal<Focusing::one>{}, AnyFocal{});
    case Focusing::three_halves: return loss32(SigmoidFocal<Focusing::three_halves>{}, AnyFocal{});
    case Focusing::two: return loss32(SigmoidFocal<Focusing::two>{}, AnyFocal{});
    case Focusing::above_one: break;
  }
  return loss(AnyFocal{});
}

// Turns labels into codes, [begin, end) of them. Returns the number of anchors not ignored; `invalid` is one that has
// no such class, or -1.
static int64_t encode_labels(const LabelArgs& a, int64_t begin, int64_t end, int64_t* invalid) {
  typedef int32_t Codes __attribute__((vector_size(FUSED_LOSSES_VECTOR_BYTES / 2)));
  constexpr int lanes = Lanes<vl>::count;
  vl ignored{}, wrong{};  // a true comparison is -1
  for (int64_t i = begin; i < end; i += lanes) {
    const int64_t n = end - i < lanes ? end - i : lanes;
    vl y = vl{} + a.ignore_index;
    if (n == lanes)
      __builtin_memcpy(&y, a.label + i, sizeof y);
    else
      for (int64_t k = 0; k < n; ++k) y[k] = a.label[i + k];
    const vl skip = y == a.ignore_index, background = (y == a.background) | (y == a.classes);
    ignored += skip;
    wrong |= ((y < 0) | (y >= a.classes)) & ~skip & ~background;
    const Codes code = __builtin_convertvector(skip         ? vl{} + int64_t{kIgnored}
                                               : background ? vl{} + int64_t{kBackground}
                                                            : y,
                                               Codes);
    if (n == lanes)
      __builtin_memcpy(a.code + i, &code, sizeof code);
    else
      for (int64_t k = 0; k < n; ++k) a.code[i + k] = code[k];
  }
  int64_t count = (end - begin + lanes - 1) / lanes * lanes;
  bool any_wrong = false;
  for (int i = 0; i < lanes; ++i) {
    count += ignored[i];
    any_wrong |= wrong[i] != 0;
  }
  for (int64_t i = begin; any_wrong; ++i) {
    const int64_t y = a.label[i];
    if (y == a.ignore_index || y == a.background || (y >= 0 && y <= a.classes)) continue;
    *invalid = i;
    break;
  }
  return count;
}

template <class T>
static bool find_outside_unit_as(const ElementwiseArgs& a, const Operand& operand, int64_t count, double* value) {
  T buffer[kTile];
  for (int64_t start = 0; start < count; start += kTile) {
    const int64_t n = count - start < kTile ? count - start : kTile;
    const T* x = stage(a, Position(a, start), operand, n, buffer);
    for (int64_t i = 0; i < n; ++i) {
      *value = x[i];
      if (!(x[i] >= 0 && x[i] <= 1)) return true;
    }
  }
  return false;
}

static bool find_outside_unit(const ElementwiseArgs& a, const Operand& operand, int64_t count, double* value) {
  return a.input.dtype == DType::f64 ? find_outside_unit_as<double>(a, operand, count, value)
                                     : find_outside_unit_as<float>(a, operand, count, value);
}
