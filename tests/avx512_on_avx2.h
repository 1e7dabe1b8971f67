// The AVX-512 intrinsics of csrc/cpu by AVX2's: tests/test_levels.py compiles level_avx512.cpp with them where the
// processor has none, for everything else in that file is the compiler's own vectors. Loads and stores touch the lanes
// of their mask and no other; the rest of the code uses whole masks, which are not looked at here.
#pragma once
#include <cmath>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
namespace avx512_on_avx2 {

#define ON_AVX2 static inline __attribute__((always_inline))
typedef float F __attribute__((vector_size(64)));
typedef double D __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
template <class Half>
struct Halves {
  Half low, high;
};
using Floats = Halves<__m256>;
using Doubles = Halves<__m256d>;

template <class To, class From>
ON_AVX2 To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// The second operand, if either is NaN.
template <class V>
ON_AVX2 V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
ON_AVX2 V min(V a, V b) {
  return a < b ? a : b;
}
ON_AVX2 F sqrt(F a) {
  const auto h = bits<Floats>(a);
  return bits<F>(Floats{_mm256_sqrt_ps(h.low), _mm256_sqrt_ps(h.high)});
}
ON_AVX2 D sqrt(D a) {
  const auto h = bits<Doubles>(a);
  return bits<D>(Doubles{_mm256_sqrt_pd(h.low), _mm256_sqrt_pd(h.high)});
}
ON_AVX2 F fmsub(F a, F b, F c) {
  const auto x = bits<Floats>(a), y = bits<Floats>(b), z = bits<Floats>(c);
  return bits<F>(Floats{_mm256_fmsub_ps(x.low, y.low, z.low), _mm256_fmsub_ps(x.high, y.high, z.high)});
}
ON_AVX2 F round(F a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const auto h = bits<Floats>(a);
  return bits<F>(Floats{_mm256_round_ps(h.low, nearest), _mm256_round_ps(h.high, nearest)});
}
// x 2^floor(n), rounded once. An infinite n decides whatever x is, a NaN even, but for inf 2^-inf and 0 2^inf.
template <class V>
static __attribute__((noinline)) V scalef(V x, V n) {
  using T = decltype(x[0] + 0);
  const auto one = [](T a, T e) -> T {
    const T infinity = __builtin_inf(), nan = __builtin_nan("");
    if (e != e) return nan;
    if (e == infinity) return a == 0 ? nan : a != a ? infinity : std::copysign(infinity, a);
    if (e == -infinity) return std::isinf(a) ? nan : a != a ? T{0} : std::copysign(T{0}, a);
    return std::ldexp(a, static_cast<int>(std::fmax(-4096, std::fmin(4096, std::floor(e)))));
  };
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) x[i] = one(x[i], n[i]);
  return x;
}
// 1 / x, off by up to 2^-14 of it: the error goes by x.
static __attribute__((noinline)) F rcp14(F x) {
  for (int i = 0; i < 16; ++i) {
    const double error = static_cast<int32_t>(bits<uint32_t>(float{x[i]}) * 2654435761u) * 0x1p-31;
    x[i] = static_cast<float>(1.0 / x[i] * (1 + error * 0x1p-14));
  }
  return x;
}

ON_AVX2 F from_f16(__m256i a) {
  const auto h = bits<Halves<__m128i>>(a);
  return bits<F>(Floats{_mm256_cvtph_ps(h.low), _mm256_cvtph_ps(h.high)});
}
ON_AVX2 __m256i to_f16(F a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
  const auto h = bits<Floats>(a);
  return bits<__m256i>(Halves<__m128i>{_mm256_cvtps_ph(h.low, nearest), _mm256_cvtps_ph(h.high, nearest)});
}
ON_AVX2 D to_double(__m256 a) {
  const auto h = bits<Halves<__m128>>(a);
  return bits<D>(Doubles{_mm256_cvtps_pd(h.low), _mm256_cvtps_pd(h.high)});
}
typedef uint16_t Short __attribute__((vector_size(32)));
ON_AVX2 I widen(__m256i a) { return __builtin_convertvector(bits<Short>(a), I); }
ON_AVX2 __m256i narrow(I a) { return bits<__m256i>(__builtin_convertvector(a, Short)); }
ON_AVX2 __mmask16 is_nan(F a) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (a[i] != a[i]) << i;
  return mask;
}
ON_AVX2 I where(I no, __mmask16 mask, I yes) {
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) no[i] = yes[i];
  return no;
}

template <class V, class T>
ON_AVX2 V load(unsigned mask, const T* p) {
  V v{};
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) v[i] = p[i];
  return v;
}
template <class V, class T>
ON_AVX2 void store(T* p, unsigned mask, V v) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) p[i] = v[i];
}
ON_AVX2 __m256i load_short(unsigned mask, const void* p) {
  return bits<__m256i>(load<Short>(mask, static_cast<const uint16_t*>(p)));
}
ON_AVX2 void store_short(void* p, unsigned mask, __m256i v) { store(static_cast<uint16_t*>(p), mask, bits<Short>(v)); }

}  // namespace avx512_on_avx2
#pragma GCC pop_options

#define _mm512_maskz_max_ps(mask, a, b) avx512_on_avx2::max<avx512_on_avx2::F>(a, b)
#define _mm512_maskz_max_pd(mask, a, b) avx512_on_avx2::max<avx512_on_avx2::D>(a, b)
#define _mm512_maskz_min_ps(mask, a, b) avx512_on_avx2::min<avx512_on_avx2::F>(a, b)
#define _mm512_maskz_min_pd(mask, a, b) avx512_on_avx2::min<avx512_on_avx2::D>(a, b)
#define _mm512_maskz_sqrt_ps(mask, a) avx512_on_avx2::sqrt(a)
#define _mm512_maskz_sqrt_pd(mask, a) avx512_on_avx2::sqrt(a)
#define _mm512_maskz_fmsub_ps(mask, a, b, c) avx512_on_avx2::fmsub(a, b, c)
#define _mm512_maskz_roundscale_ps(mask, a, how) avx512_on_avx2::round(a)
#define _mm512_maskz_scalef_ps(mask, a, n) avx512_on_avx2::scalef<avx512_on_avx2::F>(a, n)
#define _mm512_maskz_scalef_pd(mask, a, n) avx512_on_avx2::scalef<avx512_on_avx2::D>(a, n)
#define _mm512_maskz_rcp14_ps(mask, a) avx512_on_avx2::rcp14(a)
#define _mm512_maskz_cvtph_ps(mask, a) avx512_on_avx2::from_f16(a)
#define _mm512_maskz_cvtps_ph(mask, a, how) avx512_on_avx2::to_f16(a)
#define _mm512_maskz_cvtps_pd(mask, a) avx512_on_avx2::to_double(a)
#define _mm512_maskz_cvtepu16_epi32(mask, a) avx512_on_avx2::widen(a)
#define _mm512_maskz_cvtepi32_epi16(mask, a) avx512_on_avx2::narrow(bits<avx512_on_avx2::I>(a))
#define _mm512_cmp_ps_mask(a, b, unordered) avx512_on_avx2::is_nan(a)
#define _mm512_mask_mov_epi32(no, mask, yes) \
  bits<__m512i>(avx512_on_avx2::where(bits<avx512_on_avx2::I>(no), mask, bits<avx512_on_avx2::I>(yes)))
#define _mm512_maskz_loadu_ps(mask, p) avx512_on_avx2::load<avx512_on_avx2::F>(mask, p)
#define _mm512_maskz_loadu_pd(mask, p) avx512_on_avx2::load<avx512_on_avx2::D>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) avx512_on_avx2::store(p, mask, bits<avx512_on_avx2::F>(v))
#define _mm512_mask_storeu_pd(p, mask, v) avx512_on_avx2::store(p, mask, bits<avx512_on_avx2::D>(v))
#define _mm256_maskz_loadu_epi16(mask, p) avx512_on_avx2::load_short(mask, p)
#define _mm256_mask_storeu_epi16(p, mask, v) avx512_on_avx2::store_short(p, mask, v)
