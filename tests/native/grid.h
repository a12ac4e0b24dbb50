#pragma once

// What the grid tests share: tensors of exactly their size, a grid run by the host, and a table.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../../kernels/policy_loss/cpu.h"
#include "../../kernels/policy_loss/cuda.cuh"
#include "../../kernels/transition/cpu.h"
#include "../../kernels/transition/cuda.cuh"

namespace dgf {

inline int failures = 0, checks = 0;
inline std::string context;

inline void expect(bool holds, const char* what) {
  ++checks;
  if (holds) return;
  if (++failures <= 20) std::printf("FAILED %s: %s\n", context.c_str(), what);
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

enum Layout { kPacked, kShifted, kPadded, kTransposed, kStretched, kReversedDims, kLayouts };
inline const char* const kLayoutNames[] = {"packed", "shifted", "padded", "transposed", "stretched", "reversed"};

// A tensor [batch, numel] in its own memory; numel is factored into up to three dimensions.
struct Tensor {
  std::vector<char> bytes;
  Operand operand;

  Operand on(std::vector<char>& other) const {
    Operand moved = operand;
    moved.data = other.data() + (static_cast<char*>(operand.data) - bytes.data());
    return moved;
  }
};

inline std::vector<int64_t> factored(int64_t numel) {
  std::vector<int64_t> sizes;
  for (int64_t f : {2, 3, 5, 7})
    while (sizes.size() < 2 && numel % f == 0 && numel > f) {
      sizes.push_back(f);
      numel /= f;
    }
  sizes.push_back(numel);
  return sizes;
}

// An operand keeps the address of its tensor's bytes, so tensors are made in place and never copied.
inline void make(Tensor& t, int64_t batch, int64_t numel, DType dtype, Layout layout,
                 const std::function<double()>& draw) {
  Operand& o = t.operand;
  o = Operand();
  o.dtype = dtype;
  const std::vector<int64_t> sizes = factored(numel);
  o.ndim = static_cast<int>(sizes.size());
  int64_t stride = layout == kStretched ? 2 : 1;
  for (int i = 0; i < o.ndim; ++i) {
    const int d = layout == kTransposed || layout == kReversedDims ? i : o.ndim - 1 - i;
    o.size[d] = sizes[static_cast<size_t>(d)];
    o.stride[d] = stride;
    stride *= o.size[d];
  }
  o.batch_stride = layout == kPadded ? (stride + 8) / 8 * 8 : stride;  // aligned samples of any length
  if (layout == kReversedDims) {                                       // the batch innermost
    for (int d = 0; d < o.ndim; ++d) o.stride[d] *= batch;
    o.batch_stride = 1;
  }
  const int64_t shift = layout == kShifted ? 1 : 0;
  int64_t last = shift + (batch - 1) * o.batch_stride;
  for (int d = 0; d < o.ndim; ++d) last += (o.size[d] - 1) * o.stride[d];
  const int64_t size = item_size(dtype);
  t.bytes.assign(static_cast<size_t>((last + 1) * size), char(0x5A));
  o.data = t.bytes.data() + shift * size;
  o.collapse();
  for (int64_t b = 0; b < batch && draw; ++b)
    for (int64_t i = 0; i < numel; ++i) write_element<double>(o, b, i, draw());
}

// Blocks run in order or shuffled, each in shared memory full of garbage.
template <typename Shared, typename Block>
void run_grid(int64_t units, int order, Block&& block) {
  lane_order = order == 0 ? LaneOrder{1, 0} : LaneOrder{97, 31};
  std::vector<int64_t> sequence(static_cast<size_t>(units));
  for (int64_t i = 0; i < units; ++i) sequence[static_cast<size_t>(i)] = i;
  if (order != 0) std::shuffle(sequence.begin(), sequence.end(), std::mt19937(static_cast<uint32_t>(units)));
  std::vector<Shared> shared(1);
  for (const int64_t unit : sequence) {
    std::memset(static_cast<void*>(shared.data()), 0xA5, sizeof(Shared));
    block(unit, shared[0]);
  }
}

// Tickets that all launches share, as those of one stream do, and scratch full of garbage.
struct Room {
  static std::vector<uint32_t>& tickets() {
    static std::vector<uint32_t> shared(128, 0);
    return shared;
  }

  std::vector<double> scratch;
  Workspace workspace;

  Room(int64_t batch, int64_t numel) : scratch(static_cast<size_t>(scratch_size(batch, numel)), std::nan("")) {
    workspace.ticket = tickets().data();
    workspace.scratch = scratch.data();
  }

  bool tickets_are_back() const { return tickets() == std::vector<uint32_t>(tickets().size(), 0); }
};

constexpr int64_t kRows = 4, kNoiseless = 2;

template <typename S>
std::vector<S> table(bool exact) {
  std::vector<S> rows;
  for (int r = 0; r < kRows; ++r) {
    const double b = exact ? -0.5 : -0.21 * (r + 1), tau = r == kNoiseless ? 0.0 : exact ? 0.5 : 0.31 + 0.1 * r;
    const double scale = tau == 0.0 ? 0.0 : -0.5 / (tau * tau), constant = tau == 0.0 ? 0.0 : -std::log(tau) - 0.92;
    const double drift = exact ? -0.25 : -0.1, weight = 1.0, q = exact ? -0.5 : -0.8;
    const double denoised_weight = exact ? 0.5 : 0.137 * (r + 1);
    for (double v : {exact ? 1.0 : 0.97, b, tau, 1.0, q, scale, constant, drift, weight, denoised_weight, 0.125})
      rows.push_back(static_cast<S>(v));
  }
  return rows;
}

}  // namespace dgf
