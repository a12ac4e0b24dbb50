#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "philox.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dgf {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

DGF_HD int item_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

DGF_HD float bf16_to_float(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

// Round to nearest even; NaN stays NaN.
DGF_HD uint16_t float_to_bf16(float value) {
#if defined(__CUDA_ARCH__)
  // Two at a time is the faster instruction, even for one.
  return __bfloat16_as_ushort(__floats2bfloat162_rn(value, 0.0f).x);
#else
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(nan ? 0x7FC0u : rounded);
#endif
}

DGF_HD float half_to_float(uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#else
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  // Multiplying by 2^112 moves the exponent bias and makes half subnormals normal, exactly.
  const float scaled = bits_float(magnitude) * 5.192296858534828e33f;
  const uint32_t special = magnitude | 0x7F800000u;
  return bits_float((magnitude >= 0x0F800000u ? special : float_bits(scaled)) | sign);
#endif
}

// Round to nearest even, with subnormals, overflow to infinity, and NaN kept.
DGF_HD uint16_t float_to_half(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lines a subnormal's last bit up with the float's, so that the float addition does the rounding.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  return static_cast<uint16_t>(result | sign);
#endif
}

// Rounds values in place to what `dtype` can hold: what a later read of the stored value will see.
template <typename S>
DGF_HD void round_to(DType dtype, int64_t n, S* values) {
  switch (dtype) {
    case DType::f32:
      if (!std::is_same<S, float>::value)
        for (int64_t i = 0; i < n; ++i) values[i] = static_cast<S>(static_cast<float>(values[i]));
      return;
    case DType::f64:
      return;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i)
        values[i] = static_cast<S>(bf16_to_float(float_to_bf16(static_cast<float>(values[i]))));
      return;
    case DType::f16:
      for (int64_t i = 0; i < n; ++i)
        values[i] = static_cast<S>(half_to_float(float_to_half(static_cast<float>(values[i]))));
      return;
  }
}

}  // namespace dgf
