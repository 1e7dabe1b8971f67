// exp, log and their relatives on vectors. Included inside each level's namespace, after simd.h.
// Series whose coefficients are exact (1/k!, 2/(2k+1)) are spelled so; errors in ulp are stated in
// docs/accuracy.md and held by tests/test_vector_math.py.

// p(x) = c[n-1] x^(n-1) + ... + c[1] x + c[0]
template <class V, int n>
FL_FN V polynomial(const typename Lanes<V>::Scalar (&c)[n], V x) {
  V p = broadcast<V>(c[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) p = p * x + c[i];
  return p;
}
// The same with c[n] by halves (Estrin): a few multiplications more, and a chain of log2(n) steps instead of n. A loop
// whose formula is long waits for its chains, since few of its turns fit the processor's window.
template <int n, class V>
FL_FN V sum_by_halves(const V* c, V x) {
  if constexpr (n == 1) {
    return c[0];
  } else {
    V half[(n + 1) / 2];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) half[i] = c[2 * i + 1] * x + c[2 * i];
    if constexpr (n % 2) half[n / 2] = c[n - 1];
    return sum_by_halves<(n + 1) / 2>(half, x * x);
  }
}
template <class V, int n>
FL_FN V polynomial_by_halves(const typename Lanes<V>::Scalar (&c)[n], V x) {
  V constants[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) constants[i] = broadcast<V>(c[i]);
  return sum_by_halves<n>(constants, x);
}

template <class V>
struct ExpConstants;
template <>
struct ExpConstants<vf> {
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  static constexpr float low = -104.0f, high = 89.0f, log_smallest_normal = -87.336544f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // the high part times n is exact
  // A minimax fit of (exp(r) - 1 - r) / r^2, off by at most 3.1e-9 of exp(r): one term less than the series.
  static constexpr float series[] = {0.49999994040f, 0.16666521132f, 0.041668388993f, 0.0083687454462f,
                                     0.0013814540580f};
};
template <class V>
struct ExpConstants<Pair<V>> : ExpConstants<V> {};
template <>
struct ExpConstants<vd> {
  static constexpr double round = 6755399441055744.0;
  static constexpr double low = -746.0, high = 710.0, log_smallest_normal = -708.39641853226408;
  static constexpr double ln2_high = 6.93147180369123816490e-1, ln2_low = 1.90821492927058770002e-10;
  static constexpr double series[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                      1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                      1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800.};
};

// x * 2^n, rounded once, n an integer in V: 2^n itself may not be a normal number.
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 64
FL_FN vf times_power_of_two(vf x, vf n) { return FL_FLOAT_OP(scalef, bits<native_vf>(x), bits<native_vf>(n)); }
FL_FN vd times_power_of_two(vd x, vd n) { return FL_DOUBLE_OP(scalef, bits<native_vd>(x), bits<native_vd>(n)); }
template <class V>
FL_FN V divided_by_power_of_two(V x, V n) {
  return times_power_of_two(x, n);
}
#else
// An integer in V as one.
template <class V>
FL_FN typename Lanes<V>::Int to_integer(V n) {
  using I = typename Lanes<V>::Int;
  const V round = broadcast<V>(ExpConstants<V>::round);
  return bits<I>(n + round) - bits<I>(round);
}
template <class V>
FL_FN V times_power_of_two(V x, V n) {
  using L = Lanes<V>;
  using I = typename L::Int;
  const I i = to_integer(n), half = i >> 1;
  const V a = bits<V>((half + L::exponent_bias) << L::mantissa_bits);
  const V b = bits<V>((i - half + L::exponent_bias) << L::mantissa_bits);
  return x * a * b;
}
// The same for n <= 0, where the result may be as small as it likes, but 2^(n + more) is a normal number.
template <class V>
FL_FN V divided_by_power_of_two(V x, V n) {
  using L = Lanes<V>;
  constexpr int more = L::mantissa_bits + 8;
  constexpr double less = 1 / static_cast<double>(int64_t{1} << more);
  return x * bits<V>((to_integer(n) + (L::exponent_bias + more)) << L::mantissa_bits) *
         static_cast<typename L::Scalar>(less);
}
#endif

// x = n ln 2 + r with |r| <= ln 2 / 2
template <class V>
struct ReducedExp {
  V r, n;
};
template <class V>
FL_FN ReducedExp<V> reduce_exp(V x) {
  using C = ExpConstants<V>;
  const V n = (x * static_cast<typename Lanes<V>::Scalar>(1.44269504088896340736) + C::round) - C::round;
  return {(x - n * C::ln2_high) - n * C::ln2_low, n};
}

// The exponential's mantissa, 1 + r + r^2 (1/2 + ...), and its exponent n.
template <class V>
FL_FN V exp_reduced(V r) {
  return polynomial_by_halves(ExpConstants<V>::series, r) * (r * r) + r + 1;
}
template <class V>
FL_FN V exp(V x) {
  using C = ExpConstants<V>;
  const auto [r, n] = reduce_exp(at_most(at_least(x, broadcast<V>(C::low)), broadcast<V>(C::high)));
  return times_power_of_two(exp_reduced(r), n);
}

// A term of a softmax's sum is 0 where it would be no normal number, which would take a CPU a hundred cycles. Where an
// instruction scales by 2^n whatever n is, the lanes that become 0 may hold anything till then, and what is too large
// becomes infinite; elsewhere x is fenced in, and 2^n is a normal number.
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 64
template <class V>
FL_FN V fence_term(V x) {
  return x;
}
template <class V>
FL_FN V scale_term(V x, V mantissa, V n) {
  return select<V>(x < ExpConstants<V>::log_smallest_normal, V{}, times_power_of_two(mantissa, n));
}
FL_FN vf round_to_integer(vf x) { return FL_FLOAT_OP(roundscale, bits<native_vf>(x), _MM_FROUND_TO_NEAREST_INT); }
#else
template <class V>
FL_FN V fence_term(V x) {
  constexpr auto low = ExpConstants<V>::log_smallest_normal;
  return at_most(at_least(x, broadcast<V>(low)), broadcast<V>(-low));
}
template <class V>
FL_FN V scale_term(V x, V mantissa, V n) {
  using L = Lanes<V>;
  const V power = bits<V>((to_integer(n) + L::exponent_bias) << L::mantissa_bits);
  return select<V>(x < ExpConstants<V>::log_smallest_normal, V{}, mantissa * power);
}
#endif
template <class V>
FL_FN V round_to_integer(V x) {
  return (x + ExpConstants<V>::round) - ExpConstants<V>::round;
}

// exp(x) as mantissa * 2^n.
template <class V>
struct Term {
  V mantissa, n;
};
// 2^f for |f| <= 1/2 by a minimax fit, off by at most 1.6e-8.
template <class V>
FL_FN V exp2_unit(V f) {
  static constexpr float c[] = {1.0f,           0.69314718246f,   0.24022647738f,   0.055503323674f,
                                0.00961843692f, 0.0013398875017f, 0.00015353361960f};
  return polynomial(c, f);
}
template <class V>
FL_FN Term<V> split_term(V x) {
  if constexpr (FL_HAS_FMA && sizeof(typename Lanes<V>::Scalar) == 4) {
    // With fused multiply-add f = x log2(e) - n is rounded once, and what log2(e) has lost as a float is added.
    constexpr float log2_e = 1.44269504088896340736f, lost = 1.925963e-8f;
    const V n = round_to_integer(x * log2_e);
    return {exp2_unit(x * lost + multiply_subtract(x, broadcast<V>(log2_e), n)), n};
  } else {
    const auto [r, n] = reduce_exp(x);
    return {exp_reduced(r), n};
  }
}

template <class V>
FL_FN V exp_term(V x) {
  const auto [mantissa, n] = split_term(fence_term(x));
  return scale_term(x, mantissa, n);
}
// The same of several vectors, as many by turns as make a batch.
template <class V, int n>
FL_FN void exp_terms(V (&x)[n]) {
  using Batch = typename BatchOf<typename Lanes<V>::Scalar>::V;
  if constexpr (is_pair<Batch> && n % 2 == 0) {
#pragma GCC unroll 4
    for (int u = 0; u < n; u += 2) {
      const Batch terms = exp_term(Batch{x[u], x[u + 1]});
      x[u] = terms.first;
      x[u + 1] = terms.second;
    }
  } else {
#pragma GCC unroll 4
    for (V& vector : x) vector = exp_term(vector);
  }
}
// exp_term(x) / 2^k, also where exp_term(x) alone would be too large.
template <class V>
FL_FN V exp_term_scaled(V x, V k) {
  const V low = broadcast<V>(ExpConstants<V>::low);
  const auto [mantissa, n] = split_term(at_least(x, low));
  return select<V>(x < low, V{}, times_power_of_two(mantissa, n - k));
}
// exp(-|x|), for sigmoids, with its subnormal numbers: x is fenced in below where it is 0.
template <class V>
FL_FN V exp_minus_magnitude(V x) {
  const auto [mantissa, n] = split_term(at_least(-magnitude(x), broadcast<V>(ExpConstants<V>::low)));
  return divided_by_power_of_two(mantissa, n);
}
// To 18 bits, for what will be rounded to the 8 of bf16 or the 11 of fp16: 2^f by a minimax fit in five terms, off by
// at most 2.8e-6, of x log2(e) rounded once.
template <class V>
FL_FN Term<V> split_term_coarse(V x) {
  static constexpr float c[] = {1.0f, 0.69312417507f, 0.24024099112f, 0.055906426162f, 0.0095828529447f};
  const V t = x * 1.44269504088896340736f, n = round_to_integer(t);
  return {polynomial_by_halves(c, t - n), n};
}
template <class V>
FL_FN V exp_term_coarse(V x) {
  const auto [mantissa, n] = split_term_coarse(fence_term(x));
  return scale_term(x, mantissa, n);
}
template <class V>
FL_FN V exp_minus_magnitude_coarse(V x) {
  const auto [mantissa, n] = split_term_coarse(at_least(-magnitude(x), broadcast<V>(ExpConstants<V>::low)));
  return divided_by_power_of_two(mantissa, n);
}

template <class V>
struct LogConstants;
template <>
struct LogConstants<vf> {
  static constexpr float smallest_normal = 1.17549435e-38f, two_mantissa = 8388608.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float series[] = {2.f / 3, 2.f / 5, 2.f / 7, 2.f / 9};
};
template <class V>
struct LogConstants<Pair<V>> : LogConstants<V> {};
template <>
struct LogConstants<vd> {
  static constexpr double smallest_normal = 2.2250738585072014e-308, two_mantissa = 4503599627370496.0;
  static constexpr double ln2_high = 6.93147180369123816490e-1, ln2_low = 1.90821492927058770002e-10;
  static constexpr double series[] = {2. / 3,  2. / 5,  2. / 7,  2. / 9,  2. / 11,
                                      2. / 13, 2. / 15, 2. / 17, 2. / 19, 2. / 21};
};

// log(2^k (1 + f) + correction), 1 + f in [sqrt(1/2), sqrt(2)): with s = f / (2 + f),
// log(1 + f) = 2 atanh(s) = f - f^2/2 + s (f^2/2 + s^2 (2/3 + 2/5 s^2 + ...)).
template <class V>
FL_CALL V log_with_correction(V x, V correction) {
  using C = LogConstants<V>;
  using L = Lanes<V>;
  using I = typename L::Int;
  using S = typename L::Scalar;
  const I subnormal = x < C::smallest_normal;
  const V normal = select<V>(subnormal, x * C::two_mantissa, x);
  const I sqrt_half = bits<I>(broadcast<V>(static_cast<S>(0.70710678118654752440)));
  const I k = (bits<I>(normal) - sqrt_half) >> L::mantissa_bits;
  const V f = bits<V>(bits<I>(normal) - (k << L::mantissa_bits)) - 1;
  const V exponent = to_number<V>(k) - select<V>(subnormal, broadcast<V>(L::mantissa_bits), V{});
  const V s = f / (2 + f), z = s * s, half_square = f * f * static_cast<S>(0.5);
  const V tail = s * (half_square + polynomial(C::series, z) * z) + (exponent * C::ln2_low + correction / x);
  const V value = exponent * C::ln2_high + (f - (half_square - tail));
  // log(0) = -inf, log(inf) = inf, log(negative) = log(NaN) = NaN
  const V infinity = broadcast<V>(__builtin_inf());
  const V edge = select<V>(x == 0, -infinity, select<V>(x == infinity, infinity, broadcast<V>(__builtin_nan(""))));
  return select<V>((x > 0) & (x < infinity), value, edge);
}
template <class V>
FL_FN Pair<V> log_with_correction(Pair<V> x, Pair<V> correction) {
  return {log_with_correction(x.first, correction.first), log_with_correction(x.second, correction.second)};
}
template <class V>
FL_FN V log(V x) {
  return log_with_correction(x, V{});
}
// log(1 + x): what rounding lost in 1 + x comes back as a correction.
template <class V>
FL_FN V log1p(V x) {
  const V u = 1 + x;
  return log_with_correction(u, select<V>(u < broadcast<V>(__builtin_inf()), x - (u - 1), V{}));
}

// log1p(e) for e in [0, 1], where softplus needs it and no division is wanted: a minimax fit of log1p(e) / e,
// off by at most 5.3e-9 (mpmath.chebyfit with 10 coefficients).
template <class V>
FL_FN V log1p_unit(V e) {
  static constexpr float c[] = {0.9999999947f,  -0.4999989265f, 0.333297105f,    -0.2495161626f, 0.1966327426f,
                                -0.1526966707f, 0.105436238f,   -0.05637361283f, 0.01954252726f, -0.003176057018f};
  return e * polynomial(c, e);
}
FL_FN vd log1p_unit(vd e) { return log1p(e); }
// As coarse as exp_term_coarse: 7 coefficients, off by at most 1.4e-6.
template <class V>
FL_FN V log1p_unit_coarse(V e) {
  static constexpr float c[] = {0.9999985737f, -0.4998589943f,  0.3309752582f, -0.2345452005f,
                                0.1482941343f, -0.06559030637f, 0.01387448451f};
  return e * polynomial(c, e);
}

// log(x) and log(1 - x) for x in [0, 1], without a division. What is below -100 may be anything below -100: that is
// where binary cross entropy ends. u = 2^k (1 + f), f in (-1/2, 0], so that no two terms have different signs.
template <class V>
FL_FN typename Lanes<V>::Int exponent_to_unit(V u) {
  using I = typename Lanes<V>::Int;
  return (bits<I>(u) - (bits<I>(broadcast<V>(0.5)) + 1)) >> Lanes<V>::mantissa_bits;
}
template <class V>
FL_FN V scaled_to_unit(V u, typename Lanes<V>::Int k) {
  return bits<V>(bits<typename Lanes<V>::Int>(u) - (k << Lanes<V>::mantissa_bits));
}
// k log(2) + log(1 + f): f + f^2 times a minimax fit, off by at most 3.8e-9 of the logarithm.
template <class V>
FL_FN V log_of_parts(V k, V f) {
  using C = LogConstants<V>;
  static constexpr float c[] = {-0.5000008941f, 0.3332621455f, -0.2518885434f, 0.1756900549f, -0.3410474956f,
                                -0.5953686833f, -1.976717114f, -2.482326508f,  -1.745945811f};
  return k * C::ln2_high + (f + (polynomial(c, f) * (f * f) + k * C::ln2_low));
}
template <class V>
FL_FN V log_unit(V x) {
  const V normal = x * 0x1p24f;  // a subnormal number, too
  const auto k = exponent_to_unit(normal);
  return log_of_parts(to_number<V>(k) - 24, scaled_to_unit(normal, k) - 1);
}
template <class V>
FL_FN V log_complement(V x) {
  const V u = 1 - x;  // exact from x = 1/2 on, where k < 0; below, f is -x itself
  const auto k = exponent_to_unit(u);
  const V value = log_of_parts(to_number<V>(k), select<V>(k == 0, -x, scaled_to_unit(u, k) - 1));
  return select<V>(u > 0, value, broadcast<V>(-__builtin_inf()));
}
FL_FN vd log_unit(vd x) { return log(x); }
FL_FN vd log_complement(vd x) { return log1p(-x); }

#if FL_HAS_FMA
// 1 / d to 22 bits or more.
FL_FN vf quick_reciprocal(vf d) {
#if FUSED_LOSSES_VECTOR_BYTES == 64
  const vf about = FL_FLOAT_OP(rcp14, bits<native_vf>(d));
#else
  const vf about = FL_FLOAT_OP(rcp, bits<native_vf>(d));
#endif
  return about + about * (1 - d * about);
}
template <class V>
FL_FN Pair<V> quick_reciprocal(Pair<V> d) {
  return {quick_reciprocal(d.first), quick_reciprocal(d.second)};
}
#endif

// e / (1 + e) for e in [0, 1], the smaller of a sigmoid and its complement.
FL_FN vd odds(vd e) { return e / (1 + e); }
#if FUSED_LOSSES_X86 && FUSED_LOSSES_VECTOR_BYTES == 16
FL_FN vf odds(vf e) {
  return join(odds(__builtin_convertvector(low_half(e), vd)), odds(__builtin_convertvector(high_half(e), vd)));
}
#else
// With fused multiply-add: an approximate reciprocal and the remainder, which knows what 1 + e has lost. Off by little
// more than half an ulp, in the time of a division.
FL_FN vf odds(vf e) {
  const vf d = 1 + e;
#if FUSED_LOSSES_VECTOR_BYTES == 64
  const vf inverse = FL_FLOAT_OP(rcp14, bits<native_vf>(d));
#elif FL_HAS_FMA
  const vf inverse = quick_reciprocal(d);
#else
  const vf inverse = 1 / d;
#endif
  const vf lost = e - (d - 1), quotient = e * inverse;
  return quotient + ((e - quotient * d) - quotient * lost) * inverse;
}
#endif
template <class V>
FL_FN Pair<V> odds(Pair<V> e) {
  return {odds(e.first), odds(e.second)};
}

template <class V>
FL_FN V odds_coarse(V e) {
#if FL_HAS_FMA
  return e * quick_reciprocal(1 + e);
#else
  return e / (1 + e);
#endif
}

// x^y for x in [0, 1] and y >= 0.
FL_CALL vd power(vd x, double y) { return select<vd>(x == 0, y == 0 ? vd{} + 1 : vd{}, exp(log(x) * y)); }
#if FL_HAS_FMA
// The error of log2(x) is multiplied by y log2(x): it is the sum of two floats, `high` and `low`, good to 30 bits.
template <class V>
FL_FN V power(V x, double y) {
  using I = typename Lanes<V>::Int;
  // 2 / log(2), and a minimax fit of the rest of 2 atanh(s) / log(2) / s, off by at most 1.7e-11 of it.
  constexpr float two_over_ln2 = 2.88539008177792681472f, lost = 3.851926e-8f;
  static constexpr float c[] = {0.9617966923f, 0.5770797741f, 0.411901276f, 0.3365874935f};
  const V normal = x * 0x1p24f;  // a subnormal number, too
  const I k = (bits<I>(normal) - bits<I>(broadcast<V>(0.707106781f))) >> Lanes<V>::mantissa_bits;
  const V exponent = to_number<V>(k) - 24, f = scaled_to_unit(normal, k) - 1;
  // log2(1 + f) = 2 atanh(s) / log(2), s = f / (2 + f)
  const V d = 2 + f, inverse = quick_reciprocal(d), s = f * inverse, z = s * s, unit = broadcast<V>(two_over_ln2);
  const V s_low = -(multiply_subtract(s, d, f) + s * (f - (d - 2))) * inverse;
  const V first = exponent + s * unit;
  const V rest = multiply_subtract(s, unit, first - exponent) + (s_low * unit + (s * lost + s * z * polynomial(c, z)));
  const V high = first + rest, low = rest - (high - first);
  // No product is infinite: beyond, x^y is 0 for every x but 1.
  const double bounded = y < 1e30 ? y : 1e30;
  const float y_high = static_cast<float>(bounded), y_low = static_cast<float>(bounded - y_high);
  const V t = high * y_high, n = round_to_integer(t);
  const V r = multiply_subtract(high, broadcast<V>(y_high), n) + (low * y_high + high * y_low);
  const V value = times_power_of_two(exp2_unit(r), n);
  return select<V>(x > 0, select<V>(t > -150, value, V{}), y == 0 ? broadcast<V>(1) : x);
}
#else
FL_CALL vf power(vf x, double y) { return join(power(to_double(low_half(x)), y), power(to_double(high_half(x)), y)); }
#endif
