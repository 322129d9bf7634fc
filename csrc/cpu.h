// What the CPU ops share: the instruction set of this machine, and a loop over work items of uneven cost.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "simd/kernels.h"

namespace socpo {

// The functions of csrc/simd for one instruction set.
struct Kernels {
  decltype(&baseline::tile_max) tile_max;
  decltype(&baseline::tile_weights) tile_weights;
  decltype(&baseline::tile_draw) tile_draw;
  decltype(&baseline::linear_block) linear_block;
  decltype(&baseline::pack_panel) pack_panel;
  decltype(&baseline::rms_norm_row) rms_norm_row;
  decltype(&baseline::rms_norm_backward_row) rms_norm_backward_row;
  decltype(&baseline::swiglu_row) swiglu_row;
  decltype(&baseline::swiglu_backward_row) swiglu_backward_row;
  decltype(&baseline::rotary_head) rotary_head;
  decltype(&baseline::narrow_row) narrow_row;
  decltype(&baseline::attend_split) attend_split;
  decltype(&baseline::merge_partials) merge_partials;
  decltype(&baseline::finish_rows) finish_rows;
  decltype(&baseline::row_sums) row_sums;
  decltype(&baseline::row_gradient) row_gradient;
  decltype(&baseline::softmax_row) softmax_row;
  decltype(&baseline::softmax_backward_row) softmax_backward_row;
  decltype(&baseline::adamw_range) adamw_range;
};

// Those for torch's own choice of instruction set (the environment's ATEN_CPU_CAPABILITY lowers it).
const Kernels& kernels();

// work(begin, end, state) over items 0 .. num_items - 1, with a state of each thread's own. Threads take the next range
// when free: which thread runs an item is chance, so an item's result must not depend on it. Ranges hold at most `longest`
// items, few where items differ in cost, and shrink towards the end: long ones read memory in order, short ones let
// threads end together.
template <typename MakeState, typename Work>
void for_each_range(int64_t num_items, int64_t longest, const MakeState& make_state, const Work& work) {
  const int64_t num_threads = at::get_num_threads();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(num_items, num_threads), 1, [&](int64_t, int64_t) {  // whoever comes works until all is done
    auto state = make_state();
    for (int64_t begin = next; begin < num_items;) {
      const int64_t end = begin + std::clamp<int64_t>((num_items - begin) / (2 * num_threads), 1, longest);
      if (next.compare_exchange_weak(begin, end)) {
        work(begin, end, state);
        begin = next;
      }
    }
  });
}

// work(item), taken one by one.
template <typename Work>
void for_each_item(int64_t num_items, const Work& work) {
  for_each_range(num_items, 1, [] { return 0; }, [&](int64_t item, int64_t, int) { work(item); });
}

// work(begin, end) over rows of `row_cost` elements each, split among threads only where that pays.
template <typename Work>
void for_rows(int64_t num_rows, int64_t row_cost, const Work& work) {
  constexpr int64_t grain = 16384;  // elements a thread should have: waking one costs as much as a few thousand
  at::parallel_for(0, num_rows, std::max<int64_t>(1, grain / std::max<int64_t>(1, row_cost)), work);
}

}  // namespace socpo
