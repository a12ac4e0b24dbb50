#pragma once

#include <cstdint>
#include <type_traits>

#include "grid.h"
#include "operand.h"

namespace dgf {

// 16 bytes that move in one instruction.
#if defined(__CUDACC__)
typedef uint4 Packet;
#else
struct __attribute__((may_alias, aligned(16))) Packet {
  uint32_t x, y, z, w;
};
#endif

// Whether rows of `t` can be moved in packets: even steps of one, aligned in every sample.
inline bool moves_in_packets(const Operand& t, int64_t batch) {
  if (!t.present()) return true;
  if (!t.contiguous() || t.dtype == DType::f64) return false;
  const int64_t step = batch > 1 ? t.batch_stride * item_size(t.dtype) : 0;
  return reinterpret_cast<uintptr_t>(t.data) % sizeof(Packet) == 0 && step % static_cast<int64_t>(sizeof(Packet)) == 0;
}

// Offset of a sample's element in logical order, any strides.
DGF_HD int64_t element_offset(const Operand& t, int64_t element) {
  int64_t offset = 0;
  for (int d = t.ndim - 1; d > 0; --d) {
    const int64_t above = element / t.size[d];
    offset += (element - above * t.size[d]) * t.stride[d];
    element = above;
  }
  return offset + element * t.stride[0];
}

// One element of a sample in logical order, any strides, any dtype.
template <typename S>
DGF_RARE S read_element(const Operand& t, int64_t b, int64_t element) {
  const char* address = t.address(b, element_offset(t, element));
  switch (t.dtype) {
    case DType::f32:
      return static_cast<S>(*reinterpret_cast<const float*>(address));
    case DType::f64:
      return static_cast<S>(*reinterpret_cast<const double*>(address));
    case DType::bf16:
      return static_cast<S>(bf16_to_float(*reinterpret_cast<const uint16_t*>(address)));
    case DType::f16:
      return static_cast<S>(half_to_float(*reinterpret_cast<const uint16_t*>(address)));
  }
  return S(0);
}

template <typename S>
DGF_RARE void write_element(const Operand& t, int64_t b, int64_t element, S value) {
  char* address = t.address(b, element_offset(t, element));
  switch (t.dtype) {
    case DType::f32:
      *reinterpret_cast<float*>(address) = static_cast<float>(value);
      return;
    case DType::f64:
      *reinterpret_cast<double*>(address) = static_cast<double>(value);
      return;
    case DType::bf16:
      *reinterpret_cast<uint16_t*>(address) = float_to_bf16(static_cast<float>(value));
      return;
    case DType::f16:
      *reinterpret_cast<uint16_t*>(address) = float_to_half(static_cast<float>(value));
      return;
  }
}

// A lane's window moves in packets, kPart elements in registers at a time, or as single elements: W is kPart or 1.
template <int W>
constexpr int kParts = W == 1 ? 1 : kWidth / kPart;

// One operand on its way into registers. fetch() only issues loads, so that those of several operands are on their way
// at once.
template <typename S, int W>
struct Source {
  Packet packet[2];
  S element;

  DGF_HD void fetch(const Operand& t, int64_t b, int64_t begin) {
    if (W == 1) {
      element = read_element<S>(t, b, begin);
      return;
    }
    const Packet* from = reinterpret_cast<const Packet*>(t.address(b, begin));
    packet[0] = from[0];
    if (t.dtype == DType::f32) packet[1] = from[1];
  }

  DGF_HD void take(const Operand& t, int part, S* out) const {
    if (W == 1) {
      out[0] = element;
      return;
    }
    if (t.dtype == DType::f32) {
      const Packet& p = packet[part];
      const uint32_t words[kPart] = {p.x, p.y, p.z, p.w};
      for (int i = 0; i < W; ++i) out[i] = static_cast<S>(bits_float(words[i]));
      return;
    }
    const uint32_t words[2] = {part == 0 ? packet[0].x : packet[0].z, part == 0 ? packet[0].y : packet[0].w};
    const bool bf16 = t.dtype == DType::bf16;
    for (int i = 0; i < W; ++i) {
      const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      out[i] = static_cast<S>(bf16 ? bf16_to_float(bits) : half_to_float(bits));
    }
  }
};

// One operand on its way out of registers, in whole packets.
template <typename S, int W>
struct Sink {
  uint32_t held[2];

  DGF_HD void put(const Operand& t, int64_t b, int64_t begin, int part, const S* value) {
    if (W == 1) {
      write_element(t, b, begin, value[0]);
      return;
    }
    Packet* to = reinterpret_cast<Packet*>(t.address(b, begin));
    uint32_t word[kPart];
    if (t.dtype == DType::f32) {
      for (int i = 0; i < W; ++i) word[i] = float_bits(static_cast<float>(value[i]));
      to[part] = Packet{word[0], word[1], word[2], word[3]};
      return;
    }
    const bool bf16 = t.dtype == DType::bf16;
    for (int i = 0; i < W; ++i)
      word[i] = bf16 ? float_to_bf16(static_cast<float>(value[i])) : float_to_half(static_cast<float>(value[i]));
    const uint32_t low = word[0] | word[1] << 16, high = word[2] | word[3] << 16;
    if (part == 0) {
      held[0] = low;
      held[1] = high;
    } else {
      to[0] = Packet{held[0], held[1], low, high};
    }
  }
};

// Runs body(width, begin) over a lane's window of one tile: width is an integral constant, kPart for the whole window
// in packets, where `packets` allows it, or 1 for each of its elements. `kWhole`: `numel` is a multiple of kWidth and
// all moves in packets, so nothing is made for single elements.
template <typename S, bool kWhole = false, typename Body>
DGF_HD void for_windows(int64_t numel, int64_t tile, int lane, bool packets, Body&& body) {
  DGF_NO_UNROLL
  for (int k = 0; k < kWindows; ++k) {
    const int64_t begin = tile * kTile + (int64_t{k} * kThreads + lane) * kWidth, left = numel - begin;
    if constexpr (kWhole) {
      if (left > 0) body(std::integral_constant<int, kPart>{}, begin);
      continue;
    }
    if constexpr (std::is_same<S, float>::value) {
      if (packets && left >= kWidth) {
        body(std::integral_constant<int, kPart>{}, begin);
        continue;
      }
    }
    DGF_NO_UNROLL
    for (int i = 0; i < kWidth && i < left; ++i) body(std::integral_constant<int, 1>{}, begin + i);
  }
}

}  // namespace dgf
