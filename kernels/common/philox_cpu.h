#pragma once

#include "philox.h"
#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dgf {

// Philox blocks first .. first + count - 1, the bits of philox4x32_10, as the words of Box-Muller pairs: block i writes
// pairs 2 i and 2 i + 1. The arrays have room for `count` rounded up to kPhiloxStride blocks.
constexpr int kPhiloxStride = 32;

#if defined(__x86_64__)
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

// Products of the lanes' low halves. Intrinsics, because GCC multiplies whole 64-bit lanes for the C expression.
inline Words multiply_low_halves(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

inline void philox_pairs(uint64_t seed, uint64_t sample, uint32_t step, uint32_t first, int count, uint32_t* radius,
                         uint32_t* angle) {
  // One word a 64-bit lane: a product's low word needs no shift, as whatever is above 32 bits is ignored. Four vectors
  // at a time, because one round waits for the round before it.
  constexpr int kAtOnce = 4, kBlocks = kVectorBytes / 8;
  static_assert(kPhiloxStride % (kAtOnce * kBlocks) == 0, "a stride is whole vectors");
  const Words low_half = Words{} + 0xFFFFFFFFu, multiplier0 = Words{} + 0xD2511F53u,
              multiplier1 = Words{} + 0xCD9E8D57u;
  Words lane;
  for (int i = 0; i < kBlocks; ++i) lane[i] = static_cast<uint64_t>(i);
  for (int done = 0; done < count; done += kAtOnce * kBlocks) {
    Words x[kAtOnce], y[kAtOnce], z[kAtOnce], w[kAtOnce];
#pragma GCC unroll 4
    for (int k = 0; k < kAtOnce; ++k) {
      x[k] = lane + (static_cast<uint64_t>(first) + static_cast<uint64_t>(done + k * kBlocks));
      y[k] = Words{} + step;
      z[k] = Words{} + (sample & 0xFFFFFFFFu);
      w[k] = Words{} + (sample >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int k = 0; k < kAtOnce; ++k) {
        const Words p0 = multiply_low_halves(x[k], multiplier0), p1 = multiply_low_halves(z[k], multiplier1);
        x[k] = (p1 >> 32) ^ y[k] ^ key0;
        y[k] = p1;
        z[k] = (p0 >> 32) ^ w[k] ^ key1;
        w[k] = p0;
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
#pragma GCC unroll 4
    for (int k = 0; k < kAtOnce; ++k) {
      const Words radii = (x[k] & low_half) | (z[k] << 32), angles = (y[k] & low_half) | (w[k] << 32);
      memcpy(radius + 2 * (done + k * kBlocks), &radii, sizeof(radii));
      memcpy(angle + 2 * (done + k * kBlocks), &angles, sizeof(angles));
    }
  }
}
#else
inline void philox_pairs(uint64_t seed, uint64_t sample, uint32_t step, uint32_t first, int count, uint32_t* radius,
                         uint32_t* angle) {
  for (int i = 0; i < count; ++i) {
    const Uint4 bits = philox4x32_10(Uint4{first + static_cast<uint32_t>(i), step, static_cast<uint32_t>(sample),
                                           static_cast<uint32_t>(sample >> 32)},
                                     static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    radius[2 * i] = bits.x;
    angle[2 * i] = bits.y;
    radius[2 * i + 1] = bits.z;
    angle[2 * i + 1] = bits.w;
  }
}
#endif

}  // namespace dgf
