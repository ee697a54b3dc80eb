// One LSTM step with its gates complete (LstmCellForward, LstmCellBackward in lstm.h), for one instruction set.
#pragma once

#include "../common/simd.h"
#include "cell.h"
#include "lstm.h"

namespace sora {
namespace SORA_ISA {

template <class Element>
struct LstmStep {
  using State = typename Simd<Element>::State;
  using V = typename Simd<Element>::V;
  static constexpr int64_t lanes = Simd<Element>::lanes;

  static int forward(const LstmCellForward& a) {
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

  static int backward(const LstmCellBackward& a) {
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
};

}  // namespace SORA_ISA
}  // namespace sora
