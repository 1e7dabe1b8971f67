#include "simt.h"

#include <ucontext.h>

#include <algorithm>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(FUSED_LOSSES_SIMT_RACES)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(const void* address, size_t size);
extern "C" void __tsan_write_range(void* address, size_t size);
#endif

namespace simt {
namespace {

// To ThreadSanitizer a fiber is a thread, and what two of them do is in no order but for what is said here. It does not
// watch this file.
#if defined(FUSED_LOSSES_SIMT_RACES)
void* new_thread() { return __tsan_create_fiber(0); }
void end_thread(void* thread) { __tsan_destroy_fiber(thread); }
void* this_thread() { return __tsan_get_current_fiber(); }
void become(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }
// Who comes to see has everything before it that was done by those who published.
void publish(void* event) { __tsan_release(event); }
void see(void* event) { __tsan_acquire(event); }
void reads(const void* address, size_t size) { __tsan_read_range(address, size); }
void writes(void* address, size_t size) { __tsan_write_range(address, size); }
#else
void* new_thread() { return nullptr; }
void end_thread(void*) {}
void* this_thread() { return nullptr; }
void become(void*) {}
void publish(void*) {}
void see(void*) {}
void reads(const void*, size_t) {}
void writes(void*, size_t) {}
#endif

constexpr size_t kStack = 128 << 10;
constexpr unsigned kWarp = 32;

enum class State { ready, at_block_barrier, at_cluster_barrier, in_exchange, done };

// By turns, for one thread may come to the next barrier before another has left this one.
struct Barrier {
  uint64_t events[2] = {};
};
struct Block {
  std::unique_ptr<char[]> shared;
  Barrier barrier, cluster_barrier, warp_barriers[32];
  uint64_t done = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  Index thread;
  unsigned rank;  // of its block in the cluster
  State state = State::ready;
  uint64_t value;
  int distance;
  void* as_thread = new_thread();
  unsigned block_barriers, cluster_barriers, warp_barriers;  // it has come to
  std::vector<std::pair<void*, const void*>> copies;  // asked for and not waited for
  Fiber() = default;
  ~Fiber() { end_thread(as_thread); }
};

struct Machine {
  const std::function<void()>* kernel = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;  // of the grid, as far as it has come: nobody finds another's memory
  std::vector<std::unique_ptr<Fiber>> fibers;
  ucontext_t scheduler;
  void* scheduler_thread = nullptr;
  uint64_t launched = 0, finished = 0;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  Fiber* current = nullptr;
  Index first_block, block, threads, grid;
  unsigned cluster = 1;
  std::string error;
  std::mt19937 random{[] {
    const char* seed = std::getenv("FUSED_LOSSES_SIMT_SEED");
    return seed ? static_cast<unsigned>(std::atoi(seed)) : 1u;
  }()};
};
Machine machine;

Block& block_of(unsigned rank) { return *machine.blocks.at(machine.first_block.x + rank); }

void to_scheduler() {
  Fiber* self = machine.current;
  become(machine.scheduler_thread);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self->state == State::done ? nullptr : &self->fake_stack, machine.stack_bottom,
                                 machine.stack_size);
#endif
  swapcontext(&self->context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  see(&machine.launched);
  (*machine.kernel)();
  publish(&block_of(machine.current->rank).done);
  machine.current->state = State::done;
  to_scheduler();
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  machine.block.x = machine.first_block.x + fiber.rank;
  become(fiber.as_thread);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack.get(), kStack);
#endif
  swapcontext(&machine.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
}

void wait_as(State state) {
  machine.current->state = state;
  to_scheduler();
}

void wait_at(Barrier& barrier, unsigned* passed, State state) {
  uint64_t* const event = &barrier.events[(*passed)++ % 2];
  publish(event);
  wait_as(state);
  see(event);
}

// Lets the fibers in [first, last) go on if all of them that still run have come to `state`.
bool release(size_t first, size_t last, State state) {
  bool any = false;
  for (size_t i = first; i < last; ++i) {
    const State s = machine.fibers[i]->state;
    if (s == State::done) continue;
    if (s != state) return false;
    any = true;
  }
  if (!any) return false;
  if (state == State::in_exchange) {
    std::vector<uint64_t> given;
    for (size_t i = first; i < last; ++i) {
      if (machine.fibers[i]->state == State::done) {
        machine.error = "a lane has left the warp before a shuffle of all lanes";
        return false;
      }
      given.push_back(machine.fibers[i]->value);
    }
    for (size_t i = first; i < last; ++i) {
      Fiber& fiber = *machine.fibers[i];
      const size_t from = (i - first) ^ static_cast<size_t>(fiber.distance);
      if (from >= given.size()) machine.error = "a shuffle reads beyond the warp";
      fiber.value = given[from % given.size()];
    }
  }
  for (size_t i = first; i < last; ++i)
    if (machine.fibers[i]->state == state) machine.fibers[i]->state = State::ready;
  return true;
}

// Lets the fibers go on that wait for no more arrivals than there were. Who is done has arrived.
bool release_from_cluster() {
  unsigned arrived = ~0u;
  for (const auto& fiber : machine.fibers)
    if (fiber->state != State::done) arrived = std::min(arrived, fiber->cluster_barriers);
  bool any = false;
  for (const auto& fiber : machine.fibers) {
    if (fiber->state != State::at_cluster_barrier || fiber->cluster_barriers > arrived) continue;
    fiber->state = State::ready;
    any = true;
  }
  return any;
}

bool release_some() {
  const size_t all = machine.fibers.size(), threads = machine.threads.x;
  bool any = false;
  for (size_t first = 0; first < all; first += kWarp)
    any |= release(first, std::min<size_t>(first + kWarp, all), State::in_exchange);
  for (size_t first = 0; first < all; first += threads) any |= release(first, first + threads, State::at_block_barrier);
  return any | release_from_cluster();
}

void run_cluster(unsigned first_block, size_t shared) {
  machine.first_block.x = first_block;
  for (unsigned rank = 0; rank < machine.cluster; ++rank) {
    machine.blocks.push_back(std::make_unique<Block>());
    machine.blocks.back()->shared.reset(new char[shared]);
    memset(machine.blocks.back()->shared.get(), 0xA5, shared);
  }
  for (unsigned i = 0; i < machine.fibers.size(); ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.rank = i / machine.threads.x;
    fiber.thread.x = i % machine.threads.x;
    fiber.state = State::ready;
    fiber.fake_stack = nullptr;
    fiber.copies.clear();
    fiber.block_barriers = fiber.cluster_barriers = fiber.warp_barriers = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  publish(&machine.launched);
  std::vector<unsigned> threads_left(machine.cluster, machine.threads.x);
  // One warp runs ahead of the others as far as they let it, and then another of its block, so that a block runs ahead,
  // too: what they overwrite, or take along, is then still to be read by the others.
  const size_t all = machine.fibers.size(), threads = machine.threads.x;
  size_t ahead = machine.random() % (all / kWarp) * kWarp;
  std::vector<Fiber*> ready;
  const auto collect = [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i)
      if (machine.fibers[i]->state == State::ready) ready.push_back(machine.fibers[i].get());
  };
  for (;;) {
    ready.clear();
    collect(ahead, ahead + kWarp);
    if (ready.empty()) {
      if (release(ahead, ahead + kWarp, State::in_exchange)) continue;
      if (!machine.error.empty()) return;
      const auto done = [](const auto& fiber) { return fiber->state == State::done; };
      if (std::all_of(machine.fibers.begin(), machine.fibers.end(), done)) return;
      const size_t block = ahead / threads * threads;
      collect(block, block + threads);
      if (ready.empty() && release(block, block + threads, State::at_block_barrier)) collect(block, block + threads);
      if (ready.empty() && release_from_cluster()) collect(block, block + threads);
      if (ready.empty()) collect(0, all);
      if (ready.empty()) {
        if (release_some()) continue;
        if (machine.error.empty()) machine.error = "threads wait for threads that never come";
        return;
      }
      const Fiber* const next = ready[machine.random() % ready.size()];
      ahead = (next->rank * threads + next->thread.x) / kWarp * kWarp;
      continue;
    }
    std::shuffle(ready.begin(), ready.end(), machine.random);
    for (Fiber* fiber : ready) {
      resume(*fiber);
      if (!machine.error.empty()) return;
      // A block that has ended takes its shared memory along: who still reads it finds other bytes.
      if (fiber->state == State::done && --threads_left[fiber->rank] == 0) {
        become(fiber->as_thread);
        see(&block_of(fiber->rank).done);
        memset(block_of(fiber->rank).shared.get(), 0x5A, shared);
        become(machine.scheduler_thread);
      }
    }
  }
}

}  // namespace

Index& thread_index() { return machine.current->thread; }
Index& block_index() { return machine.block; }
Index& block_size() { return machine.threads; }
Index& grid_size() { return machine.grid; }
void sync_block() {
  wait_at(block_of(machine.current->rank).barrier, &machine.current->block_barriers, State::at_block_barrier);
}
void arrive_at_cluster() { publish(&block_of(0).cluster_barrier.events[machine.current->cluster_barriers++ % 2]); }
void wait_for_cluster() {
  wait_as(State::at_cluster_barrier);
  see(&block_of(0).cluster_barrier.events[(machine.current->cluster_barriers - 1) % 2]);
}
void sync_warp() {
  Fiber& self = *machine.current;
  self.distance = 0;
  wait_at(block_of(self.rank).warp_barriers[self.thread.x / kWarp], &self.warp_barriers, State::in_exchange);
}
uint64_t exchange(uint64_t value, int distance) {
  machine.current->value = value;
  machine.current->distance = distance;
  wait_as(State::in_exchange);
  return machine.current->value;
}
void copy(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail("a copy of 16 bytes is misaligned");
  machine.current->copies.emplace_back(shared, global);
}
void wait_for_copies() {
  for (const auto& [shared, global] : machine.current->copies) {
    reads(global, 16);
    writes(shared, 16);
    memcpy(shared, global, 16);
  }
  machine.current->copies.clear();
}
char* shared_memory() { return block_of(machine.current->rank).shared.get(); }
char* shared_memory_of(unsigned rank) { return block_of(rank).shared.get(); }
unsigned cluster_size() { return machine.cluster; }
unsigned cluster_rank() { return machine.current->rank; }

void fail(const char* why, ...) {
  char text[200];
  va_list arguments;
  va_start(arguments, why);
  std::vsnprintf(text, sizeof text, why, arguments);
  va_end(arguments);
  machine.error = text;
  for (;;) to_scheduler();  // never resumed
}

cudaError_t run(const std::function<void()>& kernel, unsigned blocks, unsigned threads, unsigned cluster,
                size_t shared) {
  machine.kernel = &kernel;
  machine.threads.x = threads;
  machine.grid.x = blocks;
  machine.cluster = cluster;
#if defined(__SANITIZE_ADDRESS__)
  if (!machine.error.empty())  // fibers that were left in the middle have left their stacks' guards behind
    for (auto& fiber : machine.fibers) __asan_unpoison_memory_region(fiber->stack.get(), kStack);
#endif
  machine.error.clear();
  if (threads % kWarp || blocks % cluster) machine.error = "blocks are whole warps, grids whole clusters";
  machine.fibers.resize(size_t{threads} * cluster);
  for (auto& fiber : machine.fibers) {
    if (fiber) continue;
    fiber = std::make_unique<Fiber>();
    fiber->stack.reset(new char[kStack]);
  }
  machine.scheduler_thread = this_thread();
  for (unsigned block = 0; block < blocks && machine.error.empty(); block += cluster) run_cluster(block, shared);
  for (auto& fiber : machine.fibers) {  // also those that were left in the middle
    become(fiber->as_thread);
    publish(&machine.finished);
  }
  become(machine.scheduler_thread);
  see(&machine.finished);
  machine.blocks.clear();
  return machine.error.empty() ? cudaSuccess : cudaErrorAssert;
}

}  // namespace simt

const char* cudaGetErrorString(cudaError_t) { return simt::machine.error.c_str(); }

// FUSED_LOSSES_SIMT_CAPABILITY: the major compute capability, with or without clusters. FUSED_LOSSES_SIMT_SHARED and
// FUSED_LOSSES_SIMT_MULTIPROCESSOR: bytes of shared memory for a block and for all of a multiprocessor's.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto from = [](const char* variable, int otherwise) {
    const char* text = std::getenv(variable);
    return text ? std::atoi(text) : otherwise;
  };
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = from("FUSED_LOSSES_SIMT_SHARED", 99 << 10); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = from("FUSED_LOSSES_SIMT_MULTIPROCESSOR", 150 << 10);
      break;
    case cudaDevAttrMultiProcessorCount: *value = 1; break;
    case cudaDevAttrComputeCapabilityMajor: *value = from("FUSED_LOSSES_SIMT_CAPABILITY", 9); break;
  }
  return cudaSuccess;
}

namespace fused_losses::cuda {

float off(double error, double exact, float x) {
  if (!std::isfinite(exact) || exact == 0 || exact == 1) return static_cast<float>(exact);
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits ^ bits >> 16) * 0x7feb352du;  // lowbias32, by Chris Wellons
  bits = (bits ^ bits >> 15) * 0x846ca68bu;
  return static_cast<float>(exact + error * ((bits ^ bits >> 16) * 0x1p-31 - 1));
}

float off_ulps(double ulps, double exact, float x) {
  int exponent;
  std::frexp(exact, &exponent);
  // Half a unit is the rounding to float; and no function crosses 0.
  return off(std::fmin(std::ldexp(ulps - 0.5, std::max(exponent - 24, -149)), std::fabs(exact)), exact, x);
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const float fraction = static_cast<float>(bits & 1023) / 1024;
  const float value = exponent == 0    ? std::ldexp(fraction, -14)
                      : exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
                                       : std::ldexp(1 + fraction, exponent - 15);
  return bits & 0x8000 ? -value : value;
}

uint16_t float_to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // nearest, ties to even
}

uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);
  exponent = std::max(exponent, -13);
  // In units of the last place there; a mantissa that rounds up to 2048 is the next exponent's first.
  const auto units = static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return sign | static_cast<uint16_t>(units + (units >= 1024 ? (exponent + 13) << 10 : 0));
}

}  // namespace fused_losses::cuda
