#pragma once

#include <cstdint>
#include <type_traits>

#include "operand.h"

namespace dgf {

template <typename S>
void read_run(const char* source, DType dtype, int64_t stride, int64_t n, S* out) {
  switch (dtype) {
    case DType::f32: {
      const float* p = reinterpret_cast<const float*>(source);
      if (stride == 1)
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(p[i]);
      else
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(p[i * stride]);
      return;
    }
    case DType::f64: {
      const double* p = reinterpret_cast<const double*>(source);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(p[i * stride]);
      return;
    }
    case DType::bf16: {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(source);
      if (stride == 1)
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(bf16_to_float(p[i]));
      else
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(bf16_to_float(p[i * stride]));
      return;
    }
    case DType::f16: {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(source);
      if (stride == 1)
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(half_to_float(p[i]));
      else
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(half_to_float(p[i * stride]));
      return;
    }
  }
}

template <typename S>
void write_run(char* target, DType dtype, int64_t stride, int64_t n, const S* in) {
  switch (dtype) {
    case DType::f32: {
      float* p = reinterpret_cast<float*>(target);
      if (stride == 1)
        for (int64_t i = 0; i < n; ++i) p[i] = static_cast<float>(in[i]);
      else
        for (int64_t i = 0; i < n; ++i) p[i * stride] = static_cast<float>(in[i]);
      return;
    }
    case DType::f64: {
      double* p = reinterpret_cast<double*>(target);
      for (int64_t i = 0; i < n; ++i) p[i * stride] = static_cast<double>(in[i]);
      return;
    }
    case DType::bf16: {
      uint16_t* p = reinterpret_cast<uint16_t*>(target);
      if (stride == 1)
        for (int64_t i = 0; i < n; ++i) p[i] = float_to_bf16(static_cast<float>(in[i]));
      else
        for (int64_t i = 0; i < n; ++i) p[i * stride] = float_to_bf16(static_cast<float>(in[i]));
      return;
    }
    case DType::f16: {
      uint16_t* p = reinterpret_cast<uint16_t*>(target);
      if (stride == 1)
        for (int64_t i = 0; i < n; ++i) p[i] = float_to_half(static_cast<float>(in[i]));
      else
        for (int64_t i = 0; i < n; ++i) p[i * stride] = float_to_half(static_cast<float>(in[i]));
      return;
    }
  }
}

// Calls run(address, stride, first, count) for each evenly spaced run of elements begin .. begin + n of a sample.
template <typename Run>
void for_each_run(const Operand& t, int64_t batch, int64_t begin, int64_t n, Run&& run) {
  if (t.ndim == 1) {
    run(t.address(batch, begin * t.stride[0]), t.stride[0], int64_t{0}, n);
    return;
  }
  int64_t index[kMaxDims];
  int64_t rest = begin;
  for (int d = t.ndim - 1; d >= 0; --d) {
    index[d] = rest % t.size[d];
    rest /= t.size[d];
  }
  const int last = t.ndim - 1;
  for (int64_t done = 0; done < n;) {
    int64_t offset = 0;
    for (int d = 0; d < t.ndim; ++d) offset += index[d] * t.stride[d];
    const int64_t left = t.size[last] - index[last];
    const int64_t count = left < n - done ? left : n - done;
    run(t.address(batch, offset), t.stride[last], done, count);
    done += count;
    index[last] += count;
    for (int d = last; d > 0 && index[d] == t.size[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Elements begin .. begin + n of a sample in the compute type: in place where they already are, else through `buffer`.
template <typename S>
const S* load(const Operand& t, int64_t batch, int64_t begin, int64_t n, S* buffer) {
  const bool same = t.dtype == (std::is_same<S, double>::value ? DType::f64 : DType::f32);
  if (same && t.contiguous()) return reinterpret_cast<const S*>(t.address(batch, begin));
  for_each_run(t, batch, begin, n, [&](const char* source, int64_t stride, int64_t first, int64_t count) {
    read_run(source, t.dtype, stride, count, buffer + first);
  });
  return buffer;
}

// Where to compute a chunk that `store` will write: in place where the operand can hold it as it is, else `buffer`.
template <typename S>
S* target(const Operand& t, int64_t batch, int64_t begin, S* buffer) {
  const bool same = t.dtype == (std::is_same<S, double>::value ? DType::f64 : DType::f32);
  return same && t.contiguous() ? reinterpret_cast<S*>(t.address(batch, begin)) : buffer;
}

template <typename S>
void store(const Operand& t, int64_t batch, int64_t begin, int64_t n, const S* values) {
  if (reinterpret_cast<const char*>(values) == t.address(batch, begin)) return;
  for_each_run(t, batch, begin, n, [&](char* target, int64_t stride, int64_t first, int64_t count) {
    write_run(target, t.dtype, stride, count, values + first);
  });
}

}  // namespace dgf
