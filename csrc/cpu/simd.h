// Vectors of one instruction-set level, by the compiler's own vector types: the same source is SSE2, AVX2,
// AVX-512 or NEON. Included inside each level's namespace (so no include guard, and no includes of its own):
// nothing compiled here can be merged by the linker with another level's code.

#define FL_INLINE inline __attribute__((always_inline))
#define FL_FN static FL_INLINE
// For what a loop calls rarely: inlined everywhere, these would be most of the code and of the compile time.
#define FL_CALL static __attribute__((noinline))

typedef float vf __attribute__((vector_size(FUSED_LOSSES_VECTOR_BYTES)));
typedef double vd __attribute__((vector_size(FUSED_LOSSES_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(FUSED_LOSSES_VECTOR_BYTES)));
typedef int64_t vl __attribute__((vector_size(FUSED_LOSSES_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(FUSED_LOSSES_VECTOR_BYTES)));
typedef float half_vf __attribute__((vector_size(FUSED_LOSSES_VECTOR_BYTES / 2)));
typedef int32_t half_vi __attribute__((vector_size(FUSED_LOSSES_VECTOR_BYTES / 2)));
typedef uint16_t vh __attribute__((vector_size(FUSED_LOSSES_VECTOR_BYTES / 2)));

template <class V>
struct Lanes;
template <>
struct Lanes<vf> {
  using Scalar = float;
  using Int = vi;
  static constexpr int count = FUSED_LOSSES_VECTOR_BYTES / 4;
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
};
template <>
struct Lanes<vd> {
  using Scalar = double;
  using Int = vl;
  static constexpr int count = FUSED_LOSSES_VECTOR_BYTES / 8;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
};
template <>
struct Lanes<vi> {
  using Scalar = int32_t;
  static constexpr int count = FUSED_LOSSES_VECTOR_BYTES / 4;
};
template <>
struct Lanes<vl> {
  using Scalar = int64_t;
  static constexpr int count = FUSED_LOSSES_VECTOR_BYTES / 8;
};
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using V = vf;
};
template <>
struct VectorOf<double> {
  using V = vd;
};

// Two vectors as one: every operation on the first, then on the second. A formula is a chain of operations, and where a
// processor looks ahead few of them it waits for the chain; two of them by turns wait half as often.
template <class V>
struct Pair {
  using Scalar = typename Lanes<V>::Scalar;
  using Mask = Pair<decltype(V{} == V{})>;
  V first, second;

#define FL_PAIR_OPERATOR(op, Result)                                                                         \
  friend FL_INLINE Result operator op(Pair a, Pair b) { return {a.first op b.first, a.second op b.second}; } \
  friend FL_INLINE Result operator op(Pair a, V b) { return {a.first op b, a.second op b}; }                 \
  friend FL_INLINE Result operator op(Pair a, Scalar b) { return {a.first op b, a.second op b}; }            \
  friend FL_INLINE Result operator op(Scalar a, Pair b) { return {a op b.first, a op b.second}; }
  FL_PAIR_OPERATOR(+, Pair)
  FL_PAIR_OPERATOR(-, Pair)
  FL_PAIR_OPERATOR(*, Pair)
  FL_PAIR_OPERATOR(/, Pair)
  FL_PAIR_OPERATOR(&, Pair)
  FL_PAIR_OPERATOR(|, Pair)
  FL_PAIR_OPERATOR(<<, Pair)
  FL_PAIR_OPERATOR(>>, Pair)
  FL_PAIR_OPERATOR(==, Mask)
  FL_PAIR_OPERATOR(<, Mask)
  FL_PAIR_OPERATOR(<=, Mask)
  FL_PAIR_OPERATOR(>, Mask)
  FL_PAIR_OPERATOR(>=, Mask)
#undef FL_PAIR_OPERATOR
  FL_INLINE Pair operator-() const { return {-first, -second}; }
  FL_INLINE Pair operator~() const { return {~first, ~second}; }
  template <class B>
  FL_INLINE Pair& operator+=(B b) {
    return *this = *this + b;
  }
  template <class B>
  FL_INLINE Pair& operator-=(B b) {
    return *this = *this - b;
  }
  template <class B>
  FL_INLINE Pair& operator*=(B b) {
    return *this = *this * b;
  }
};
template <class V>
constexpr bool is_pair = false;
template <class V>
constexpr bool is_pair<Pair<V>> = true;
template <class V>
struct Lanes<Pair<V>> {
  using Scalar = typename Lanes<V>::Scalar;
  using Int = typename Pair<V>::Mask;
  static constexpr int count = 2 * Lanes<V>::count;
  static constexpr int mantissa_bits = Lanes<V>::mantissa_bits, exponent_bias = Lanes<V>::exponent_bias;
};
// What a long formula takes at a time: two chains with AVX2, where sixteen registers hold no more of them. AVX-512
// gains too little for what it costs.
template <class T>
struct BatchOf {
  using V = typename VectorOf<T>::V;
};
#if FUSED_LOSSES_VECTOR_BYTES == 32
template <>
struct BatchOf<float> {
  using V = Pair<vf>;
};
#endif

template <class V>
FL_FN V broadcast(typename Lanes<V>::Scalar value) {
  return value - V{};  // x - 0 is x for every x, -0 and NaN included
}
template <class V>
FL_FN V select(typename Lanes<V>::Int mask, V yes, V no) {
  if constexpr (is_pair<V>)
    return {select(mask.first, yes.first, no.first), select(mask.second, yes.second, no.second)};
  else
    return mask ? yes : no;
}
template <class To, class From>
FL_FN To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  if constexpr (is_pair<From>) {
    return {bits<decltype(To::first)>(from.first), bits<decltype(To::second)>(from.second)};
  } else {
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
  }
}
template <class V>
FL_FN V magnitude(V x) {
  using I = typename Lanes<V>::Int;
  return bits<V>(bits<I>(x) & ~bits<I>(broadcast<V>(-0.0)));
}
template <class V>
FL_FN V to_number(typename Lanes<V>::Int i) {
  if constexpr (is_pair<V>)
    return {to_number<decltype(V::first)>(i.first), to_number<decltype(V::second)>(i.second)};
  else
    return __builtin_convertvector(i, V);
}
// n with 2^n <= x < 2^(n+1), for a normal x >= 0; -bias for 0.
template <class V>
FL_FN V exponent_of(V x) {
  return to_number<V>((bits<typename Lanes<V>::Int>(x) >> Lanes<V>::mantissa_bits) - Lanes<V>::exponent_bias);
}
template <class V>
FL_FN typename Lanes<V>::Int lane_numbers() {
  using I = typename Lanes<V>::Int;
  struct Numbers {
    decltype(I{}[0] + 0) lane[Lanes<V>::count];
  };
  static constexpr Numbers numbers = [] {
    Numbers n{};
    for (int i = 0; i < Lanes<V>::count; ++i) n.lane[i] = i;
    return n;
  }();
  return bits<I>(numbers);
}

// What compilers do not find by themselves: the greater or the smaller of two numbers, where the instruction's second
// operand is the one to stay if either is NaN, and square roots.
// _mm512_maskz_*: GCC warns of an uninitialised variable inside the unmasked forms.
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 64
#define FL_FLOAT_OP(op, ...) bits<vf>(_mm512_maskz_##op##_ps(0xffff, __VA_ARGS__))
#define FL_DOUBLE_OP(op, ...) bits<vd>(_mm512_maskz_##op##_pd(0xff, __VA_ARGS__))
typedef __m512 native_vf;
typedef __m512d native_vd;
#elif FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 32
#define FL_FLOAT_OP(op, ...) bits<vf>(_mm256_##op##_ps(__VA_ARGS__))
#define FL_DOUBLE_OP(op, ...) bits<vd>(_mm256_##op##_pd(__VA_ARGS__))
typedef __m256 native_vf;
typedef __m256d native_vd;
#elif FUSED_LOSSES_X86
#define FL_FLOAT_OP(op, ...) bits<vf>(_mm_##op##_ps(__VA_ARGS__))
#define FL_DOUBLE_OP(op, ...) bits<vd>(_mm_##op##_pd(__VA_ARGS__))
typedef __m128 native_vf;
typedef __m128d native_vd;
#endif
#ifdef FL_FLOAT_OP
FL_FN vf at_least(vf a, vf low) { return FL_FLOAT_OP(max, bits<native_vf>(low), bits<native_vf>(a)); }
FL_FN vd at_least(vd a, vd low) { return FL_DOUBLE_OP(max, bits<native_vd>(low), bits<native_vd>(a)); }
FL_FN vf at_most(vf a, vf high) { return FL_FLOAT_OP(min, bits<native_vf>(high), bits<native_vf>(a)); }
FL_FN vd at_most(vd a, vd high) { return FL_DOUBLE_OP(min, bits<native_vd>(high), bits<native_vd>(a)); }
FL_FN vf square_root(vf x) { return FL_FLOAT_OP(sqrt, bits<native_vf>(x)); }
FL_FN vd square_root(vd x) { return FL_DOUBLE_OP(sqrt, bits<native_vd>(x)); }
#else
template <class V>
FL_FN V at_least(V a, V low) {
  return a < low ? low : a;
}
template <class V>
FL_FN V at_most(V a, V high) {
  return a > high ? high : a;
}
FL_FN vf square_root(vf x) {
  for (int i = 0; i < Lanes<vf>::count; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
FL_FN vd square_root(vd x) {
  for (int i = 0; i < Lanes<vd>::count; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#endif
template <class V>
FL_FN Pair<V> at_least(Pair<V> a, Pair<V> low) {
  return {at_least(a.first, low.first), at_least(a.second, low.second)};
}
template <class V>
FL_FN Pair<V> at_most(Pair<V> a, Pair<V> high) {
  return {at_most(a.first, high.first), at_most(a.second, high.second)};
}
template <class V>
FL_FN Pair<V> square_root(Pair<V> x) {
  return {square_root(x.first), square_root(x.second)};
}
#if defined(FL_FLOAT_OP) && FUSED_LOSSES_VECTOR_BYTES >= 32
#define FL_HAS_FMA 1
// a b - c, rounded once.
FL_FN vf multiply_subtract(vf a, vf b, vf c) {
  return FL_FLOAT_OP(fmsub, bits<native_vf>(a), bits<native_vf>(b), bits<native_vf>(c));
}
template <class V>
FL_FN Pair<V> multiply_subtract(Pair<V> a, Pair<V> b, Pair<V> c) {
  return {multiply_subtract(a.first, b.first, c.first), multiply_subtract(a.second, b.second, c.second)};
}
#else
#define FL_HAS_FMA 0
#endif

// Storage types. bf16 and fp16 are two bytes in memory and a float in a register.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
template <class S>
struct ComputeOf {
  using T = float;
};
template <>
struct ComputeOf<double> {
  using T = double;
};

#if FUSED_LOSSES_VECTOR_BYTES == 64
#define FL_LOW_LANES 0, 1, 2, 3, 4, 5, 6, 7
#define FL_HIGH_LANES 8, 9, 10, 11, 12, 13, 14, 15
#elif FUSED_LOSSES_VECTOR_BYTES == 32
#define FL_LOW_LANES 0, 1, 2, 3
#define FL_HIGH_LANES 4, 5, 6, 7
#else
#define FL_LOW_LANES 0, 1
#define FL_HIGH_LANES 2, 3
#endif
#if defined(__clang__) || __GNUC__ >= 12  // stays in registers; GCC 11 has to go through memory
FL_FN half_vf low_half(vf v) { return __builtin_shufflevector(v, v, FL_LOW_LANES); }
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 32  // GCC takes a permutation, which is eight on Zen 1
FL_FN half_vf high_half(vf v) { return bits<half_vf>(_mm256_extractf128_ps(bits<__m256>(v), 1)); }
#else
FL_FN half_vf high_half(vf v) { return __builtin_shufflevector(v, v, FL_HIGH_LANES); }
#endif
FL_FN vf join(half_vf low, half_vf high) { return __builtin_shufflevector(low, high, FL_LOW_LANES, FL_HIGH_LANES); }
#else
FL_FN half_vf low_half(vf v) {
  half_vf h;
  __builtin_memcpy(&h, &v, sizeof h);
  return h;
}
FL_FN half_vf high_half(vf v) {
  half_vf h;
  __builtin_memcpy(&h, reinterpret_cast<const char*>(&v) + sizeof h, sizeof h);
  return h;
}
FL_FN vf join(half_vf low, half_vf high) {
  struct Halves {
    half_vf low, high;
  };
  return bits<vf>(Halves{low, high});
}
#endif

#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 64  // GCC takes the halves apart
FL_FN vu widen_bits(vh raw) { return bits<vu>(_mm512_maskz_cvtepu16_epi32(0xffff, bits<__m256i>(raw))); }
#elif FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 32
FL_FN vu widen_bits(vh raw) { return bits<vu>(_mm256_cvtepu16_epi32(bits<__m128i>(raw))); }
#else
FL_FN vu widen_bits(vh raw) { return __builtin_convertvector(raw, vu); }
#endif
FL_FN vf widen(vh raw, bf16) { return bits<vf>(widen_bits(raw) << 16); }
FL_FN vh narrow(vf x, bf16) {
  const vu u = bits<vu>(x);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // nearest, ties to even
  const vu nan = vu{} + 0x7fc0u;
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 64  // GCC moves a mask into a vector and back, and permutes
  const __mmask16 is_nan = _mm512_cmp_ps_mask(bits<__m512>(x), bits<__m512>(x), _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_mov_epi32(bits<__m512i>(rounded), is_nan, bits<__m512i>(nan));
  return bits<vh>(_mm512_maskz_cvtepi32_epi16(0xffff, all));
#else
  const vu all = bits<vu>(x == x) ? rounded : nan;
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 32
  const vf raw = bits<vf>(all);
  return bits<vh>(_mm_packus_epi32(bits<__m128i>(low_half(raw)), bits<__m128i>(high_half(raw))));
#else
  return __builtin_convertvector(all, vh);
#endif
#endif
}
FL_FN vf widen(vh raw, f16) {
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 64
  return bits<vf>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(raw)));
#elif FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 32
  return bits<vf>(_mm256_cvtph_ps(bits<__m128i>(raw)));
#else
  // Exponents are rebased by an integer addition; a subnormal is made normal by a float subtraction, which
  // is exact and works where the thread flushes subnormals.
  const vu h = __builtin_convertvector(raw, vu);
  const vu shifted = (h & 0x7fffu) << 13, exponent = shifted & (0x7c00u << 13);
  vu u = shifted + ((127u - 15u) << 23);
  u = exponent == (0x7c00u << 13) ? u + ((128u - 16u) << 23) : u;
  const vf subnormal = bits<vf>(u + (1u << 23)) - bits<vf>(vu{} + (113u << 23));
  u = exponent == 0u ? bits<vu>(subnormal) : u;
  return bits<vf>(u | (h & 0x8000u) << 16);
#endif
}
FL_FN vh narrow(vf x, f16) {
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 64
  return bits<vh>(_mm512_maskz_cvtps_ph(0xffff, bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 32
  return bits<vh>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const vu all = bits<vu>(x), sign = all & 0x80000000u, u = all ^ sign;
  const vu overflow = bits<vu>(x == x) ? vu{} + 0x7c00u : vu{} + 0x7e00u;
  // Adding 0.5 lines the mantissa of a value below 2^-14 up with fp16's subnormals and rounds it.
  const vu subnormal = bits<vu>(bits<vf>(u) + 0.5f) - bits<vu>(vf{} + 0.5f);
  const vu normal = (u - ((127u - 15u) << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  vu r = u < (113u << 23) ? subnormal : normal;
  r = u >= ((127u + 16u) << 23) ? overflow : r;
  return __builtin_convertvector(r | sign >> 16, vh);
#endif
}

// Loads and stores need no alignment.
FL_FN vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FL_FN vd load(const double* p) {
  vd v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
FL_FN vf load(const S* p) {
  vh raw;
  __builtin_memcpy(&raw, p, sizeof raw);
  return widen(raw, S{});
}
FL_FN void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
FL_FN void store(double* p, vd v) { __builtin_memcpy(p, &v, sizeof v); }
template <class S>
FL_FN void store(S* p, vf v) {
  const vh raw = narrow(v, S{});
  __builtin_memcpy(p, &raw, sizeof raw);
}
template <class V, class S>
FL_FN V load_as(const S* p) {
  if constexpr (is_pair<V>)
    return {load_as<decltype(V::first)>(p), load_as<decltype(V::second)>(p + Lanes<V>::count / 2)};
  else
    return load(p);
}
template <class S, class V>
FL_FN void store(S* p, Pair<V> v) {
  store(p, v.first);
  store(p + Lanes<V>::count, v.second);
}
// Two vectors' worth of a narrow type at once, in whatever order is cheapest; store_two undoes load_two's. A NaN must
// hold nothing in the half of its bits that bf16 drops, as those do that come of widened ones and of none.
FL_FN Pair<vf> load_two(const bf16* p) {
  vu raw;
  __builtin_memcpy(&raw, p, sizeof raw);
  return {bits<vf>(raw << 16), bits<vf>(raw & 0xffff0000u)};
}
FL_FN void store_two(bf16* p, Pair<vf> two) {
  const auto rounded = [](vf x) { return bits<vu>(x) + 0x7fffu + ((bits<vu>(x) >> 16) & 1u); };
  const vu raw = (rounded(two.first) >> 16) | (rounded(two.second) & 0xffff0000u);
  __builtin_memcpy(p, &raw, sizeof raw);
}
FL_FN Pair<vf> load_two(const f16* p) { return {load(p), load(p + Lanes<vf>::count)}; }
FL_FN void store_two(f16* p, Pair<vf> two) { store(p, two); }
FL_FN float load_one(const float* p) { return *p; }
FL_FN double load_one(const double* p) { return *p; }
template <class S>
FL_FN float load_one(const S* p) {
  return widen(vh{} + p->bits, S{})[0];
}
FL_FN void store_one(float* p, float x) { *p = x; }
FL_FN void store_one(double* p, double x) { *p = x; }
template <class S>
FL_FN void store_one(S* p, float x) {
  p->bits = narrow(vf{} + x, S{})[0];
}
// Indices of the lanes' width, `instead` for those that are `odd`.
FL_FN vl load_indices(const int64_t* p, int64_t odd, int64_t instead, vl) {
  vl y;
  __builtin_memcpy(&y, p, sizeof y);
  return y == odd ? vl{} + instead : y;
}
FL_FN half_vf low_words(vl y) {
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 32
  const vf words = bits<vf>(y);
  return bits<half_vf>(_mm_shuffle_ps(bits<__m128>(low_half(words)), bits<__m128>(high_half(words)), 0x88));
#else
  return bits<half_vf>(__builtin_convertvector(y, half_vi));
#endif
}
FL_FN vi load_indices(const int64_t* p, int64_t odd, int64_t instead, vi) {
  return bits<vi>(join(low_words(load_indices(p, odd, instead, vl{})),
                       low_words(load_indices(p + Lanes<vl>::count, odd, instead, vl{}))));
}
// The first n < lanes elements; the other lanes read `fill`, and are neither touched in memory nor written.
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 64
FL_FN vf load_lanes(const float* p, int64_t n) { return bits<vf>(_mm512_maskz_loadu_ps((1u << n) - 1, p)); }
FL_FN vd load_lanes(const double* p, int64_t n) { return bits<vd>(_mm512_maskz_loadu_pd((1u << n) - 1, p)); }
template <class S>
FL_FN vf load_lanes(const S* p, int64_t n) {
  return widen(bits<vh>(_mm256_maskz_loadu_epi16((1u << n) - 1, p)), S{});
}
FL_FN void store_part(float* p, int64_t n, vf v) { _mm512_mask_storeu_ps(p, (1u << n) - 1, bits<__m512>(v)); }
FL_FN void store_part(double* p, int64_t n, vd v) { _mm512_mask_storeu_pd(p, (1u << n) - 1, bits<__m512d>(v)); }
template <class S>
FL_FN void store_part(S* p, int64_t n, vf v) {
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, bits<__m256i>(narrow(v, S{})));
}
#else
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 32
FL_FN vf load_lanes(const float* p, int64_t n) {
  return bits<vf>(_mm256_maskload_ps(p, bits<__m256i>(lane_numbers<vf>() < vi{} + static_cast<int32_t>(n))));
}
FL_FN vd load_lanes(const double* p, int64_t n) {
  return bits<vd>(_mm256_maskload_pd(p, bits<__m256i>(lane_numbers<vd>() < vl{} + n)));
}
#endif
template <class S>
FL_CALL auto load_lanes(const S* p, int64_t n) {
  S raw[FUSED_LOSSES_VECTOR_BYTES / sizeof(typename ComputeOf<S>::T)] = {};
  for (int64_t i = 0; i < n; ++i) raw[i] = p[i];
  return load(raw);
}
template <class V, class S>
FL_CALL void store_part(S* p, int64_t n, V v) {
  S raw[Lanes<V>::count];
  store(raw, v);
  for (int64_t i = 0; i < n; ++i) p[i] = raw[i];
}
#endif
template <class V, class S>
FL_FN V load_part(const S* p, int64_t n, typename Lanes<V>::Scalar fill) {
  using I = typename Lanes<V>::Int;
  using Lane = decltype(I{}[0] + 0);
  return select<V>(lane_numbers<V>() < I{} + static_cast<Lane>(n), load_lanes(p, n), broadcast<V>(fill));
}

FL_FN vf join(vd low, vd high) {
  return join(__builtin_convertvector(low, half_vf), __builtin_convertvector(high, half_vf));
}

#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 64
FL_FN vd to_double(half_vf v) { return bits<vd>(_mm512_maskz_cvtps_pd(0xff, bits<__m256>(v))); }  // GCC takes five
#elif FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 32
FL_FN vd to_double(half_vf v) { return bits<vd>(_mm256_cvtps_pd(bits<__m128>(v))); }  // GCC takes as many
#else
FL_FN vd to_double(half_vf v) { return __builtin_convertvector(v, vd); }
#endif

// A vector's numbers in double, for what must be rounded once only.
struct Wide {
  vd low, high;
  friend FL_INLINE Wide operator*(Wide a, Wide b) { return {a.low * b.low, a.high * b.high}; }
  friend FL_INLINE Wide operator*(Wide a, double b) { return {a.low * b, a.high * b}; }
  friend FL_INLINE Wide operator/(Wide a, Wide b) { return {a.low / b.low, a.high / b.high}; }
  friend FL_INLINE Wide operator+(Wide a, Wide b) { return {a.low + b.low, a.high + b.high}; }
  friend FL_INLINE Wide operator-(Wide a, Wide b) { return {a.low - b.low, a.high - b.high}; }
};
FL_FN Wide wide(vf v) { return {to_double(low_half(v)), to_double(high_half(v))}; }
FL_FN vd wide(vd v) { return v; }
FL_FN Wide load_wide(const double* p, vf) { return {load(p), load(p + Lanes<vd>::count)}; }
FL_FN vd load_wide(const double* p, vd) { return load(p); }
FL_FN void store_wide(double* p, Wide w) {
  store(p, w.low);
  store(p + Lanes<vd>::count, w.high);
}
FL_FN void store_wide(double* p, vd w) { store(p, w); }
FL_FN vf round_once(Wide w) { return join(w.low, w.high); }
FL_FN vd round_once(vd w) { return w; }
// Sums are taken in double, so that their error does not grow with the count.
FL_FN vd to_double_sum(vf v) { return to_double(low_half(v)) + to_double(high_half(v)); }
FL_FN vd to_double_sum(vd v) { return v; }
FL_FN vd to_double_sum(Wide w) { return w.low + w.high; }
template <class V>
FL_FN vd to_double_sum(Pair<V> v) {
  return to_double_sum(v.first) + to_double_sum(v.second);
}

// Across the lanes: halves are folded onto each other, log2(lanes) steps.
template <class S, int n>
struct Few {
  typedef S V __attribute__((vector_size(n * sizeof(S))));
};
template <class S, int n, class F>
FL_FN S fold_lanes(typename Few<S, n>::V v, F f) {
  if constexpr (n == 2) {
    return f(v[0], v[1]);
  } else {
    typename Few<S, n / 2>::V halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    return fold_lanes<S, n / 2>(f(halves[0], halves[1]), f);
  }
}
FL_FN double sum_lanes(vd v) {
  return fold_lanes<double, Lanes<vd>::count>(v, [](auto a, auto b) { return a + b; });
}
template <class I>
FL_FN bool any_lane(I mask) {
  return fold_lanes<int64_t, Lanes<vl>::count>(bits<vl>(mask), [](auto a, auto b) { return a | b; }) != 0;
}
template <class V>
FL_FN typename Lanes<V>::Scalar max_lanes(V v) {
  return fold_lanes<typename Lanes<V>::Scalar, Lanes<V>::count>(v, [](auto a, auto b) { return a < b ? b : a; });
}

// A square of vectors, its rows for its columns, by shuffles that take no index: within blocks of 16 bytes, by units of
// one and two elements, then blocks as a whole.
#if defined(__clang__) || __GNUC__ >= 12
// By turns a unit of a and one of b, from the low or the high half of each block.
template <int unit, bool high, class V, size_t... lane>
FL_FN V zip(V a, V b, std::index_sequence<lane...>) {
  constexpr size_t lanes = sizeof...(lane), block = 16 / sizeof(a[0]), start = high ? block / 2 : 0;
  return __builtin_shufflevector(
      a, b,
      (lane / unit % 2 * lanes + lane / block * block + start + lane % block / (2 * unit) * unit + lane % unit)...);
}
// Half of a's blocks, then half of b's: the low or the high half, or every other from the first or the second on.
template <bool every_other, bool high, class V, size_t... lane>
FL_FN V halves(V a, V b, std::index_sequence<lane...>) {
  constexpr size_t lanes = sizeof...(lane), block = 16 / sizeof(a[0]), half = lanes / 2, step = every_other ? 2 : 1;
  constexpr size_t start = high ? (every_other ? 1 : half / block) : 0;
  return __builtin_shufflevector(
      a, b, (lane / half * lanes + (start + lane % half / block * step) * block + lane % block)...);
}
template <class V>
FL_FN void transpose(V (&square)[Lanes<V>::count]) {
  constexpr int lanes = Lanes<V>::count, block = 16 / sizeof(square[0][0]), blocks = lanes / block;
  constexpr auto lane = std::make_index_sequence<lanes>();
  V part[lanes];  // [blocks of rows, columns within a block]
#pragma GCC unroll 16
  for (int r = 0; r < lanes; r += block)
    if constexpr (block == 2) {
      part[r] = zip<1, false>(square[r], square[r + 1], lane);
      part[r + 1] = zip<1, true>(square[r], square[r + 1], lane);
    } else {
      const V low = zip<1, false>(square[r], square[r + 1], lane), high = zip<1, true>(square[r], square[r + 1], lane);
      const V low2 = zip<1, false>(square[r + 2], square[r + 3], lane);
      const V high2 = zip<1, true>(square[r + 2], square[r + 3], lane);
      part[r] = zip<2, false>(low, low2, lane), part[r + 1] = zip<2, true>(low, low2, lane);
      part[r + 2] = zip<2, false>(high, high2, lane), part[r + 3] = zip<2, true>(high, high2, lane);
    }
#pragma GCC unroll 4
  for (int c = 0; c < block; ++c)
    if constexpr (blocks == 1) {
      square[c] = part[c];
    } else if constexpr (blocks == 2) {
      square[c] = halves<false, false>(part[c], part[c + block], lane);
      square[c + block] = halves<false, true>(part[c], part[c + block], lane);
    } else {
      const V &p = part[c], &q = part[c + block], &r = part[c + 2 * block], &s = part[c + 3 * block];
      const V low = halves<false, false>(p, q, lane), low2 = halves<false, false>(r, s, lane);
      const V high = halves<false, true>(p, q, lane), high2 = halves<false, true>(r, s, lane);
      square[c] = halves<true, false>(low, low2, lane), square[c + block] = halves<true, true>(low, low2, lane);
      square[c + 2 * block] = halves<true, false>(high, high2, lane);
      square[c + 3 * block] = halves<true, true>(high, high2, lane);
    }
}
#else
template <class V>
FL_FN void transpose(V (&square)[Lanes<V>::count]) {
  V old[Lanes<V>::count];
  __builtin_memcpy(old, square, sizeof old);
  for (int i = 0; i < Lanes<V>::count; ++i)
    for (int k = 0; k < Lanes<V>::count; ++k) square[i][k] = old[k][i];
}
#endif
