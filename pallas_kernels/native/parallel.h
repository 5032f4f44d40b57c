// Work shared among the threads that XLA computes with.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace native {

// Calls work(item) for every item in [0, items), on this thread and on those of the pool. Whoever is free takes the next
// item, so that it does not matter when, or whether, another thread starts. Returns when all are done.
template <class Work>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t items, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  if (items <= 0) return;
  auto shared = std::make_shared<Shared>();
  // A task that starts late finds no item, and then touches nothing but `shared`.
  const auto take_all = [items, &work](Shared& s) {
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      work(i);
      s.done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), items) - 1;
  for (int64_t h = 0; h < helpers; ++h) pool.Schedule([shared, take_all] { take_all(*shared); });
  take_all(*shared);
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < items; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace native
