#include "torch/kept_memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>

#include <array>
#include <atomic>
#endif

namespace fused_losses {

#if defined(__linux__)
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kMostBytes = int64_t{4} << 30;  // of a block that is kept
// In all, that the system may not empty: as much as glibc's own heap keeps. To let it takes 10 us a huge page.
constexpr int64_t kHeldBytes = 64 << 20;

struct Block {
  void* data;
  int64_t bytes;
};

// Blocks in no tensor's use. Each is held by whoever has exchanged it out of its place, so that no lock is needed, none
// that a fork could leave locked.
std::array<std::atomic<Block*>, 16> kept{};
std::atomic<unsigned> oldest{0};
std::atomic<int64_t> kept_bytes{0};

void unmap(Block* block) {
  munmap(block->data, block->bytes);
  delete block;
}

// Huge pages from its first byte on: one page fault for 512, and none of the ends is in small ones.
Block* map(int64_t bytes) {
  constexpr int64_t small_page = 4096;
  bytes = (bytes + small_page - 1) / small_page * small_page;
  void* const all = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(all);
  const int64_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + bytes, kHugePage - before);
  madvise(begin + before, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // advice: a refusal changes nothing
  return new Block{begin + before, bytes};
}

// The block in a place, if any, which is then the caller's.
Block* leave(std::atomic<Block*>& place, Block* for_another = nullptr) {
  Block* const block = place.exchange(for_another);
  if (block) kept_bytes -= block->bytes;
  return block;
}

bool put(std::atomic<Block*>& place, Block* block) {
  Block* none = nullptr;
  const bool was_free = place.compare_exchange_strong(none, block);
  if (was_free) kept_bytes += block->bytes;
  return was_free;
}

// `ulimit -v`: what the system takes back by itself are pages, and no addresses.
bool addresses_are_limited() {
  for (const auto resource : {RLIMIT_AS, RLIMIT_DATA}) {
    rlimit limit;
    if (getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return true;
  }
  return false;
}

void keep(Block* block) {
  if (block->bytes > kMostBytes) return unmap(block);
  if (kept_bytes + block->bytes > kHeldBytes) {
    if (addresses_are_limited()) return unmap(block);
    madvise(block->data, block->bytes, MADV_FREE);
  }
  for (auto& place : kept)
    if (put(place, block)) return;
  kept_bytes += block->bytes;
  if (Block* const other = leave(kept[oldest++ % kept.size()], block)) unmap(other);
}

// A kept block that is large enough, and not more than twice as large.
Block* take(int64_t bytes) {
  for (auto& place : kept) {
    Block* const block = leave(place);
    if (!block) continue;
    if (block->bytes >= bytes && block->bytes / 2 <= bytes) return block;
    if (!put(place, block)) unmap(block);
  }
  return nullptr;
}

}  // namespace

std::optional<Tensor> tensor_in_kept_memory(Sizes sizes, Sizes strides, int32_t dtype, int64_t bytes) {
  Block* block = take(bytes);
  if (!block) block = map(bytes);
  if (!block) return std::nullopt;
  AtenTensorHandle handle;
  const auto keep_again = [](void*, void* block) { keep(static_cast<Block*>(block)); };
  const auto error = torch_from_blob(block->data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                                     dtype, aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                                     nullptr, 0, keep_again, block);
  if (error) {
    keep(block);
    return std::nullopt;
  }
  return Tensor(handle);
}

void release_kept_memory() {
  for (auto& place : kept)
    if (Block* const block = leave(place)) unmap(block);
}

#else
std::optional<Tensor> tensor_in_kept_memory(Sizes, Sizes, int32_t, int64_t) { return std::nullopt; }
void release_kept_memory() {}
#endif

}  // namespace fused_losses
