// Between memory as the caller has it (four storage types, any stride) and tiles as the loops want it (the
// compute type, contiguous). Included inside each level's namespace.

template <class S, class T>
FL_CALL void read_run(const S* data, int64_t stride, int64_t n, T* tile) {
  using V = typename VectorOf<T>::V;
  constexpr int lanes = Lanes<V>::count;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + lanes <= n; i += lanes) store(tile + i, load(data + i));
    if (i < n) store_part(tile + i, n - i, load_part<V>(data + i, n - i, 0));
  } else if (stride == 0) {
    const T value = load_part<V>(data, 1, 0)[0];
    for (; i < n; ++i) tile[i] = value;
  } else {
    S packed[lanes] = {};
    for (; i < n; i += lanes) {
      const int64_t m = n - i < lanes ? n - i : lanes;
      for (int64_t k = 0; k < m; ++k) packed[k] = data[(i + k) * stride];
      store_part(tile + i, m, load(packed));
    }
  }
}

template <class S, class T>
FL_CALL void write_run(S* data, int64_t stride, int64_t n, const T* tile) {
  using V = typename VectorOf<T>::V;
  constexpr int lanes = Lanes<V>::count;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + lanes <= n; i += lanes) store(data + i, load(tile + i));
    if (i < n) store_part(data + i, n - i, load_part<V>(tile + i, n - i, 0));
  } else {
    S packed[lanes];
    for (; i < n; i += lanes) {
      const int64_t m = n - i < lanes ? n - i : lanes;
      store(packed, load_part<V>(tile + i, m, 0));
      for (int64_t k = 0; k < m; ++k) data[(i + k) * stride] = packed[k];
    }
  }
}

template <class T>
constexpr DType compute_dtype = __is_same(T, double) ? DType::f64 : DType::f32;

// n elements from data[offset] on. `tile` is filled, or left alone where memory already serves as the tile.
template <class T>
FL_FN const T* stage_run(DType dtype, const void* data, int64_t offset, int64_t stride, int64_t n, T* tile) {
  if (dtype == compute_dtype<T>) {
    const T* from = static_cast<const T*>(data) + offset;
    if (stride == 1) return from;
    read_run(from, stride, n, tile);
  } else if constexpr (__is_same(T, float)) {
    if (dtype == DType::bf16)
      read_run(static_cast<const bf16*>(data) + offset, stride, n, tile);
    else
      read_run(static_cast<const f16*>(data) + offset, stride, n, tile);
  }
  return tile;
}

template <class T>
FL_FN void unstage_run(DType dtype, void* data, int64_t offset, int64_t stride, int64_t n, const T* tile) {
  if (dtype == compute_dtype<T>) {
    T* to = static_cast<T*>(data) + offset;
    if (to != tile) write_run(to, stride, n, tile);
  } else if constexpr (__is_same(T, float)) {
    if (dtype == DType::bf16)
      write_run(static_cast<bf16*>(data) + offset, stride, n, tile);
    else
      write_run(static_cast<f16*>(data) + offset, stride, n, tile);
  }
}

template <class T>
FL_FN T load_scalar(DType dtype, const void* data, int64_t i) {
  T value{};
  return *stage_run(dtype, data, i, 1, 1, &value);
}
template <class T>
FL_FN void store_scalar(DType dtype, void* data, int64_t i, T value) {
  unstage_run(dtype, data, i, 1, 1, &value);
}
