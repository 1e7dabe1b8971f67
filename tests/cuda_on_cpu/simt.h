// A GPU in one thread: what csrc/cuda/simt.cuh gives a kernel, given on a CPU. Every thread of a block (of a cluster of
// blocks) is a fiber; barriers and shuffles hand the processor to another one, chosen at random, so that a result
// which depends on a barrier that is not there changes from run to run. Shared memory is allocated to the byte and
// filled with garbage: AddressSanitizer sees the end of it, and nobody gets zeros for free. What would hang a GPU, a
// barrier that some thread never reaches, is an error here.
#pragma once
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace simt {

struct Index {
  unsigned x;
};
Index& thread_index();
Index& block_index();
Index& block_size();
Index& grid_size();

void sync_block();
void arrive_at_cluster();
void wait_for_cluster();
void sync_warp();
// What the lane at `xor`-distance gave, once every lane of the warp has come here with a value. It orders nothing else.
uint64_t exchange(uint64_t value, int distance);
char* shared_memory();
unsigned cluster_size();
unsigned cluster_rank();
char* shared_memory_of(unsigned rank);
void copy(void* shared, const void* global);
void wait_for_copies();
[[noreturn]] void fail(const char* why, ...);

cudaError_t run(const std::function<void()>& kernel, unsigned blocks, unsigned threads, unsigned cluster,
                size_t shared);

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

inline void __syncthreads() { simt::sync_block(); }
inline void __syncwarp() { simt::sync_warp(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = simt::exchange(bits, distance);
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __any_sync(unsigned mask, int any) {
  for (int width = 16; width > 0; width /= 2) any |= __shfl_xor_sync(mask, any, width);
  return any;
}

namespace fused_losses::cuda {

using std::fma;

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat(float x);
inline uint32_t floats_to_halves(float low, float high) {
  return float_to_half(low) | uint32_t{float_to_half(high)} << 16;
}
inline uint32_t floats_to_bfloats(float low, float high) {
  return float_to_bfloat(low) | uint32_t{float_to_bfloat(high)} << 16;
}

// `exact` as a GPU may have it, off by up to `error`, as x decides: the same every time. 0, 1 and what is not finite
// are exact.
float off(double error, double exact, float x);
float off_ulps(double ulps, double exact, float x);
// The errors stated in the CUDA Programming Guide, "Mathematical Functions" (expf: of older editions, which grant it
// more).
inline float expf(float x) { return off_ulps(2, std::exp(double{x}), x); }
inline float logf(float x) { return off_ulps(1, std::log(double{x}), x); }
inline float log1pf(float x) { return off_ulps(1, std::log1p(double{x}), x); }
inline float powf(float x, float y) { return off_ulps(4, std::pow(double{x}, double{y}), x); }
// As .ftz has it: what is smaller than every normal number is 0, before and after.
inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
// Those of "Parallel Thread Execution ISA", "Floating Point Instructions".
inline float approximate_exp2(float x) { return flushed(off_ulps(2, std::exp2(double{flushed(x)}), x)); }
inline float approximate_log2(float x) {
  const double log2 = std::log2(double{flushed(x)});
  return off(0x1p-22 * std::fmax(1, std::fabs(log2)), log2, x);
}
inline float approximate_reciprocal(float x) { return flushed(off_ulps(1, 1 / double{flushed(x)}, x)); }
inline float approximate_square_root(float x) {
  const double root = std::sqrt(double{flushed(x)});
  return off(0x1p-23 * root, root, x);
}

inline float maximum(float a, float b) { return a != a || a > b ? a : b; }
inline float minimum(float a, float b) { return a != a || a < b ? a : b; }

template <class T>
T rounded_product(T a, T b) {
  T product = a * b;
  asm("" : "+m"(product));  // the compiler does not see what it is, and fuses nothing
  return product;
}

inline void store_16_bytes(void* global, uint4 words) { *reinterpret_cast<uint4*>(global) = words; }
// The bytes arrive at the wait and not before.
inline void copy_16_bytes(void* shared, const void* global) { simt::copy(shared, global); }
inline void wait_for_copies() { simt::wait_for_copies(); }

inline char* shared_memory() { return simt::shared_memory(); }
inline unsigned cluster_size() { return simt::cluster_size(); }
inline unsigned cluster_rank() { return simt::cluster_rank(); }
inline void cluster_arrive() { simt::arrive_at_cluster(); }
inline void cluster_wait() { simt::wait_for_cluster(); }
template <class P>
P* in_block(P* own, unsigned rank) {
  return reinterpret_cast<P*>(simt::shared_memory_of(rank) + (reinterpret_cast<char*>(own) - simt::shared_memory()));
}

inline void require_target(int64_t target, int64_t classes) {
  if (target < 0 || target >= classes)
    simt::fail("target %lld is out of bounds: input has %lld classes", static_cast<long long>(target),
               static_cast<long long>(classes));
}
inline void require_probability(double input) {
  if (!(input >= 0 && input <= 1)) simt::fail("input is %g; expected a probability between 0 and 1", input);
}

template <class... Parameters>
cudaError_t knows_clusters(void (*)(Parameters...), bool* answer) {
  *answer = true;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, unsigned cluster, size_t shared,
                   cudaStream_t, Arguments... arguments) {
  return simt::run([=] { kernel(static_cast<Parameters>(arguments)...); }, blocks, threads, cluster, shared);
}

}  // namespace fused_losses::cuda
