// The matrix product of the resident kernels: D[16 units][8 rows] += A[16 units][k] B[k][8 rows] per warp, where A
// stays in registers for the whole launch and B, a state that all warps made together, is read from shared memory.
//
// A lane always takes 16 bytes of k at a time: 8 elements of 16 bits are its share of two k-steps of 16, 4 floats
// that of two k-steps of 8. Which k the hardware calls which does not matter as long as A and B agree, so lane (g, t)
// of a block of 64 bytes of k takes bytes 16 t .. 16 t + 15 of row g, and no ldmatrix is needed. Nor need the 16 rows
// of A be in order: rows g and g + 8 are the neighbouring units 2 g and 2 g + 1, so that a thread's results are pairs
// in memory.
//
// So with g = lane / 4, t = lane % 4, a thread owns units 16 warp + 2 g, + 1 of rows 2 t, + 1 of its CTA; in
// fragments of four, value [2 unit + row].
#pragma once

#include "../common/barrier.cuh"
#include "../common/element.cuh"
#include "../common/launch.cuh"
#include "../common/memory.cuh"
#include "../common/mma.cuh"
#include "resident_launch.h"

namespace sora {
namespace resident {

constexpr int kRows = 8;           // of the batch, in one CTA: n of the mma
constexpr int kUnitsPerWarp = 16;  // m of the mma

// ---- pairs of units -------------------------------------------------------------------------------------------

template <class Element>
struct PairOf {
  using type = uint32_t;
};
template <>
struct PairOf<float> {
  using type = F32x2;
};
template <class Element>
using Pair = typename PairOf<Element>::type;

template <class Element>
SORA_DEVICE Pair<Element> pair_of(float first, float second) {
  return pack<Element>(first, second);
}
template <>
SORA_DEVICE F32x2 pair_of<float>(float first, float second) {
  return {first, second};
}
template <class Element>
SORA_DEVICE void split(uint32_t pair, float& first, float& second) {
  unpack<Element>(pair, first, second);
}
template <class Element>
SORA_DEVICE void split(F32x2 pair, float& first, float& second) {
  first = pair.x;
  second = pair.y;
}
SORA_DEVICE uint32_t join(Half first, Half second) { return first.bits | uint32_t(second.bits) << 16; }
SORA_DEVICE uint32_t join(BFloat16 first, BFloat16 second) { return first.bits | uint32_t(second.bits) << 16; }
SORA_DEVICE F32x2 join(float first, float second) { return {first, second}; }

// The units at p, in memory that this launch does not write. `there`: how many there are, at least one; only singles
// may be without the second, which reads as 0.
template <class Element, Access kAccess>
SORA_DEVICE Pair<Element> load_pair(const Element* p, [[maybe_unused]] int there) {
  if constexpr (kAccess == Access::singles) {
    Element second{};
    if (there > 1) second = load_read_only<Element>(p + 1);
    return join(load_read_only<Element>(p), second);
  } else {
    return load_read_only<Pair<Element>>(p);
  }
}
template <class Element, Access kAccess>
SORA_DEVICE Pair<Element> load_pair_or_zero(const Element* p, int there) {
  return there > 0 ? load_pair<Element, kAccess>(p, there) : Pair<Element>{};
}
template <class Element, Access kAccess>
SORA_DEVICE void store_pair(Element* p, Pair<Element> pair, [[maybe_unused]] int there) {
  if constexpr (kAccess == Access::singles) {
    Element both[2];
    __builtin_memcpy(both, &pair, sizeof(both));
    store_global(p, both[0]);
    if (there > 1) store_global(p + 1, both[1]);
  } else {
    store_global(p, pair);
  }
}

// Row `row` of a [rows, stride] array from a place in its row 0.
template <class T>
SORA_DEVICE T* at_row(T* base, int row, int stride) {
  return reinterpret_cast<T*>(address_of_row(base, row, stride * int(sizeof(T))));
}

// ---- B: [units][8 rows] in shared memory -----------------------------------------------------------------------

// Blocks of 64 bytes of units x 8 rows. Rows and 16-byte chunks are placed so that both a warp's reads (whole rows) and
// its writes (every other row, half a row each) touch all banks evenly.
template <class Element, int kUnits>
struct Tile {
  static constexpr int kBlockUnits = 64 / int(sizeof(Element));
  static constexpr int kChunkUnits = 16 / int(sizeof(Element));
  static constexpr int kBlocks = kUnits / kBlockUnits;
  static constexpr int kSteps = 2 * kBlocks;  // of the mma's k
  static constexpr int kBytes = kBlocks * 512;
  static_assert(kUnits % kBlockUnits == 0, "whole blocks");

  static SORA_DEVICE int offset(int chunk, int row) {
    return (row >> 1) * 128 + ((row ^ row >> 1) & 1) * 64 + (chunk ^ (row >> 2 & 1) * 2) * 16;
  }
  // Of the pair of units `unit`, `unit` + 1 (even) in a row.
  static SORA_DEVICE int offset_of_pair(int unit, int row) {
    return unit / kBlockUnits * 512 + offset(unit % kBlockUnits / kChunkUnits, row) +
           unit % kChunkUnits * int(sizeof(Element));
  }
};

// As an operand of the mma: 16 bits as they are, fp32 rounded to TF32.
SORA_DEVICE void store_operands(unsigned char* to, uint32_t pair) { store(to, pair); }
SORA_DEVICE void store_operands(unsigned char* to, F32x2 pair) { store(to, U32x2{tf32(pair.x), tf32(pair.y)}); }

template <class Element>
SORA_DEVICE void multiply_step(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<Element>(d, a, b);
}
template <>
SORA_DEVICE void multiply_step<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k8_tf32(d, a, b);
}

// Fragments of A: kGates matrices of 16 units and kSteps k-steps.
template <class Element, int kGates, int kUnits>
using Weights = uint32_t[kGates][Tile<Element, kUnits>::kSteps][4];

// d[gate] += a[gate] b, one b for all gates. `lane_tile`: the tile and the lane's offset in it. `meanwhile` is what
// the warp does beside, while the tensor core is busy with the first block and with other warps' products.
template <class Element, int kGates, int kUnits, class Meanwhile>
SORA_DEVICE void multiply_shared(float (&d)[kGates][4], const Weights<Element, kGates, kUnits>& a,
                                 const unsigned char* lane_tile, const Meanwhile& meanwhile) {
  SORA_UNROLL
  for (int block = 0; block < Tile<Element, kUnits>::kBlocks; ++block) {
    const U32x4 b = load<U32x4>(lane_tile + block * 512);
    const uint32_t b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
    SORA_UNROLL
    for (int gate = 0; gate < kGates; ++gate) multiply_step<Element>(d[gate], a[gate][2 * block], b0);
    SORA_UNROLL
    for (int gate = 0; gate < kGates; ++gate) multiply_step<Element>(d[gate], a[gate][2 * block + 1], b1);
    if (block == 0) meanwhile();
  }
}

// sum over gates of a[gate] b[gate]; tiles of the gates lie one behind the other. A chain of sums for each gate, two at
// least: one would wait for the tensor core's latency at every step.
template <class Element, int kGates, int kUnits, class Meanwhile>
SORA_DEVICE void multiply_summed(float (&sum)[4], const Weights<Element, kGates, kUnits>& a,
                                 const unsigned char* lane_tiles, const Meanwhile& meanwhile) {
  using B = Tile<Element, kUnits>;
  constexpr int kChains = kGates < 2 ? 2 : kGates;
  float d[kChains][4] = {};
  SORA_UNROLL
  for (int block = 0; block < B::kBlocks; ++block) {
    SORA_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      const U32x4 b = load<U32x4>(lane_tiles + gate * B::kBytes + block * 512);
      const uint32_t b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
      multiply_step<Element>(d[gate], a[gate][2 * block], b0);
      multiply_step<Element>(d[kGates < 2 ? 1 : gate], a[gate][2 * block + 1], b1);
    }
    if (block == 0) meanwhile();
  }
  SORA_UNROLL
  for (int k = 0; k < 4; ++k) {
    sum[k] = d[0][k] + d[1][k];
    SORA_UNROLL
    for (int chain = 2; chain < kChains; ++chain) sum[k] += d[chain][k];
  }
}

// ---- A: from w_hh [kGates*H, H] ---------------------------------------------------------------------------------

SORA_DEVICE uint32_t operand(float x) { return tf32(x); }

// Fragments of two units' rows: 16 bytes of k each, which are words 0, 1 of one k-step and 2, 3 of the next.
template <Access kAccess>
SORA_DEVICE void place(uint32_t (&a0)[4], uint32_t (&a1)[4], const uint32_t (&first)[4], const uint32_t (&second)[4]) {
  SORA_UNROLL
  for (int half = 0; half < 2; ++half) {
    a0[2 * half] = first[half];
    a0[2 * half + 1] = second[half];
    a1[2 * half] = first[2 + half];
    a1[2 * half + 1] = second[2 + half];
  }
  if constexpr (kAccess != Access::exact) {  // put together as they come, or single elements fill the registers
    SORA_UNROLL
    for (int i = 0; i < 4; ++i) keep(a0[i]), keep(a1[i]);
  }
}

// 16 bytes of one row, from column k; what lies past column `columns` reads as 0.
template <class Element, Access kAccess>
SORA_DEVICE void load_chunk(uint32_t (&words)[4], const Element* row, int k, int columns) {
  if constexpr (kAccess == Access::exact) {
    const U32x4 chunk = load_read_only<U32x4>(row + k);
    words[0] = chunk.x, words[1] = chunk.y, words[2] = chunk.z, words[3] = chunk.w;
    if constexpr (sizeof(Element) == 4) {
      SORA_UNROLL
      for (int i = 0; i < 4; ++i) words[i] = operand(bits_float(words[i]));
    }
  } else if constexpr (sizeof(Element) == 4) {
    SORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const F32x2 pair = load_pair_or_zero<Element, kAccess>(row + k + 2 * i, columns - (k + 2 * i));
      words[2 * i] = operand(pair.x);
      words[2 * i + 1] = operand(pair.y);
    }
  } else {
    SORA_UNROLL
    for (int i = 0; i < 4; ++i)
      words[i] = load_pair_or_zero<Element, kAccess>(row + k + 2 * i, columns - (k + 2 * i));
  }
}

// Whether none of a warp's units is there; then its fragments are 0. Asked for each gate: its loads then wait until
// those of the gate before are in their places, or more would be under way than there are registers.
template <int kSteps>
SORA_DEVICE bool skips_gate(uint32_t (&a)[kSteps][4], int H, int unit) {
  int warp_units = H - unit / kUnitsPerWarp * kUnitsPerWarp;
  keep(warp_units);
  if (warp_units > 0) return false;
  SORA_UNROLL
  for (int step = 0; step < kSteps; ++step)
    for (uint32_t& word : a[step]) word = 0;
  return true;
}

// A of the forward pass: unit u's row of gate g is row g*H + u, k are the units of h.
template <class Element, int kGates, int kUnits, Access kAccess>
SORA_DEVICE void load_weights(Weights<Element, kGates, kUnits>& a, const Element* w, int H, int unit) {
  using B = Tile<Element, kUnits>;
  const int lane_k = int(lane() & 3) * B::kChunkUnits;
  SORA_UNROLL
  for (int gate = 0; gate < kGates; ++gate) {
    if (kAccess != Access::exact && skips_gate(a[gate], H, unit)) continue;
    SORA_UNROLL
    for (int block = 0; block < B::kBlocks; ++block) {
      uint32_t rows[2][4];
      SORA_UNROLL
      for (int i = 0; i < 2; ++i)
        load_chunk<Element, kAccess>(rows[i], w + (gate * H + unit + i) * H, block * B::kBlockUnits + lane_k,
                                     unit + i < H ? H : 0);
      place<kAccess>(a[gate][2 * block], a[gate][2 * block + 1], rows[0], rows[1]);
    }
  }
}

// A of the backward pass, W_hh^T: unit u's row is column u of w_hh, k are the units of one gate after the other.
template <class Element, int kGates, int kUnits, Access kAccess>
SORA_DEVICE void load_weights_transposed(Weights<Element, kGates, kUnits>& a, const Element* w, int H, int unit) {
  using B = Tile<Element, kUnits>;
  const int lane_k = int(lane() & 3) * B::kChunkUnits;
  const int there = kAccess == Access::exact ? 2 : H - unit;
  SORA_UNROLL
  for (int gate = 0; gate < kGates; ++gate) {
    if (kAccess != Access::exact && skips_gate(a[gate], H, unit)) continue;
    SORA_UNROLL
    for (int block = 0; block < B::kBlocks; ++block) {
      uint32_t rows[2][4];
      const int k = block * B::kBlockUnits + lane_k;
      auto column = [&](int i) {
        const bool in = kAccess == Access::exact || k + i < H;
        return load_pair_or_zero<Element, kAccess>(w + (gate * H + k + i) * H + unit, in ? there : 0);
      };
      SORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(Element) == 4) {
          const F32x2 pair = column(i);
          rows[0][i] = operand(pair.x);
          rows[1][i] = operand(pair.y);
        } else {
          const uint32_t even = column(2 * i), odd = column(2 * i + 1);
          rows[0][i] = (even & 0xffffu) | odd << 16;
          rows[1][i] = even >> 16 | (odd & 0xffff0000u);
        }
      }
      place<kAccess>(a[gate][2 * block], a[gate][2 * block + 1], rows[0], rows[1]);
    }
  }
}

}  // namespace resident
}  // namespace sora
