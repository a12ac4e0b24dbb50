#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace dgf {

struct Uint4 {
  uint32_t x, y, z, w;
};

struct Normal4 {
  float x, y, z, w;
};

DGF_HD uint32_t high_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

// Philox 4x32-10 (Salmon et al., SC 2011).
DGF_HD Uint4 philox4x32_10(Uint4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = high_product(counter.x, 0xD2511F53u), lo0 = counter.x * 0xD2511F53u;
    const uint32_t hi1 = high_product(counter.z, 0xCD9E8D57u), lo1 = counter.z * 0xCD9E8D57u;
    counter = Uint4{hi1 ^ counter.y ^ key0, lo1, hi0 ^ counter.w ^ key1, lo0};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

DGF_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

DGF_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Natural logarithm of a normal, positive float (Cephes logf): no libm call, so every platform draws the same noise.
DGF_HD float log_positive(float x) {
  const uint32_t bits = float_bits(x);
  int32_t exponent = static_cast<int32_t>(bits >> 23) - 126;
  float m = bits_float((bits & 0x007FFFFFu) | 0x3F000000u);
  const bool low = m < 0.707106781186547524f;
  exponent = low ? exponent - 1 : exponent;
  m = (low ? m + m : m) - 1.0f;
  const float z = m * m;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z;
  const float e = static_cast<float>(exponent);
  y = y - 2.12194440e-4f * e;
  y = y - 0.5f * z;
  return (m + y) + 0.693359375f * e;
}

// Box-Muller on two words: the radius from the first (in (0, 1], never 0), the angle from the second as a fraction of a
// turn in fixed point, reduced to an eighth of a turn before the polynomials.
DGF_HD void box_muller(uint32_t radius_word, uint32_t angle_word, float* first, float* second) {
  const float uniform = static_cast<float>(radius_word) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  const float squared = -2.0f * log_positive(uniform);
  const float radius = sqrtf(squared > 0.0f ? squared : 0.0f);
  const uint32_t quadrant = (angle_word + 0x20000000u) >> 30;
  const float t = static_cast<float>(static_cast<int32_t>(angle_word - (quadrant << 30))) * 1.4629180792671596e-9f;
  const float z = t * t;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * t + t;
  const float c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  const bool odd = (quadrant & 1u) != 0;
  const float cosine = odd ? s : c;
  const float sine = odd ? c : s;
  const uint32_t cos_sign = ((quadrant + 1u) & 2u) << 30;
  const uint32_t sin_sign = (quadrant & 2u) << 30;
  *first = radius * bits_float(float_bits(cosine) ^ cos_sign);
  *second = radius * bits_float(float_bits(sine) ^ sin_sign);
}

// Standard normals of elements 4 * block .. 4 * block + 3 of one sample at one step.
DGF_HD Normal4 normal4(uint64_t seed, uint64_t sample, uint32_t step, uint32_t block) {
  const Uint4 bits =
      philox4x32_10(Uint4{block, step, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32)},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  Normal4 out;
  box_muller(bits.x, bits.y, &out.x, &out.y);
  box_muller(bits.z, bits.w, &out.z, &out.w);
  return out;
}

}  // namespace dgf
