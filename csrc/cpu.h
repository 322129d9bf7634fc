// Shared by the CPU ops: the SIMD functions of this machine, and loops that split work among
// threads.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "simd/kernels.h"

namespace socpo {

// Returns the functions of csrc/simd for torch's own choice of instruction set, which the
// environment variable ATEN_CPU_CAPABILITY lowers.
const Kernels& kernels();

// Calls work(begin, end, state) for ranges of items 0 .. num_items - 1, with one state per thread.
//
// A thread takes the next range when it is free. Which thread runs an item is therefore left to
// chance, and an item's result must not depend on it. Ranges shrink towards the end: long ones read
// memory in order, short ones let all threads end at about the same time. `longest` limits them
// where items differ in cost.
template <typename MakeState, typename Work>
void for_each_range(int64_t num_items, int64_t longest, const MakeState& make_state,
                    const Work& work) {
  const int64_t num_threads = at::get_num_threads();
  std::atomic<int64_t> next{0};
  // The range that parallel_for hands out is ignored: each thread works until no item is left.
  at::parallel_for(0, std::min(num_items, num_threads), 1, [&](int64_t, int64_t) {
    auto state = make_state();
    for (int64_t begin = next; begin < num_items;) {
      const int64_t end =
          begin + std::clamp<int64_t>((num_items - begin) / (2 * num_threads), 1, longest);
      if (next.compare_exchange_weak(begin, end)) {
        work(begin, end, state);
        begin = next;
      }
    }
  });
}

// Calls work(item) for every item; a thread takes them one by one.
template <typename Work>
void for_each_item(int64_t num_items, const Work& work) {
  for_each_range(num_items, 1, [] { return 0; }, [&](int64_t item, int64_t, int) { work(item); });
}

// Calls work(begin, end) for rows of `row_cost` elements each, on several threads only where it
// pays.
template <typename Work>
void for_rows(int64_t num_rows, int64_t row_cost, const Work& work) {
  // Elements a thread should have: waking a thread costs as much as a few thousand elements.
  constexpr int64_t grain = 16384;
  at::parallel_for(0, num_rows, std::max<int64_t>(1, grain / std::max<int64_t>(1, row_cost)), work);
}

}  // namespace socpo
