// Backward pass of the resident kernels: as the forward pass, with W_hh^T in registers and the steps in turn.
//
// A step:  cell backward -> dgates(t), dc(t-1)   from tapes loaded a step ago
//          dgates(t) to shared memory
//          barrier                               dgates(t) is whole, nobody reads the buffer that dgates(t-1) goes to
//          dh(t-1) = W_hh^T dgates(t)            a thread gets what its own 2 units x 2 rows need; meanwhile dgates(t)
//                                                go out, and the tapes of t-1 are loaded
#pragma once

#include "resident_float.cuh"
#include "resident_rows.cuh"
#include "resident_tile.cuh"
#include "resident_traits.cuh"

namespace sora {
namespace resident {

template <class Element, int kUnits, Cell kCell>
struct BackwardShared {
  alignas(128) unsigned char dgates[2][kGatesOf<kCell> * Tile<Element, kUnits>::kBytes];  // of u, as operands
};

template <class Element, int kUnits, Cell kCell, Access kAccess, bool kRagged>
SORA_KERNEL(2 * kUnits, 1) lstm_resident_bwd_kernel(const SORA_GRID_CONSTANT LstmResidentBackward args) {
  constexpr bool kLstm = kCell == Cell::lstm, kGru = kCell == Cell::gru;
  constexpr int G = kGatesOf<kCell>, kTape = kTapeOf<kCell>, kOut = kGru ? 4 : G;
  using B = Tile<Element, kUnits>;
  using V = GateFloatOf<Element>;
  auto& shared = shared_memory<BackwardShared<Element, kUnits, kCell>>();

  const int H = kAccess == Access::exact ? kUnits : int(args.shape.H), D = args.shape.D;
  const int direction = int(block_index().y), member = int(block_index().z);
  const int g = int(lane()) / 4, t = int(lane()) % 4;
  const int unit = int(warp()) * kUnitsPerWarp + 2 * g, units = kAccess == Access::exact ? 2 : H - unit;
  const int64_t rows_before = int64_t(member) * args.shape.data_rows;
  const int64_t states_before = (int64_t(member) * D + direction) * args.shape.B;
  const int64_t tape_before = int64_t(D) * rows_before + direction * args.shape.data_rows;
  const int64_t y_before = rows_before * (D * H) + direction * H + unit;

  Weights<Element, G, kUnits> w;
  load_weights_transposed<Element, G, kUnits, kAccess>(
      w, static_cast<const Element*>(args.w_hh[direction]) + int64_t(member) * G * H * H, H, unit);
  Rows<kRagged> rows(args.shape, int(block_index().x) * kRows, 2 * t, direction == 1);

  // The thread's first unit in row 0 of each array.
  const Element* gates_base = static_cast<const Element*>(args.gates) + tape_before * (kTape * H) + unit;
  const float* cells_base = static_cast<const float*>(args.cells) + y_before;
  const float* dcells_base = static_cast<const float*>(args.dcells) + y_before;
  const Element* y_base = static_cast<const Element*>(args.y) + y_before;
  const Element* dy_base = static_cast<const Element*>(args.dy) + y_before;
  Element* dgates_base = static_cast<Element*>(args.dgates) + tape_before * (kOut * H) + unit;
  keep(gates_base), keep(cells_base), keep(y_base);
  if (!kRagged) keep(dy_base), keep(dgates_base);

  // Of a step to come. `before`: the state it started from, c (LSTM) or h (GRU); of an RNN, h itself.
  Pair<Element> gates[kTape ? kTape : 1][2] = {}, dy[2] = {}, h[2] = {};
  F32x2 c[2] = {}, c_before[2] = {}, dcells[2] = {};
  bool clear[2] = {};
  int row[2] = {}, earlier[2] = {};  // data rows of steps s and s - 1
  int takes_dy = args.dy != nullptr, takes_dcells = kLstm && args.dcells;
  keep(takes_dy), keep(takes_dcells);
  const auto load_step = [&](int i, int s) {
    const bool runs = kRagged ? rows.runs(i, s) : s >= 0, first = s == 0;
    const int there = runs ? units : 0;
    if (there > 0) {
      SORA_UNROLL
      for (int gate = 0; gate < kTape; ++gate)
        gates[gate][i] = load_pair<Element, kAccess>(at_row(gates_base, row[i], kTape * H) + gate * H, there);
      if (!kLstm && !kGru) h[i] = load_pair<Element, kAccess>(at_row(y_base, row[i], D * H), there);
      if (takes_dy) dy[i] = load_pair<Element, kAccess>(at_row(dy_base, row[i], D * H), there);
      if (takes_dcells) dcells[i] = load_pair<float, kAccess>(at_row(dcells_base, row[i], D * H), there);
    }
    if (kRagged && rows.reset && runs)
      clear[i] = first ? !rows.reverse && rows.reset[row[i]] : rows.cleared(earlier[i], row[i]);
    const int before = !(kRagged ? rows.runs(i, s - 1) : s > 0) ? 0 : units;  // for LSTM also the last step's c
    if (before > 0) {
      if (kLstm) c_before[i] = load_pair<float, kAccess>(at_row(cells_base, earlier[i], D * H), before);
      if (kGru) h[i] = load_pair<Element, kAccess>(at_row(y_base, earlier[i], D * H), before);
    }
    if (first) {
      const int64_t state = (states_before + rows.batch[i]) * H + unit;
      if (kLstm) {
        c_before[i] = F32x2{};
        if (args.c0)
          split<Element>(load_pair_or_zero<Element, kAccess>(static_cast<const Element*>(args.c0) + state, units),
                         c_before[i].x, c_before[i].y);
      } else if (kGru) {
        h[i] = Pair<Element>{};
        if (args.h0) h[i] = load_pair_or_zero<Element, kAccess>(static_cast<const Element*>(args.h0) + state, units);
      }
    }
  };

  float dh[4] = {}, dc[4] = {};
  const int last = rows.steps - 1;
  // A warp's 16 units of one gate and row, of c or of dy are a sector of L2 or two: each lane asks for one of the
  // gates', and for LSTM some for the others.
  const bool asks_gates = !kRagged && kTape > 0, asks_cells = kLstm && g < 4;
  const bool asks_others = asks_cells || (kLstm && g < 6 && args.dy);
  const Element* ask_gates = gates_base - 2 * g + g / 2 * H;
  const char* ask_others = asks_cells ? reinterpret_cast<const char*>(cells_base - 2 * g + g / 2 * 8)
                                      : reinterpret_cast<const char*>(dy_base - 2 * g);
  const int ask_stride = D * H * int(asks_cells ? sizeof(float) : sizeof(Element));
  int ask_row = 0;
  if (asks_gates)
    ask_row = (g % 2 ? rows.data_row(1, last) : rows.data_row(0, last)) - (1 + kStepsToL2) * rows.stride;
  if (asks_gates) keep(ask_gates), keep(ask_others);
  SORA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int64_t state = (states_before + rows.batch[i]) * H + unit;
    if (args.dh_n)
      split<Element>(load_pair_or_zero<Element, kAccess>(static_cast<const Element*>(args.dh_n) + state, units), dh[i],
                     dh[2 + i]);
    if (kLstm && args.dc_n)
      split<Element>(load_pair_or_zero<Element, kAccess>(static_cast<const Element*>(args.dc_n) + state, units), dc[i],
                     dc[2 + i]);
    if (last < 0) continue;
    if (!kRagged || rows.runs(i, last)) {
      row[i] = rows.data_row(i, last);
      if (kLstm) c[i] = load_pair_or_zero<float, kAccess>(at_row(cells_base, row[i], D * H), units);
    }
    earlier[i] = rows.moved(i, row[i], last - 1, -1);
    load_step(i, last);
  }

  int buffer = 0, lane_offset = B::offset(t, g);
  int store_offset[2] = {B::offset_of_pair(unit, 2 * t), B::offset_of_pair(unit, 2 * t + 1)};
  keep(lane_offset), keep(store_offset[0]), keep(store_offset[1]);
  for (int s = last; s >= 0; --s) {
    float direct[4], out[kOut][4];  // dh(t) that goes straight to h(t-1); dgates
    Pair<Element> pairs[kOut][2];
    int runs[2], cleared[2];
    SORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      runs[i] = !kRagged || rows.runs(i, s);
      cleared[i] = kRagged && clear[i] && runs[i];
      if (kRagged) keep(runs[i]), keep(cleared[i]);  // or both kinds of rows are compiled apart
      float of_y[2], tape[4][2] = {}, before[2] = {c_before[i].x, c_before[i].y};
      const float now[2] = {c[i].x, c[i].y}, of_cells[2] = {dcells[i].x, dcells[i].y};
      split<Element>(dy[i], of_y[0], of_y[1]);
      SORA_UNROLL
      for (int gate = 0; gate < kTape; ++gate) split<Element>(gates[gate][i], tape[gate][0], tape[gate][1]);
      if (!kLstm) split<Element>(h[i], before[0], before[1]);
      SORA_UNROLL
      for (int u = 0; u < 2; ++u) {
        const int k = 2 * u + i;
        if (!kLstm && !kGru) {
          const V grown{before[u]}, grad{dh[k] + of_y[u]};
          const bool relu = args.shape.cell == Cell::rnn_relu;
          out[0][k] = (relu ? relu_backward(grown, grad) : tanh_backward(grown, grad)).value;
          direct[k] = runs[i] ? 0.0f : dh[k];
          continue;
        }
        const V start{cleared[i] ? 0.0f : before[u]};
        V grad{dh[k] + of_y[u]};
        if constexpr (kLstm) {
          V dc_k{dc[k] + of_cells[u]};
          const LstmGates<V> cell{{tape[0][u]}, {tape[1][u]}, {tape[2][u]}, {tape[3][u]}};
          const LstmGates<V> d = lstm_cell_backward(cell, start, V{now[u]}, grad, dc_k);
          out[0][k] = d.i.value, out[1][k] = d.f.value, out[2][k] = d.g.value, out[3][k] = d.o.value;
          dc[k] = cleared[i] ? 0.0f : runs[i] ? dc_k.value : dc[k];
          direct[k] = runs[i] ? 0.0f : dh[k];
        } else if constexpr (kGru) {
          const GruGates<V> cell{{tape[0][u]}, {tape[1][u]}, {tape[2][u]}, {tape[3][u]}};
          const GruGates<V> d = gru_cell_backward(cell, start, grad);
          out[0][k] = d.r.value, out[1][k] = d.z.value, out[2][k] = d.n.value, out[3][k] = d.q.value;
          direct[k] = runs[i] ? grad.value : dh[k];
        }
      }
      SORA_UNROLL
      for (int gate = 0; gate < kOut; ++gate) {
        pairs[gate][i] = pair_of<Element>(out[gate][i], out[gate][2 + i]);
        if (kGru && gate == 2) continue;  // of a_n alone, which h does not reach
        const int tile = kGru && gate == 3 ? 2 : gate;
        store_operands(shared.dgates[0] + buffer + tile * B::kBytes + store_offset[i], pairs[gate][i]);
      }
    }

    sync_block();
    float sum[4];
    multiply_summed<Element, G, kUnits>(sum, w, shared.dgates[0] + buffer + lane_offset, [&] {
      SORA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int there = rows.runs(i, s) ? units : 0;
        Element* to = at_row(dgates_base, row[i], kOut * H);
        SORA_UNROLL
        for (int gate = 0; gate < kOut; ++gate)
          if (there > 0) store_pair<Element, kAccess>(to + gate * H, pairs[gate][i], there);
        c[i] = c_before[i];
        row[i] = earlier[i];
        earlier[i] = rows.moved(i, earlier[i], s - 2, -1);
        load_step(i, s - 1);
      }
      if (asks_gates && s > kStepsToL2) {
        prefetch_l2(at_row(ask_gates, ask_row, kTape * H));
        if (asks_others) prefetch_l2(at_row(ask_others, ask_row, ask_stride));
        ask_row -= rows.stride;
      }
    });
    buffer ^= G * B::kBytes;
    SORA_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int i = k & 1;
      dh[k] = cleared[i] ? 0.0f : direct[k] + (runs[i] ? sum[k] : 0.0f);
    }
  }

  SORA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int64_t state = (states_before + rows.batch[i]) * H + unit;
    const int there = rows.there[i] ? units : 0;
    if (there <= 0) continue;
    store_pair<Element, kAccess>(static_cast<Element*>(args.dh0) + state, pair_of<Element>(dh[i], dh[2 + i]), there);
    if constexpr (kLstm)
      store_pair<Element, kAccess>(static_cast<Element*>(args.dc0) + state, pair_of<Element>(dc[i], dc[2 + i]), there);
  }
}

// For launch_pass.
struct BackwardPass {
  using Args = LstmResidentBackward;
  template <class Element, int kUnits, Cell kCell>
  using Shared = BackwardShared<Element, kUnits, kCell>;
  template <class Element, int kUnits, Cell kCell, Access kAccess, bool kRagged>
  static constexpr auto kernel = &lstm_resident_bwd_kernel<Element, kUnits, kCell, kAccess, kRagged>;
};

}  // namespace resident
}  // namespace sora
