// Prefetching while computing: see the drawing at PrefetchQueue in kernels.h.
//
// take_piece names the piece for the next inner loop; prefetch_lines, called in every step of that
// loop, prefetches a few cache lines of it.

#pragma once

#include "kernels.h"

namespace {  // internal linkage, as in simd.h

constexpr int LINE_BYTES = 64;

// Takes the next piece off the queue; `otherwise`, memory that is cached anyway, when there is
// none.
inline const char* take_piece(socpo::PrefetchQueue& queue, const void* otherwise) {
  if (queue.count == 0) return (const char*)otherwise;
  --queue.count;
  return queue.pieces++->from;
}

// Prefetches the LINES lines of a piece that belong to this step.
template <int LINES>
inline void prefetch_lines(const char* piece, int64_t step) {
  for (int line = 0; line < LINES; ++line)
    __builtin_prefetch(piece + (step * LINES + line) * LINE_BYTES % socpo::PIECE_BYTES);
  asm volatile("");  // gcc drops calls of functions that do nothing but prefetch
}

}  // namespace
