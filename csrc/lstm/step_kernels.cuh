// One step of one direction (LstmStepForward, LstmStepBackward in lstm.h) on the GPU: elementwise over [B, H], one
// thread a (row, unit), neighbouring threads on neighbouring units. A thread reads all that it needs of its own places
// before it writes there, so that `gates` may be `input`. Memory bounds it; at the sizes of most steps the launch does.
#pragma once

#include "../common/element.cuh"
#include "../common/memory.cuh"
#include "cell.h"
#include "lstm.h"
#include "step_rows.h"

namespace sora {

constexpr int kStepThreads = 256;

// Element as stored, State as computed with.
template <class Element>
struct StepElement {
  using State = float;
  static SORA_DEVICE float widen(Element x) { return to_float(x); }
  static SORA_DEVICE Element narrow(float x) { return from_float<Element>(x); }
};
template <>
struct StepElement<double> {
  using State = double;
  static SORA_DEVICE double widen(double x) { return x; }
  static SORA_DEVICE double narrow(double x) { return x; }
};

// Reads and writes of either kind of array, at an index in its own values.
template <class Element>
struct StepMemory {
  using S = StepElement<Element>;
  using State = typename S::State;
  static SORA_DEVICE State element(const void* array, int64_t at) {
    return S::widen(load<Element>(static_cast<const Element*>(array) + at));
  }
  static SORA_DEVICE State state(const void* array, int64_t at) {
    return load<State>(static_cast<const State*>(array) + at);
  }
  static SORA_DEVICE void put(void* array, int64_t at, State value) {
    store(static_cast<Element*>(array) + at, S::narrow(value));
  }
  static SORA_DEVICE void put_state(void* array, int64_t at, State value) {
    store(static_cast<State*>(array) + at, value);
  }
};

// A 64-bit division costs as much as the cell; almost every size fits 32 bits.
SORA_DEVICE int64_t step_row_of(int64_t at, int64_t H, int64_t count) {
  return count <= UINT32_MAX ? int64_t(uint32_t(at) / uint32_t(H)) : at / H;
}

template <class Element, Cell cell>
SORA_KERNEL(kStepThreads)
lstm_step_fwd_kernel(LstmStepForward a, LstmStepRows rows, const void* hidden) {
  using Memory = StepMemory<Element>;
  using State = typename Memory::State;
  constexpr int G = cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;
  constexpr bool lstm = cell == Cell::lstm, gru = cell == Cell::gru;
  const int64_t H = a.steps.H, count = rows.forward_rows() * H;
  const int64_t at = int64_t(block_index().x) * kStepThreads + thread_index().x;
  if (at >= count) return;
  const int64_t b = step_row_of(at, H, count), j = at - b * H, row = rows.now.first + b;
  const int64_t gates_at = row * kLstmTape * H + j, y_at = row * a.y_stride + j, cells_at = row * a.cells_stride + j;
  if (!rows.runs(b)) {
    if (a.y) Memory::put(a.y, y_at, 0);
    if (lstm && a.cells) Memory::put_state(a.cells, cells_at, 0);
    if ((lstm || gru) && a.gates) {
      SORA_UNROLL
      for (int g = 0; g < kLstmTape; ++g) Memory::put(a.gates, gates_at + g * H, 0);
    }
    return;
  }
  const bool clears = rows.clears(b);
  State x[G], u[G] = {};
  SORA_UNROLL
  for (int g = 0; g < G; ++g) x[g] = Memory::element(a.input, row * a.input_stride + g * H + j);
  if (hidden && !clears) {
    SORA_UNROLL
    for (int g = 0; g < G; ++g) u[g] = Memory::element(hidden, (b * G + g) * H + j);
  }
  if (a.b_ih) {
    SORA_UNROLL
    for (int g = 0; g < G; ++g) {
      x[g] += Memory::element(a.b_ih, g * H + j);
      u[g] += Memory::element(a.b_hh, g * H + j);
    }
  }
  State h;
  if constexpr (lstm) {
    LstmGates<State> gate{x[0] + u[0], x[1] + u[1], x[2] + u[2], x[3] + u[3]};
    const State c = lstm_cell(gate, clears ? State(0) : Memory::state(a.c, at), h);
    Memory::put_state(a.c, at, c);
    if (a.cells) Memory::put_state(a.cells, cells_at, c);
    if (a.gates) {
      Memory::put(a.gates, gates_at, gate.i), Memory::put(a.gates, gates_at + H, gate.f);
      Memory::put(a.gates, gates_at + 2 * H, gate.g), Memory::put(a.gates, gates_at + 3 * H, gate.o);
    }
  } else if constexpr (gru) {
    GruGates<State> gate{x[0] + u[0], x[1] + u[1], x[2], u[2]};
    h = gru_cell(gate, clears ? State(0) : Memory::element(a.h_prev, at));
    if (a.gates) {
      Memory::put(a.gates, gates_at, gate.r), Memory::put(a.gates, gates_at + H, gate.z);
      Memory::put(a.gates, gates_at + 2 * H, gate.n), Memory::put(a.gates, gates_at + 3 * H, gate.q);
    }
  } else {
    h = cell == Cell::rnn_tanh ? tanh(x[0] + u[0]) : relu(x[0] + u[0]);
  }
  if (a.h) Memory::put(a.h, at, h);
  if (a.y) Memory::put(a.y, y_at, h);
}

template <class Element, Cell cell>
SORA_KERNEL(kStepThreads)
lstm_step_bwd_kernel(LstmStepBackward a, LstmStepRows rows, const void* dh_next) {
  using Memory = StepMemory<Element>;
  using State = typename Memory::State;
  constexpr int A = lstm_grads(cell);
  const int64_t H = a.steps.H, count = rows.backward_rows() * H;
  const int64_t at = int64_t(block_index().x) * kStepThreads + thread_index().x;
  if (at >= count) return;
  const int64_t b = step_row_of(at, H, count), j = at - b * H, row = rows.now.first + b;
  const auto give = [&](int g, State grad) { Memory::put(a.dgates, (row * A + g) * H + j, grad); };
  State dh(0);
  if (dh_next && rows.receives(b)) dh = Memory::element(dh_next, at);
  if (!rows.runs(b)) {
    if (a.dh) Memory::put_state(a.dh, at, Memory::state(a.dh, at) + dh);
    if (b < rows.now.rows) {
      SORA_UNROLL
      for (int g = 0; g < A; ++g) give(g, 0);
    }
    return;
  }
  const bool clears = rows.clears(b);
  if (a.dh) dh += Memory::state(a.dh, at);
  if (a.dy) dh += Memory::element(a.dy, row * a.dy_stride + j);
  State gate[A];
  if constexpr (A > 1) {
    SORA_UNROLL
    for (int g = 0; g < A; ++g) gate[g] = Memory::element(a.gates, (row * A + g) * H + j);
  }
  if constexpr (cell == Cell::lstm) {
    State c_prev(0), dc = Memory::state(a.dc, at);
    const State c = Memory::state(a.cells, row * a.cells_stride + j);
    if (!clears) {
      if (rows.ran_before(b))
        c_prev = Memory::state(a.cells, (rows.before.first + b) * a.cells_stride + j);
      else if (a.c0)
        c_prev = Memory::element(a.c0, at);
    }
    if (a.dcells) dc += Memory::state(a.dcells, row * a.dcells_stride + j);
    const LstmGates<State> gates{gate[0], gate[1], gate[2], gate[3]};
    const LstmGates<State> grad = lstm_cell_backward(gates, c_prev, c, dh, dc);
    Memory::put_state(a.dc, at, clears ? State(0) : dc);
    give(0, grad.i), give(1, grad.f), give(2, grad.g), give(3, grad.o);
    dh = 0;
  } else {
    const State h = Memory::element(a.h, row * a.h_stride + j);
    if constexpr (cell == Cell::gru) {
      const GruGates<State> gates{gate[0], gate[1], gate[2], gate[3]};
      const GruGates<State> grad = gru_cell_backward(gates, h, dh);
      give(0, grad.n), give(1, grad.r), give(2, grad.z), give(3, grad.q);
    } else {
      give(0, cell == Cell::rnn_tanh ? tanh_backward(h, dh) : relu_backward(h, dh));
      dh = 0;
    }
  }
  if (a.dh) Memory::put_state(a.dh, at, clears ? State(0) : dh);
}

}  // namespace sora
