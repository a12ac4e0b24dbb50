#pragma once

namespace dgf {

// Bytes of this build's vector registers. Which lane holds what never depends on it, only how many move at once.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

}  // namespace dgf
