#pragma once

#include <cstdint>

#include "vector.h"

namespace dgf {

// The order of every sum is fixed by the element's place in its sample: lanes of a chunk, chunks of a block, blocks of
// a sample. Batch size, batch position and thread count never enter.
constexpr int kLanes = 16;
constexpr int64_t kChunk = 512;
constexpr int64_t kBlock = 16384;

inline int64_t block_count(int64_t numel) { return (numel + kBlock - 1) / kBlock; }

template <typename Body>
void for_each_chunk(int64_t block, int64_t numel, Body&& body) {
  const int64_t end = (block + 1) * kBlock < numel ? (block + 1) * kBlock : numel;
  for (int64_t begin = block * kBlock; begin < end; begin += kChunk)
    body(begin, end - begin < kChunk ? end - begin : kChunk);
}

// Squares are summed in the compute type over one chunk's lanes (at most 32 terms each), then in double.
template <typename S>
class LaneSum {
 public:
  void add_squares(const S* values, int64_t n) {
    // Vectors of the build's own width: GCC keeps wider ones in memory instead of registers.
    constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(S));
    constexpr int kVectors = kLanes / kWidth;
    typedef S Vector __attribute__((vector_size(kVectorBytes)));
    Vector lanes[kVectors] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int k = 0; k < kVectors; ++k) {
        Vector v;
        __builtin_memcpy(&v, values + i + k * kWidth, sizeof(v));
        lanes[k] += v * v;
      }
    }
    for (int lane = 0; i + lane < n; ++lane) lanes[lane / kWidth][lane % kWidth] += values[i + lane] * values[i + lane];
    for (int lane = 0; lane < kLanes; ++lane) sums_[lane] += static_cast<double>(lanes[lane / kWidth][lane % kWidth]);
  }

  double total() const {
    double pairs[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) pairs[lane] = sums_[lane];
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int lane = 0; lane < width; ++lane) pairs[lane] += pairs[lane + width];
    return pairs[0];
  }

 private:
  double sums_[kLanes] = {};
};

inline double ordered_sum(const double* values, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += values[i];
  return sum;
}

}  // namespace dgf
