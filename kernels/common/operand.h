#pragma once

#include <cstdint>

#include "dtype.h"

namespace dgf {

constexpr int kMaxDims = 8;

// One tensor seen as [batch, elements in logical order]: sizes and strides are of the dimensions after the batch.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch_stride = 0;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  DGF_HD bool present() const { return data != nullptr; }

  // Merges dimensions that step evenly, so that a contiguous sample becomes one run.
  void collapse() {
    int out = 0;
    for (int d = 0; d < ndim; ++d) {
      if (size[d] == 1) continue;
      if (out > 0 && stride[out - 1] == size[d] * stride[d]) {
        size[out - 1] *= size[d];
        stride[out - 1] = stride[d];
      } else {
        size[out] = size[d];
        stride[out] = stride[d];
        ++out;
      }
    }
    if (out == 0) {
      size[0] = 1;
      stride[0] = 1;
      out = 1;
    }
    ndim = out;
  }

  DGF_HD bool contiguous() const { return ndim == 1 && stride[0] == 1; }

  DGF_HD char* address(int64_t batch, int64_t offset) const {
    return static_cast<char*>(data) + (batch * batch_stride + offset) * item_size(dtype);
  }
};

}  // namespace dgf
