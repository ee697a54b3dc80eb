// One step of one direction (LstmStepForward, LstmStepBackward in lstm.h), for one instruction set.
#pragma once

#include "../common/simd.h"
#include "cell.h"
#include "lstm_kernels.h"
#include "step_rows.h"

namespace sora {
namespace SORA_ISA {

template <class Element, Cell cell>
struct LstmStep {
  using State = typename Simd<Element>::State;
  using V = typename Simd<Element>::V;
  static constexpr int64_t lanes = Simd<Element>::lanes;
  static constexpr int G = cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;
  static constexpr int kGrads = lstm_grads(cell);

  // Row `at` of an array, from unit j; null where there is no array.
  static const Element* element(const void* array, int64_t at) {
    return array ? static_cast<const Element*>(array) + at : nullptr;
  }
  static Element* element(void* array, int64_t at) { return array ? static_cast<Element*>(array) + at : nullptr; }
  static const State* state(const void* array, int64_t at) {
    return array ? static_cast<const State*>(array) + at : nullptr;
  }
  static State* state(void* array, int64_t at) { return array ? static_cast<State*>(array) + at : nullptr; }
  template <class Kept>
  static void zero(Kept* row, int64_t count) {
    if (row) __builtin_memset(row, 0, count * sizeof(Kept));
  }

  static void forward(const LstmStepForward& a, int64_t t, const void* hidden) {
    const LstmStepRows rows = lstm_step_rows(a.steps, t);
    const int64_t H = a.steps.H;
    const Element *b_ih = element(a.b_ih, 0), *b_hh = element(a.b_hh, 0);
    for (int64_t b = 0; b < rows.forward_rows(); ++b) {
      const int64_t at = rows.now.first + b;
      Element *y = element(a.y, at * a.y_stride), *gates = element(a.gates, at * kLstmTape * H);
      State* cells = state(a.cells, at * a.cells_stride);
      if (!rows.runs(b)) {
        zero(y, H), zero(cells, H), zero(gates, kLstmTape * H);
        continue;
      }
      const bool clears = rows.clears(b);
      const Element* from_x = element(a.input, at * a.input_stride);
      const Element* from_h = clears ? nullptr : element(hidden, b * G * H);
      Element* h_out = element(a.h, b * H);
      for (int64_t j = 0; j < H; j += lanes) {
        const int64_t n = std::min(lanes, H - j);
        const auto x = [&](int g) __attribute__((always_inline)) {
          V sum = load_n<Element>(from_x + g * H + j, n);
          if (b_ih) sum += load_n<Element>(b_ih + g * H + j, n);
          return sum;
        };
        const auto u = [&](int g) __attribute__((always_inline)) {
          V sum{};
          if (from_h) sum = load_n<Element>(from_h + g * H + j, n);
          if (b_hh) sum += load_n<Element>(b_hh + g * H + j, n);
          return sum;
        };
        const auto keep = [&](V g0, V g1, V g2, V g3) __attribute__((always_inline)) {
          if (!gates) return;
          store_n<Element>(gates + j, n, g0), store_n<Element>(gates + H + j, n, g1);
          store_n<Element>(gates + 2 * H + j, n, g2), store_n<Element>(gates + 3 * H + j, n, g3);
        };
        V h{};
        if constexpr (cell == Cell::lstm) {
          LstmGates<V> gate{x(0) + u(0), x(1) + u(1), x(2) + u(2), x(3) + u(3)};
          State* c_at = state(a.c, b * H + j);
          V c_prev{};
          if (!clears) c_prev = load_n<State>(c_at, n);
          const V c = lstm_cell(gate, c_prev, h);
          keep(gate.i, gate.f, gate.g, gate.o);
          store_n<State>(c_at, n, c);
          if (cells) store_n<State>(cells + j, n, c);
        } else if constexpr (cell == Cell::gru) {
          GruGates<V> gate{x(0) + u(0), x(1) + u(1), x(2), u(2)};
          V h_prev{};
          if (!clears) h_prev = load_n<Element>(element(a.h_prev, b * H + j), n);
          h = gru_cell(gate, h_prev);
          keep(gate.r, gate.z, gate.n, gate.q);
        } else if constexpr (cell == Cell::rnn_tanh) {
          h = tanh(x(0) + u(0));
        } else {
          h = relu(x(0) + u(0));
        }
        if (h_out) store_n<Element>(h_out + j, n, h);
        if (y) store_n<Element>(y + j, n, h);
      }
    }
  }

  static void backward(const LstmStepBackward& a, int64_t t, const void* dh_next) {
    const LstmStepRows rows = lstm_step_rows(a.steps, t);
    const int64_t H = a.steps.H;
    for (int64_t b = 0; b < rows.backward_rows(); ++b) {
      const int64_t at = rows.now.first + b;
      const Element* sent = rows.receives(b) ? element(dh_next, b * H) : nullptr;
      State* dh_at = state(a.dh, b * H);
      if (!rows.runs(b)) {
        if (b < rows.now.rows) zero(element(a.dgates, at * kGrads * H), kGrads * H);
        for (int64_t j = 0; dh_at && sent && j < H; j += lanes) {
          const int64_t n = std::min(lanes, H - j);
          store_n<State>(dh_at + j, n, load_n<State>(dh_at + j, n) + load_n<Element>(sent + j, n));
        }
        continue;
      }
      const bool clears = rows.clears(b);
      const Element *dy = element(a.dy, at * a.dy_stride), *tape = element(a.gates, at * kLstmTape * H),
                    *kept_h = element(a.h, at * a.h_stride);
      Element* dgates = element(a.dgates, at * kGrads * H);
      for (int64_t j = 0; j < H; j += lanes) {
        const int64_t n = std::min(lanes, H - j);
        V dh{};
        if (dh_at) dh = load_n<State>(dh_at + j, n);
        if (sent) dh += load_n<Element>(sent + j, n);
        if (dy) dh += load_n<Element>(dy + j, n);
        const auto gate = [&](int g) __attribute__((always_inline)) { return load_n<Element>(tape + g * H + j, n); };
        const auto give = [&](int g, V grad) __attribute__((always_inline)) {
          store_n<Element>(dgates + g * H + j, n, grad);
        };
        if constexpr (cell == Cell::lstm) {
          const LstmGates<V> gates{gate(0), gate(1), gate(2), gate(3)};
          V c_prev{};
          if (clears) {
          } else if (rows.ran_before(b)) {
            c_prev = load_n<State>(state(a.cells, (rows.before.first + b) * a.cells_stride + j), n);
          } else if (a.c0) {
            c_prev = load_n<Element>(element(a.c0, b * H + j), n);
          }
          State* dc_at = state(a.dc, b * H + j);
          V dc = load_n<State>(dc_at, n);
          if (a.dcells) dc += load_n<State>(state(a.dcells, at * a.dcells_stride + j), n);
          const V c = load_n<State>(state(a.cells, at * a.cells_stride + j), n);
          const LstmGates<V> grad = lstm_cell_backward(gates, c_prev, c, dh, dc);
          store_n<State>(dc_at, n, clears ? V{} : dc);
          give(0, grad.i), give(1, grad.f), give(2, grad.g), give(3, grad.o);
          dh = V{};
        } else if constexpr (cell == Cell::gru) {
          const GruGates<V> gates{gate(0), gate(1), gate(2), gate(3)};
          const GruGates<V> grad = gru_cell_backward(gates, load_n<Element>(kept_h + j, n), dh);
          give(0, grad.n), give(1, grad.r), give(2, grad.z), give(3, grad.q);
        } else {
          const V h = load_n<Element>(kept_h + j, n);
          give(0, cell == Cell::rnn_tanh ? tanh_backward(h, dh) : relu_backward(h, dh));
          dh = V{};
        }
        if (dh_at) store_n<State>(dh_at + j, n, clears ? V{} : dh);
      }
    }
  }
};

}  // namespace SORA_ISA
}  // namespace sora
