// What kernels use beyond plain C++: storage types, shuffles, shared memory, clusters. Inline PTX stands behind
// one-line wrappers. tests/cuda_on_cpu/simt.h gives every name here a meaning on a CPU and takes this file's place
// there, so the kernels' own source runs under test without a GPU.
#pragma once
#ifdef FUSED_LOSSES_SIMT
#include FUSED_LOSSES_SIMT
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <type_traits>

namespace fused_losses::cuda {

__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ uint16_t float_to_bfloat(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
// Two at once, `low` in the lower half of the word.
__device__ __forceinline__ uint32_t floats_to_halves(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t floats_to_bfloats(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// One instruction each, to about 22 bits; results below the smallest normal number are 0.
__device__ __forceinline__ float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_square_root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN where either is, which fmaxf and fminf are not.
__device__ __forceinline__ float maximum(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float minimum(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// A product that is rounded by itself, whatever is added to it.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// 16 bytes from global to shared memory, both addresses aligned, past the registers: a thread has as many on their
// way as it likes. After wait_for_copies() the thread that asked for them sees them (others after a barrier as well).
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global))
      : "memory");
}
// To an aligned address. Beside a branch that stores the parts, the compiler would make parts of this, too.
__device__ __forceinline__ void store_16_bytes(void* global, uint4 words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Dynamic shared memory, 16-byte aligned: the only kind the kernels use.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

// A cluster: neighbouring blocks that read each other's shared memory (sm_90 and later; elsewhere a block alone).
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_size() {
  unsigned n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned n;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(n));
  return n;
}
// A barrier in two halves: who has waited may rely on what all others did before they arrived. To arrive is to wait for
// one's own stores to be done: between a row's gradient and the next row it would stop the stream of both.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
// The address in the cluster's shared memory of what stands at `own` here, in block `rank`.
template <class P>
__device__ __forceinline__ P* in_block(P* own, unsigned rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
  return reinterpret_cast<P*>(address);
}
#else
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <class P>
__device__ __forceinline__ P* in_block(P* own, unsigned) {
  return own;
}
#endif

// Ends the kernel as torch's own assertions do: cudaErrorAssert.
[[noreturn]] static __device__ __forceinline__ void stop(const char* condition) {
#ifdef __CUDA_ARCH__  // declared for devices alone
  __assert_fail(condition, __FILE__, __LINE__, "fused_losses");
#endif
  __trap();  // not reached, which the compiler does not know
}

// A target outside [0, classes) stops the kernel before it is used as an address.
[[noreturn]] static __device__ __noinline__ void out_of_bounds(int64_t target, int64_t classes) {
  printf("fused_losses: target %lld is out of bounds: input has %lld classes\n", static_cast<long long>(target),
         static_cast<long long>(classes));
  stop("0 <= target && target < classes");
}
__device__ __forceinline__ void require_target(int64_t target, int64_t classes) {
  if (target < 0 || target >= classes) out_of_bounds(target, classes);
}

// A probability outside [0, 1], NaN included, does the same.
[[noreturn]] static __device__ __noinline__ void no_probability(double input) {
  printf("fused_losses: input is %g; expected a probability between 0 and 1\n", input);
  stop("0 <= input && input <= 1");
}
template <class T>
__device__ __forceinline__ void require_probability(T input) {
  if (!(input >= 0 && input <= 1)) no_probability(input);
}

// Whether the kernel's code has clusters in it: what the driver made from older PTX has not, on any device.
template <class... Parameters>
cudaError_t knows_clusters(void (*kernel)(Parameters...), bool* answer) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *answer = attributes.ptxVersion >= 90;
  return error;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, unsigned cluster, size_t shared,
                   cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  if (shared > 48 * 1024) {
    // All there is, whatever this launch takes: another thread may be about to launch the same kernel with more.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace fused_losses::cuda
#endif

namespace fused_losses::cuda {

constexpr int kWarp = 32;

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

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(f16 x) { return half_to_float(x.bits); }
__device__ __forceinline__ float widen(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class S>
struct Narrow {
  static __device__ __forceinline__ S from(typename ComputeOf<S>::T x) { return x; }
};
template <>
struct Narrow<f16> {
  static __device__ __forceinline__ f16 from(float x) { return {float_to_half(x)}; }
};
template <>
struct Narrow<bf16> {
  static __device__ __forceinline__ bf16 from(float x) { return {float_to_bfloat(x)}; }
};

// 16 bytes at a time, from and to an aligned address.
template <class S>
struct Pack {
  static constexpr int size = 16 / sizeof(S);
  S at[size];
};
template <class S>
__device__ __forceinline__ Pack<S> load_pack(const S* p) {
  const uint4 words = *reinterpret_cast<const uint4*>(p);
  Pack<S> pack;
  memcpy(&pack, &words, sizeof pack);
  return pack;
}
template <class S, class T>
__device__ __forceinline__ Pack<S> narrow_pack(const T (&x)[Pack<S>::size]) {
  Pack<S> pack;
  if constexpr (sizeof(S) == 2) {
    uint32_t words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      words[k] =
          std::is_same_v<S, f16> ? floats_to_halves(x[2 * k], x[2 * k + 1]) : floats_to_bfloats(x[2 * k], x[2 * k + 1]);
    memcpy(&pack, words, sizeof pack);
  } else {
#pragma unroll
    for (int k = 0; k < Pack<S>::size; ++k) pack.at[k] = x[k];
  }
  return pack;
}
template <class S>
__device__ __forceinline__ void store_pack(S* p, const Pack<S>& pack) {
  uint4 words;
  memcpy(&words, &pack, sizeof words);
  store_16_bytes(p, words);
}
// n neighbours, one pack of them or several.
template <class S, int n, class T>
__device__ __forceinline__ void load_packs(const S* p, T (&x)[n]) {
#pragma unroll
  for (int first = 0; first < n; first += Pack<S>::size) {
    const Pack<S> pack = load_pack(p + first);
#pragma unroll
    for (int k = 0; k < Pack<S>::size; ++k) x[first + k] = widen(pack.at[k]);
  }
}
template <class S, int n, class T>
__device__ __forceinline__ void store_packs(S* p, const T (&x)[n]) {
#pragma unroll
  for (int first = 0; first < n; first += Pack<S>::size) {
    T part[Pack<S>::size];
#pragma unroll
    for (int k = 0; k < Pack<S>::size; ++k) part[k] = x[first + k];
    store_pack(p + first, narrow_pack<S>(part));
  }
}
template <class S>
__host__ __device__ __forceinline__ int misaligned(const S* p) {  // elements past a 16-byte boundary
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(S));
}

// high + low, `high` being the sum rounded: 48 bits for two floats (Dekker 1971; Knuth's two-sum). Where `high` is not
// finite, `low` is 0.
template <class T>
struct Pair {
  T high, low;
  Pair() = default;
  __device__ __forceinline__ Pair(T high, T low = 0) : high(high), low(low == low ? low : T{0}) {}
  __device__ __forceinline__ T rounded() const { return high + low; }
  static __device__ __forceinline__ Pair of(double x) {
    const T high = static_cast<T>(x);
    return {high, static_cast<T>(x - static_cast<double>(high))};
  }
  friend __device__ __forceinline__ Pair operator-(Pair a) { return {-a.high, -a.low}; }
  friend __device__ __forceinline__ Pair operator+(Pair a, Pair b) {
    const T sum = a.high + b.high, added = sum - a.high;
    return {sum, (a.high - (sum - added)) + (b.high - added) + (a.low + b.low)};
  }
  friend __device__ __forceinline__ Pair operator-(Pair a, Pair b) { return a + -b; }
  friend __device__ __forceinline__ Pair operator*(Pair a, Pair b) {
    const T product = rounded_product(a.high, b.high);
    return {product, fma(a.high, b.high, -product) + fma(a.high, b.low, a.low * b.high)};
  }
  friend __device__ __forceinline__ Pair operator/(Pair a, Pair b) {
    const T quotient = a.high / b.high;
    return {quotient, (fma(-quotient, b.high, a.high) + fma(-quotient, b.low, a.low)) / b.high};
  }
};

// What the lane at `xor`-distance `width` has. Every lane of the warp takes part.
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int width) {
  return __shfl_xor_sync(0xffffffffu, x, width);
}
// Whether x is true in any of the warp's lanes, all of which ask.
__device__ __forceinline__ bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x); }
template <class T>
__device__ __forceinline__ Pair<T> shuffle_xor(Pair<T> x, int width) {
  return {shuffle_xor(x.high, width), shuffle_xor(x.low, width)};
}

// The sum of x, pairwise; leaves x in disorder. (By recursion: a loop over widths is not always unrolled, and an array
// with an index that is not constant goes to local memory.)
template <int n, int size, class T>
__device__ __forceinline__ T pairwise_sum(T (&x)[size]) {
  if constexpr (n > 1) {
#pragma unroll
    for (int k = 0; k < n / 2; ++k) x[k] = x[k] + x[k + n / 2];
    return pairwise_sum<n / 2>(x);
  }
  return x[0];
}

// A sum with Kahan's compensation.
template <class T>
struct Sum {
  T total = 0, lost = 0;
  __device__ __forceinline__ void add(T term) {
    const T y = term - lost, sum = total + y, rounded = (sum - total) - y;
    lost = rounded == rounded ? rounded : T{0};  // an infinite total has lost nothing
    total = sum;
  }
};

// Where element i of the shape args.size[args.ndim] is, by one of the sets of strides.
template <class Args, size_t dims>
__device__ __forceinline__ int64_t offset_of(const Args& args, const int64_t (&stride)[dims], int64_t i) {
  int64_t offset = 0;
  for (int d = args.ndim - 1; d > 0; --d) {
    const int64_t rest = i / args.size[d];
    offset += (i - rest * args.size[d]) * stride[d];
    i = rest;
  }
  return offset + i * stride[0];
}

// The sum over the warp's threads, the same bits in every thread. Always the same order.
__device__ __forceinline__ double warp_sum(double value) {
  for (int width = kWarp / 2; width > 0; width /= 2) value += shuffle_xor(value, width);
  return value;
}
// The same over the block's threads; `scratch` holds a double a warp.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
  value = warp_sum(value);
  __syncthreads();  // the scratch of an earlier sum may still be read
  const unsigned lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0);
}

}  // namespace fused_losses::cuda
