// One loop for every element-wise loss. Included inside each level's namespace.
//
// The elements are taken in tiles that stay in the L1 cache. An operand that lies in memory as the loop wants
// it (compute type, contiguous) is used where it is; any other (bf16, fp16, strided, broadcast) is staged into
// a tile of the compute type first, and a gradient that must go elsewhere is written out after. So the loop
// itself knows neither strides nor storage types. Memory traffic: each operand in once, the gradient out once.

constexpr int kTile = 1024;

template <class T>
struct ElementwiseParams {
  T alpha_positive, alpha_negative, gamma;
  double gamma_double, gamma_minus_one;
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

// Calls run(pointer offset, first tile element, count) for each innermost run of the tile.
template <class Run>
FL_FN void for_each_run(const ElementwiseArgs& a, const Position& at, const Operand& operand, int64_t n, Run run) {
  int64_t index[kMaxDims], offset = 0;
  for (int d = 0; d < a.ndim; ++d) {
    index[d] = at.index[d];
    offset += index[d] * operand.stride[d];
  }
  const int last = a.ndim - 1;
  for (int64_t done = 0; done < n;) {
    const int64_t left = a.size[last] - index[last], count = left < n - done ? left : n - done;
    run(offset, done, count);
    done += count;
    offset += count * operand.stride[last];
    index[last] += count;
    for (int d = last; d > 0 && index[d] == a.size[d]; --d) {
      offset += operand.stride[d - 1] - index[d] * operand.stride[d];
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
  for_each_run(a, at, operand, n, [&](int64_t offset, int64_t first, int64_t count) {
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
  for_each_run(a, at, operand, n, [&](int64_t offset, int64_t first, int64_t count) {
    unstage_run(operand.dtype, operand.data, offset, stride, count, tile + first);
  });
}

// The operands of one tile, in the compute type; a null pointer is an absent operand.
template <class T>
struct Tile {
  const T *input, *target, *weight, *pos_weight, *upstream;
  T *value, *grad;
};

// n elements, n a multiple of the lanes. Returns the sum of the values.
template <class Loss, bool want_value, bool want_grad, class T>
FL_CALL double tile_loop(const Tile<T>& operands, int64_t n, T grad_scale, const ElementwiseParams<T>& params) {
  using V = typename VectorOf<T>::V;
  const Tile<T> tile = operands;  // a copy: what the loop stores cannot change it
  constexpr int lanes = Lanes<V>::count;
  vd total{};
  V partial{};
  int pending = 0;
  for (int64_t i = 0; i < n; i += lanes) {
    const V pos_weight = tile.pos_weight ? load(tile.pos_weight + i) : broadcast<V>(1);
    ValueGrad<V> r = Loss::apply(load(tile.input + i), load(tile.target + i), pos_weight, params);
    if (tile.weight) {
      const V weight = load(tile.weight + i);
      r.value *= weight;
      r.grad *= weight;
    }
    if constexpr (want_grad) {
      r.grad *= grad_scale;
      if (tile.upstream) r.grad *= load(tile.upstream + i);
      store(tile.grad + i, r.grad);
    }
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
static double elementwise_range(const ElementwiseArgs& a, int64_t begin, int64_t end, TileLoop<T> loop) {
  constexpr int lanes = Lanes<typename VectorOf<T>::V>::count;
  const ElementwiseParams<T> params{static_cast<T>(a.alpha_positive), static_cast<T>(a.alpha_negative),
                                    static_cast<T>(a.gamma), a.gamma, a.gamma - 1};
  const T grad_scale = static_cast<T>(a.grad_scale);
  alignas(64) T buffer[7][kTile];
  double sum = 0;
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t n = end - start < kTile ? end - start : kTile;
    const Position at(a, start);
    const Tile<T> tile{stage(a, at, a.input, n, buffer[0]),    stage(a, at, a.target, n, buffer[1]),
                       stage(a, at, a.weight, n, buffer[2]),   stage(a, at, a.pos_weight, n, buffer[3]),
                       stage(a, at, a.upstream, n, buffer[4]), destination(at, a.value, buffer[5]),
                       destination(at, a.grad, buffer[6])};
    const int64_t whole = n / lanes * lanes, rest = n - whole;
    sum += loop(tile, whole, grad_scale, params);
    if (rest) {
      // The last few elements go through a vector of their own: nothing is read or written past the end.
      T last[7][lanes] = {};
      const auto take = [&](const T* from, T* to) -> const T* {
        if (!from) return nullptr;
        for (int64_t i = 0; i < rest; ++i) to[i] = from[whole + i];
        return to;
      };
      const Tile<T> tail{take(tile.input, last[0]),
                         take(tile.target, last[1]),
                         take(tile.weight, last[2]),
                         take(tile.pos_weight, last[3]),
                         take(tile.upstream, last[4]),
                         last[5],
                         last[6]};
      loop(tail, lanes, grad_scale, params);
      for (int64_t i = 0; i < rest; ++i) {
        sum += last[5][i];
        if (tile.value) tile.value[whole + i] = last[5][i];
        if (tile.grad) tile.grad[whole + i] = last[6][i];
      }
    }
    if (tile.value == buffer[5]) unstage(a, at, a.value, n, tile.value);
    if (tile.grad == buffer[6]) unstage(a, at, a.grad, n, tile.grad);
  }
  return sum;
}

// Loss64 is the formula for double.
template <class Loss, class Loss64 = Loss>
static double elementwise_loss(const ElementwiseArgs& a, int64_t begin, int64_t end) {
  const bool want_value = a.value.data || a.want_sum;
  const auto as = [&](auto type, auto loss) {
    using T = decltype(type);
    using L = decltype(loss);
    return elementwise_range<T>(a, begin, end,
                                !a.grad.data ? tile_loop<L, true, false, T>
                                : want_value ? tile_loop<L, true, true, T>
                                             : tile_loop<L, false, true, T>);
  };
  return a.input.dtype == DType::f64 ? as(double{}, Loss64{}) : as(float{}, Loss{});
}

// The table of element-wise losses: one line a formula.
static double elementwise(const ElementwiseArgs& a, int64_t begin, int64_t end) {
  switch (a.loss) {
    case Elementwise::bce_with_logits: return elementwise_loss<BceWithLogits>(a, begin, end);
    case Elementwise::bce: return elementwise_loss<Bce>(a, begin, end);
    case Elementwise::sigmoid_focal: break;
  }
  using AnyFocal = SigmoidFocal<Focusing::above_one>;  // in double, not worth its code six times over
  switch (focusing_of(a.gamma)) {
    case Focusing::zero: return elementwise_loss<SigmoidFocal<Focusing::zero>>(a, begin, end);
    case Focusing::below_one: return elementwise_loss<SigmoidFocal<Focusing::below_one>>(a, begin, end);
    case Focusing::one: return elementwise_loss<SigmoidFocal<Focusing::one>, AnyFocal>(a, begin, end);
    case Focusing::three_halves: return elementwise_loss<SigmoidFocal<Focusing::three_halves>, AnyFocal>(a, begin, end);
    case Focusing::two: return elementwise_loss<SigmoidFocal<Focusing::two>, AnyFocal>(a, begin, end);
    case Focusing::above_one: break;
  }
  return elementwise_loss<AnyFocal>(a, begin, end);
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
