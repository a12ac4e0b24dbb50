#pragma once

#include <cstdint>

#include "host_device.h"

namespace dgf {

// A kernel for a GPU is written as a function of one block, in phases over its lanes, so that the host can run the very
// same grid in a test: a lane is a thread there, and a turn of a loop here.
constexpr int kThreads = 256;
constexpr int kWidth = 8;  // consecutive elements of a lane: 16 bytes of a half-precision operand
constexpr int kPart = 4;   // of them in registers at once: one Philox block, 16 bytes of float32
constexpr int kWindows =
    4;  // such runs of a lane, one after the other: what a block costs beside them is spread thinner
// Elements of one block. Sums are taken tile by tile, so this must not depend on the batch.
constexpr int64_t kTile = int64_t{kThreads} * kWidth * kWindows;
constexpr int kSumRows = 16;
// Blocks a multiprocessor must have room for: up to 128 registers a thread, so that none are spilled.
constexpr int kMinBlocks = 2;

DGF_HD int64_t tile_count(int64_t numel) { return (numel + kTile - 1) / kTile; }

#if !defined(__CUDA_ARCH__)
// Tests run the lanes of a phase in another order: lane i runs as (i * stride + first) % kThreads, stride odd.
struct LaneOrder {
  int stride = 1, first = 0;
};
inline LaneOrder lane_order;
#endif

// Every lane runs body(lane), then all wait for each other. What one phase leaves for the next lies in shared memory.
template <typename Body>
DGF_HD void for_lanes(Body&& body) {
#if defined(__CUDA_ARCH__)
  body(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int i = 0; i < kThreads; ++i) body((i * lane_order.stride + lane_order.first) % kThreads);
#endif
}

// Takes a ticket: true for the last of `count` callers, who finds everything the others wrote, and leaves it at zero.
DGF_HD bool last_of(uint32_t* ticket, int64_t count) {
#if defined(__CUDA_ARCH__)
  __threadfence();
  const uint32_t last = static_cast<uint32_t>(count - 1);
  const bool found = atomicInc(ticket, last) == last;
  __threadfence();
  return found;
#else
  const bool found = static_cast<int64_t>(*ticket) == count - 1;
  *ticket = found ? 0 : *ticket + 1;
  return found;
#endif
}

// What another block wrote; the first-level cache may hold older bytes.
DGF_HD double read_shared_result(const double* address) {
#if defined(__CUDA_ARCH__)
  return __ldcg(address);
#else
  return *address;
#endif
}

// A launch's room in global memory: `ticket` [batch + 1] is zero before and after every launch.
struct Workspace {
  uint32_t* ticket = nullptr;
  double* scratch = nullptr;
};

// N sums over a block, and over the blocks of a sample.
template <int N>
struct BlockSum {
  double lane[N][kThreads];
  double row[N][kSumRows];
  double total[N];
  bool last;
};

// Every lane's value, in one fixed order: 16 rows of lanes, then the rows.
template <int N>
DGF_HD void sum_lanes(BlockSum<N>& s) {
  static_assert(N * kSumRows <= kThreads, "one lane a row");
  for_lanes([&](int lane) {
    if (lane >= N * kSumRows) return;
    const int k = lane / kSumRows, first = lane % kSumRows;
    double sum = 0.0;
    for (int i = first; i < kThreads; i += kSumRows) sum += s.lane[k][i];
    s.row[k][first] = sum;
  });
  for_lanes([&](int lane) {
    if (lane >= N) return;
    double sum = 0.0;
    for (int i = 0; i < kSumRows; ++i) sum += s.row[lane][i];
    s.total[lane] = sum;
  });
}

// Adds up the lanes' values over all tiles of sample b; true in the one block that then holds the totals.
template <int N>
DGF_HD bool sum_sample(BlockSum<N>& s, const Workspace& w, int64_t b, int64_t tile, int64_t tiles) {
  sum_lanes(s);
  if (tiles == 1) return true;
  for_lanes([&](int lane) {
    if (lane != 0) return;
    for (int k = 0; k < N; ++k) w.scratch[(b * tiles + tile) * N + k] = s.total[k];
    s.last = last_of(w.ticket + b, tiles);
  });
  if (!s.last) return false;
  for_lanes([&](int lane) {
    for (int k = 0; k < N; ++k) {
      double sum = 0.0;
      for (int64_t t = lane; t < tiles; t += kThreads) sum += read_shared_result(w.scratch + (b * tiles + t) * N + k);
      s.lane[k][lane] = sum;
    }
  });
  sum_lanes(s);
  return true;
}

}  // namespace dgf
