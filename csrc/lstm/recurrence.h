// The arithmetic of lstm_cpu.cpp for one instruction set (see simd.h for how it is chosen).
//
// Both directions of the pass are one loop, `accumulate`: R rows x C vectors of sums held in registers, w_hh packed so
// that it is read once from front to back.
//   forward:  packed [H / lanes][H][4][lanes]; C = 4 is the four gates of the same hidden units, so that the cell is
//             computed on the sums where they are: the gates are written once and never read back.
//   backward: packed [H / (C lanes)][4H][C][lanes], C = 1, 2 or 4 by H.
// Units past H are zero in the packed array.
#pragma once

#include "../common/simd.h"
#include "cell.h"
#include "lstm_kernels.h"

namespace sora {
namespace SORA_ISA {

// Rows of sums held in registers at once: R x 4 vectors, the 4 of w_hh and a broadcast h must fit the register file.
constexpr int64_t kMaxRows = SORA_VECTOR_REGISTERS >= 32 ? 6 : 2;

template <int R, int C, class V, class State>
inline __attribute__((always_inline)) void accumulate(V (&sum)[R][C], const State* packed, const State* x,
                                                      int64_t x_stride, int64_t depth) {
  constexpr int64_t lanes = sizeof(V) / sizeof(State);
  // One row has too few independent sums to hide the latency of a multiply-add: even and odd terms are summed apart.
  constexpr int U = R == 1 ? 2 : 1;
  V part[U][R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      for (int u = 0; u < U; ++u) part[u][r][c] = u == 0 ? sum[r][c] : V{};
  int64_t k = 0;
  for (; k + U <= depth; k += U) {
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      V w[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) __builtin_memcpy(&w[c], packed + ((k + u) * C + c) * lanes, sizeof(V));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const State value = x[r * x_stride + k + u];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) part[u][r][c] += w[c] * value;
      }
    }
  }
  for (; k < depth; ++k)
    for (int c = 0; c < C; ++c) {
      V w;
      __builtin_memcpy(&w, packed + (k * C + c) * lanes, sizeof(V));
      for (int r = 0; r < R; ++r) part[0][r][c] += w * x[r * x_stride + k];
    }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      sum[r][c] = part[0][r][c];
      if constexpr (U == 2) sum[r][c] += part[1][r][c];
    }
}

// Calls tile(integral constant R, first row) so that the rows are covered by tiles of nearly equal height <= kMaxRows.
template <int R>
struct Height {
  static constexpr int value = R;
};
template <class Tile>
inline __attribute__((always_inline)) void for_row_tiles(Range rows, const Tile& tile) {
  const int64_t count = rows.end - rows.begin, tiles = (count + kMaxRows - 1) / kMaxRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows.begin + count * t / tiles;
    switch (rows.begin + count * (t + 1) / tiles - first) {
      case 1: tile(Height<1>{}, first); break;
      case 2: tile(Height<2>{}, first); break;
#if SORA_VECTOR_REGISTERS >= 32
      case 3: tile(Height<3>{}, first); break;
      case 4: tile(Height<4>{}, first); break;
      case 5: tile(Height<5>{}, first); break;
      case 6: tile(Height<6>{}, first); break;
#endif
    }
  }
}

// dh of the earlier step, from the dgates of all units: the half of the backward pass that sees states only.
template <class State, int C>
void product(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& part, int64_t s) {
  using V = typename Simd<State>::V;
  constexpr int64_t lanes = Simd<State>::lanes;
  const int64_t H = a.H, d = part.direction;
  State* dh_state = static_cast<State*>(scratch.h) + d * a.B * H;
  const State* dgates = static_cast<const State*>(scratch.dgates) + (s % 2 * a.D + d) * a.B * 4 * H;
  for (int64_t j = part.units.begin; j < part.units.end; j += C * lanes) {
    const State* packed = static_cast<const State*>(scratch.packed[d]) + j * 4 * H;
    for_row_tiles(part.rows, [&](auto height, int64_t first) __attribute__((always_inline)) {
      constexpr int R = decltype(height)::value;
      V sum[R][C] = {};
      accumulate(sum, packed, dgates + first * 4 * H, 4 * H, 4 * H);
      for (int r = 0; r < R; ++r)
        for (int64_t c = 0; c < C; ++c) {
          const int64_t unit = j + c * lanes;
          if (unit < H) store_n<State>(dh_state + (first + r) * H + unit, std::min(lanes, H - unit), sum[r][c]);
        }
    });
  }
}

template <class Element>
struct Recurrence {
  using S = Simd<Element>;
  using State = typename S::State;
  using V = typename S::V;
  using States = Simd<State>;
  static constexpr int64_t lanes = S::lanes;

  static int backward_columns(int64_t H) { return H > 2 * lanes ? 4 : H > lanes ? 2 : 1; }
  static int64_t unit_grain_backward(int64_t H) { return backward_columns(H) * lanes; }
  static int64_t rounded_up(int64_t H, int64_t grain) { return (H + grain - 1) / grain * grain; }
  static int64_t packed_forward_size(int64_t H) { return 4 * H * rounded_up(H, lanes); }
  static int64_t packed_backward_size(int64_t H) { return 4 * H * rounded_up(H, unit_grain_backward(H)); }

  static void pack_forward(const void* w_hh, int64_t H, Range units, void* packed) {
    const auto* w = static_cast<const Element*>(w_hh);
    for (int64_t j = units.begin; j < units.end; j += lanes) {
      State* out = static_cast<State*>(packed) + j * 4 * H;
      const int64_t n = std::min(lanes, H - j);
      for (int64_t g = 0; g < 4; ++g) {
        const Element* row = w + (g * H + j) * H;
        for (int64_t k = 0; k < H; ++k)
          for (int64_t l = 0; l < lanes; ++l)
            out[(k * 4 + g) * lanes + l] = l < n ? S::widen(row[l * H + k]) : State(0);
      }
    }
  }

  static void pack_backward(const void* w_hh, int64_t H, Range units, void* packed) {
    const auto* w = static_cast<const Element*>(w_hh);
    const int64_t grain = unit_grain_backward(H);
    for (int64_t j = units.begin; j < units.end; j += grain) {
      State* out = static_cast<State*>(packed) + j * 4 * H;
      const int64_t n = std::min(grain, H - j);
      for (int64_t k = 0; k < 4 * H; ++k)
        for (int64_t l = 0; l < grain; ++l) out[k * grain + l] = l < n ? S::widen(w[k * H + j + l]) : State(0);
    }
  }

  // Copies a [rows, units] block between arrays of row length H, null reading as zero.
  template <class To, class From>
  static void copy_block(const LstmPart& part, int64_t B, int64_t H, void* to, const void* from) {
    for (int64_t b = part.rows.begin; b < part.rows.end; ++b) {
      const int64_t row = (part.direction * B + b) * H;
      for (int64_t j = part.units.begin; j < part.units.end; j += lanes) {
        const int64_t n = std::min(lanes, H - j);
        const V v = from ? load_n<From>(static_cast<const From*>(from) + row + j, n) : V{};
        store_n<To>(static_cast<To*>(to) + row + j, n, v);
      }
    }
  }

  static void forward_begin(const LstmForward& a, const LstmScratch& scratch, const LstmPart& part) {
    copy_block<State, Element>(part, a.B, a.H, scratch.h, a.h0);
    copy_block<State, Element>(part, a.B, a.H, scratch.c, a.c0);
  }

  static void forward_end(const LstmForward& a, const LstmScratch& scratch, const LstmPart& part) {
    const State* h = static_cast<const State*>(scratch.h) + a.T % 2 * a.D * a.B * a.H;
    copy_block<Element, State>(part, a.B, a.H, a.h_n, h);
    copy_block<Element, State>(part, a.B, a.H, a.c_n, scratch.c);
  }

  static void forward_step(const LstmForward& a, const LstmScratch& scratch, const LstmPart& part, int64_t s) {
    const int64_t H = a.H, d = part.direction, t = d == 0 ? s : a.T - 1 - s, buffer = a.D * a.B * H;
    const State* h_prev = static_cast<const State*>(scratch.h) + s % 2 * buffer + d * a.B * H;
    State* h_next = static_cast<State*>(scratch.h) + (s + 1) % 2 * buffer + d * a.B * H;
    State* c_state = static_cast<State*>(scratch.c) + d * a.B * H;
    Element* gates = static_cast<Element*>(a.gates) + (d * a.T + t) * a.B * 4 * H;
    Element* y = static_cast<Element*>(a.y) + t * a.B * a.D * H + d * H;
    State* cells = a.cells ? static_cast<State*>(a.cells) + t * a.B * a.D * H + d * H : nullptr;
    for (int64_t j = part.units.begin; j < part.units.end; j += lanes) {
      const State* packed = static_cast<const State*>(scratch.packed[d]) + j * 4 * H;
      const int64_t n = std::min(lanes, H - j);
      for_row_tiles(part.rows, [&](auto height, int64_t first) __attribute__((always_inline)) {
        constexpr int R = decltype(height)::value;
        V sum[R][4];
        for (int r = 0; r < R; ++r)
          for (int g = 0; g < 4; ++g) sum[r][g] = load_n<Element>(gates + (first + r) * 4 * H + g * H + j, n);
        accumulate(sum, packed, h_prev + first * H, H, H);
        for (int r = 0; r < R; ++r) {
          const int64_t b = first + r;
          LstmGates<V> gate{sum[r][0], sum[r][1], sum[r][2], sum[r][3]};
          V h;
          const V c = lstm_cell(gate, load_n<State>(c_state + b * H + j, n), h);
          h = S::round(h);
          Element* row = gates + b * 4 * H + j;
          store_n<Element>(row, n, gate.i);
          store_n<Element>(row + H, n, gate.f);
          store_n<Element>(row + 2 * H, n, gate.g);
          store_n<Element>(row + 3 * H, n, gate.o);
          store_n<State>(c_state + b * H + j, n, c);
          store_n<State>(h_next + b * H + j, n, h);
          store_n<Element>(y + b * a.D * H + j, n, h);
          if (cells) store_n<State>(cells + b * a.D * H + j, n, c);
        }
      });
    }
  }

  static void backward_begin(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& part) {
    copy_block<State, Element>(part, a.B, a.H, scratch.h, a.dh_n);
    copy_block<State, Element>(part, a.B, a.H, scratch.c, a.dc_n);
  }

  static void backward_end(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& part) {
    copy_block<Element, State>(part, a.B, a.H, a.dh0, scratch.h);
    copy_block<Element, State>(part, a.B, a.H, a.dc0, scratch.c);
  }

  static void backward_cell(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& part, int64_t s) {
    const int64_t H = a.H, d = part.direction, t = d == 0 ? a.T - 1 - s : s, wide = a.D * H;
    const int64_t earlier = d == 0 ? t - 1 : t + 1;
    const bool first_step = s == a.T - 1;
    const State* dh_state = static_cast<const State*>(scratch.h) + d * a.B * H;
    State* dc_state = static_cast<State*>(scratch.c) + d * a.B * H;
    State* dgates_state = static_cast<State*>(scratch.dgates) + (s % 2 * a.D + d) * a.B * 4 * H;
    const Element* gates = static_cast<const Element*>(a.gates) + (d * a.T + t) * a.B * 4 * H;
    Element* dgates = static_cast<Element*>(a.dgates) + (d * a.T + t) * a.B * 4 * H;
    const State* cells = static_cast<const State*>(a.cells) + t * a.B * wide + d * H;
    const State* cells_earlier = static_cast<const State*>(a.cells) + earlier * a.B * wide + d * H;
    const Element* c0 = a.c0 ? static_cast<const Element*>(a.c0) + d * a.B * H : nullptr;
    const Element* dy = a.dy ? static_cast<const Element*>(a.dy) + t * a.B * wide + d * H : nullptr;
    const State* dcells = a.dcells ? static_cast<const State*>(a.dcells) + t * a.B * wide + d * H : nullptr;
    for (int64_t b = part.rows.begin; b < part.rows.end; ++b)
      for (int64_t j = part.units.begin; j < part.units.end; j += lanes) {
        const int64_t n = std::min(lanes, H - j), at = b * H + j, at_wide = b * wide + j, at_gates = b * 4 * H + j;
        const LstmGates<V> gate{load_n<Element>(gates + at_gates, n), load_n<Element>(gates + at_gates + H, n),
                                load_n<Element>(gates + at_gates + 2 * H, n),
                                load_n<Element>(gates + at_gates + 3 * H, n)};
        const V c_prev = !first_step ? load_n<State>(cells_earlier + at_wide, n)
                         : c0        ? load_n<Element>(c0 + at, n)
                                     : V{};
        const V c = load_n<State>(cells + at_wide, n);
        V dh = load_n<State>(dh_state + at, n), dc = load_n<State>(dc_state + at, n);
        if (dy) dh += load_n<Element>(dy + at_wide, n);
        if (dcells) dc += load_n<State>(dcells + at_wide, n);
        const LstmGates<V> grad = lstm_cell_backward(gate, c_prev, c, dh, dc);
        store_n<State>(dc_state + at, n, dc);
        const V all[4] = {grad.i, grad.f, grad.g, grad.o};
        for (int g = 0; g < 4; ++g) {
          store_n<Element>(dgates + at_gates + g * H, n, all[g]);
          store_n<State>(dgates_state + at_gates + g * H, n, all[g]);
        }
      }
  }

  static void backward_product(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& part, int64_t s) {
    switch (backward_columns(a.H)) {
      case 1: return product<State, 1>(a, scratch, part, s);
      case 2: return product<State, 2>(a, scratch, part, s);
      default: return product<State, 4>(a, scratch, part, s);
    }
  }

  static int cell_forward(const LstmCellForward& a) {
    const int64_t H = a.H;
    for (int64_t b = 0; b < a.B; ++b)
      for (int64_t j = 0; j < H; j += lanes) {
        const int64_t n = std::min(lanes, H - j);
        Element* row = static_cast<Element*>(a.gates) + b * 4 * H + j;
        LstmGates<V> gate{load_n<Element>(row, n), load_n<Element>(row + H, n), load_n<Element>(row + 2 * H, n),
                          load_n<Element>(row + 3 * H, n)};
        V h, c_prev{};
        if (a.c_prev) c_prev = load_n<State>(static_cast<const State*>(a.c_prev) + b * a.c_prev_stride + j, n);
        const V c = lstm_cell(gate, c_prev, h);
        store_n<Element>(row, n, gate.i);
        store_n<Element>(row + H, n, gate.f);
        store_n<Element>(row + 2 * H, n, gate.g);
        store_n<Element>(row + 3 * H, n, gate.o);
        store_n<State>(static_cast<State*>(a.c) + b * a.c_stride + j, n, c);
        store_n<Element>(static_cast<Element*>(a.h) + b * a.h_stride + j, n, h);
      }
    return kLstmOk;
  }

  static int cell_backward(const LstmCellBackward& a) {
    const int64_t H = a.H;
    for (int64_t b = 0; b < a.B; ++b)
      for (int64_t j = 0; j < H; j += lanes) {
        const int64_t n = std::min(lanes, H - j);
        const Element* row = static_cast<const Element*>(a.gates) + b * 4 * H + j;
        const LstmGates<V> gate{load_n<Element>(row, n), load_n<Element>(row + H, n), load_n<Element>(row + 2 * H, n),
                                load_n<Element>(row + 3 * H, n)};
        V c_prev{};
        if (a.c_prev) c_prev = load_n<State>(static_cast<const State*>(a.c_prev) + b * a.c_prev_stride + j, n);
        const V c = load_n<State>(static_cast<const State*>(a.c) + b * a.c_stride + j, n);
        V dh{};
        if (a.dy) dh += load_n<Element>(static_cast<const Element*>(a.dy) + b * a.dy_stride + j, n);
        if (a.dh) dh += load_n<Element>(static_cast<const Element*>(a.dh) + b * H + j, n);
        State* dc_at = static_cast<State*>(a.dc) + b * H + j;
        V dc = load_n<State>(dc_at, n);
        if (a.dcell) dc += load_n<State>(static_cast<const State*>(a.dcell) + b * a.dcell_stride + j, n);
        const LstmGates<V> grad = lstm_cell_backward(gate, c_prev, c, dh, dc);
        store_n<State>(dc_at, n, dc);
        Element* out = static_cast<Element*>(a.dgates) + b * 4 * H + j;
        store_n<Element>(out, n, grad.i);
        store_n<Element>(out + H, n, grad.f);
        store_n<Element>(out + 2 * H, n, grad.g);
        store_n<Element>(out + 3 * H, n, grad.o);
      }
    return kLstmOk;
  }

  static const LstmKernels* table() {
    static const LstmKernels kernels{SORA_ISA_NAME,
                                     sizeof(State),
                                     lanes,
                                     unit_grain_backward,
                                     packed_forward_size,
                                     packed_backward_size,
                                     pack_forward,
                                     pack_backward,
                                     forward_begin,
                                     backward_begin,
                                     forward_step,
                                     backward_cell,
                                     backward_product,
                                     forward_end,
                                     backward_end,
                                     cell_forward,
                                     cell_backward};
    return &kernels;
  }
};

inline const LstmKernels* kernels_for(DType dtype) {
  switch (dtype) {
    case DType::float32: return Recurrence<float>::table();
    case DType::float64: return Recurrence<double>::table();
    case DType::bfloat16: return Recurrence<BFloat16>::table();
    default: return nullptr;
  }
}

}  // namespace SORA_ISA
}  // namespace sora
