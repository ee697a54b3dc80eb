// Forward pass of the resident kernels: one CTA of kUnits / 16 warps per 8 rows, direction and member.
//
// A step:  gates = gx(t) + biases      loaded a step ago, and asked from L2 some steps before that
//          barrier                     h(t-1) is whole, and nobody reads the buffer that h(t) goes to
//          gates += W_hh h(t-1)        meanwhile h(t-1), c(t-1) and the gates of t-1 go out, and gx(t+1) is loaded
//          cell -> h(t), c(t)          a thread has all gates of its 2 units x 2 rows
//          h(t) to the other buffer
#pragma once

#include "resident_float.cuh"
#include "resident_rows.cuh"
#include "resident_tile.cuh"
#include "resident_traits.cuh"

namespace sora {
namespace resident {

template <class Element, int kUnits>
struct ForwardShared {
  alignas(128) unsigned char h[2][Tile<Element, kUnits>::kBytes];  // h(t-1) and h(t), as operands
};

// What the gates are before W_hh h: gx and biases. GRU: the new gate's part from x stays apart in `x_new`.
template <Cell kCell, class Element>
SORA_DEVICE void start_gates(float (&gates)[kGatesOf<kCell>][4], float (&x_new)[4],
                             const Pair<Element> (&gx)[kGatesOf<kCell>][2], const float (&bias)[4][2]) {
  SORA_UNROLL
  for (int gate = 0; gate < kGatesOf<kCell>; ++gate) {
    SORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      float x[2];
      split<Element>(gx[gate][i], x[0], x[1]);
      SORA_UNROLL
      for (int u = 0; u < 2; ++u) {
        if (kCell == Cell::gru && gate == 2) {
          x_new[2 * u + i] = x[u] + bias[2][u];
          gates[2][2 * u + i] = bias[3][u];
        } else {
          gates[gate][2 * u + i] = x[u] + bias[gate][u];
        }
      }
    }
  }
}

template <class Element, int kUnits, Cell kCell, Access kAccess, bool kRagged>
SORA_KERNEL(2 * kUnits, 1) lstm_resident_fwd_kernel(const SORA_GRID_CONSTANT LstmResidentForward args) {
  constexpr int G = kGatesOf<kCell>, kTape = kTapeOf<kCell>;
  using B = Tile<Element, kUnits>;
  using V = GateFloatOf<Element>;
  auto& shared = shared_memory<ForwardShared<Element, kUnits>>();

  const int H = kAccess == Access::exact ? kUnits : int(args.shape.H), D = args.shape.D;
  const int direction = int(block_index().y), member = int(block_index().z);
  const int g = int(lane()) / 4, t = int(lane()) % 4;
  const int unit = int(warp()) * kUnitsPerWarp + 2 * g, units = kAccess == Access::exact ? 2 : H - unit;
  const int64_t rows_before = int64_t(member) * args.shape.data_rows;
  const int64_t states_before = (int64_t(member) * D + direction) * args.shape.B;
  const int64_t tape_before = int64_t(D) * rows_before + direction * args.shape.data_rows;

  Weights<Element, G, kUnits> w;
  load_weights<Element, G, kUnits, kAccess>(
      w, static_cast<const Element*>(args.w_hh[direction]) + int64_t(member) * G * H * H, H, unit);
  Rows<kRagged> rows(args.shape, int(block_index().x) * kRows, 2 * t, direction == 1);

  // b_ih + b_hh; GRU: b_in, then b_hn by itself.
  float bias[4][2] = {};
  if (args.b_ih[direction]) {
    const auto* b_ih = static_cast<const Element*>(args.b_ih[direction]) + member * G * H + unit;
    const auto* b_hh = static_cast<const Element*>(args.b_hh[direction]) + member * G * H + unit;
    SORA_UNROLL
    for (int gate = 0; gate < G; ++gate) {
      float of_x[2], of_h[2];
      split<Element>(load_pair_or_zero<Element, kAccess>(b_ih + gate * H, units), of_x[0], of_x[1]);
      split<Element>(load_pair_or_zero<Element, kAccess>(b_hh + gate * H, units), of_h[0], of_h[1]);
      SORA_UNROLL
      for (int u = 0; u < 2; ++u) {
        const bool apart = kCell == Cell::gru && gate == 2;
        bias[gate][u] = apart ? of_x[u] : of_x[u] + of_h[u];
        if (apart) bias[3][u] = of_h[u];
      }
    }
  }

  // [rows, G*H], [rows, D*H], ...: the thread's first unit in row 0
  const Element* gx_base = static_cast<const Element*>(args.gx) + tape_before * (G * H) + unit;
  Element* y_base = static_cast<Element*>(args.y) + rows_before * (D * H) + direction * H + unit;
  Element* gates_base = static_cast<Element*>(args.gates) + tape_before * (kTape * H) + unit;
  float* cells_base = static_cast<float*>(args.cells) + rows_before * (D * H) + direction * H + unit;
  Pair<Element> gx[G][2] = {};
  const auto load_gx = [&](int i, int row, bool runs) {
    const int there = runs ? units : 0;
    if (there <= 0) return;  // absent units stay 0
    SORA_UNROLL
    for (int gate = 0; gate < G; ++gate)
      gx[gate][i] = load_pair<Element, kAccess>(at_row(gx_base, row, G * H) + gate * H, there);
  };
  // A warp's 16 units of one gate and row are a sector of L2 or two: each lane asks for one.
  const bool asks = !kRagged && g < 2 * G;
  const Element* ask_base = gx_base - 2 * g + g / 2 * H;
  int ask_row = 0;
  if (asks) ask_row = (g % 2 ? rows.data_row(1, 0) : rows.data_row(0, 0)) + (1 + kStepsToL2) * rows.stride;
  keep(gx_base), keep(y_base), keep(gates_base), keep(cells_base);
  if (!kRagged) keep(ask_base);

  Pair<Element> h[2];
  float c[4] = {};
  int row[2] = {}, next[2] = {};
  bool clear[2] = {};
  SORA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int64_t state = (states_before + rows.batch[i]) * H + unit;
    const bool starts = kRagged && rows.reset && !rows.reverse && rows.runs(i, 0) && rows.reset[rows.data_row(i, 0)];
    h[i] = Pair<Element>{};
    const auto* h0 = static_cast<const Element*>(args.h0) + state;
    const auto* c0 = static_cast<const Element*>(args.c0) + state;
    if (args.h0 && !starts) h[i] = load_pair_or_zero<Element, kAccess>(h0, units);
    if (kCell == Cell::lstm && args.c0 && !starts)
      split<Element>(load_pair_or_zero<Element, kAccess>(c0, units), c[i], c[2 + i]);
    store_operands(shared.h[0] + B::offset_of_pair(unit, 2 * t + i), h[i]);
    const bool runs = !kRagged || rows.runs(i, 0);
    if (runs) row[i] = rows.data_row(i, 0);
    load_gx(i, row[i], runs);
    next[i] = rows.moved(i, row[i], 1, 1);
  }

  int buffer = 0, lane_offset = B::offset(t, g);
  int store_offset[2] = {B::offset_of_pair(unit, 2 * t), B::offset_of_pair(unit, 2 * t + 1)};
  keep(lane_offset), keep(store_offset[0]), keep(store_offset[1]);
  const bool takes_gates = kTape > 0 && args.gates, takes_cells = kCell == Cell::lstm && args.cells;
  Pair<Element> tape[kTape ? kTape : 1][2];
  int done[2] = {};  // the data row of the step before
  const auto store_step = [&](int i, int s) {
    int there = rows.runs(i, s) ? units : 0;
    if (kRagged) keep(there);  // or the paths of a row that runs and of one that does not are compiled apart
    if (there > 0) {
      store_pair<Element, kAccess>(at_row(y_base, done[i], D * H), h[i], there);
      if (takes_gates) {
        Element* to = at_row(gates_base, done[i], kTape * H);
        SORA_UNROLL
        for (int gate = 0; gate < kTape; ++gate) store_pair<Element, kAccess>(to + gate * H, tape[gate][i], there);
      }
      if (takes_cells) store_pair<float, kAccess>(at_row(cells_base, done[i], D * H), F32x2{c[i], c[2 + i]}, there);
    }
    if (kRagged && clear[i]) {
      h[i] = Pair<Element>{};
      c[i] = c[2 + i] = 0.0f;
    }
  };

  for (int s = 0; s < rows.steps; ++s) {
    float gates[G][4], x_new[4];
    start_gates<kCell, Element>(gates, x_new, gx, bias);  // and gx is free for the next step's
    SORA_UNROLL
    for (int gate = 0; gate < G; ++gate)
      for (float& x : gates[gate]) keep(x);

    sync_block();
    multiply_shared<Element, G, kUnits>(gates, w, shared.h[0] + buffer + lane_offset, [&] {
      SORA_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (s > 0) store_step(i, s - 1);
        const bool more = kRagged ? rows.runs(i, s + 1) : s + 1 < rows.steps;
        load_gx(i, next[i], more);
        if (kRagged && rows.reset) clear[i] = more && rows.cleared(row[i], next[i]);
        done[i] = row[i];
        row[i] = next[i];
        next[i] = rows.moved(i, next[i], s + 2, 1);
      }
      if (asks && s + 1 + kStepsToL2 < rows.steps) {
        prefetch_l2(at_row(ask_base, ask_row, G * H));
        ask_row += rows.stride;
      }
    });
    buffer ^= B::kBytes;

    float h_new[4], active[4][4];
    SORA_UNROLL
    for (int k = 0; k < 4; ++k) {
      if constexpr (kCell == Cell::lstm) {
        LstmGates<V> cell{{gates[0][k]}, {gates[1][k]}, {gates[2][k]}, {gates[3][k]}};
        V out;
        const float c_new = lstm_cell(cell, V{c[k]}, out).value;
        c[k] = !kRagged || rows.runs(k & 1, s) ? c_new : c[k];
        h_new[k] = out.value;
        active[0][k] = cell.i.value, active[1][k] = cell.f.value;
        active[2][k] = cell.g.value, active[3][k] = cell.o.value;
      } else if constexpr (kCell == Cell::gru) {
        float before[2];
        split<Element>(h[k & 1], before[0], before[1]);
        GruGates<V> cell{{gates[0][k]}, {gates[1][k]}, {x_new[k]}, {gates[2][k]}};
        h_new[k] = gru_cell(cell, V{before[k >> 1]}).value;
        active[0][k] = cell.r.value, active[1][k] = cell.z.value;
        active[2][k] = cell.n.value, active[3][k] = cell.q.value;
      } else {
        const V sum{gates[0][k]};
        h_new[k] = (args.shape.cell == Cell::rnn_relu ? relu(sum) : tanh(sum)).value;
      }
    }
    SORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Pair<Element> h_pair = pair_of<Element>(h_new[i], h_new[2 + i]);
      h[i] = !kRagged || rows.runs(i, s) ? h_pair : h[i];
      store_operands(shared.h[0] + buffer + store_offset[i], kRagged && clear[i] ? Pair<Element>{} : h[i]);
    }
    if (takes_gates) {
      SORA_UNROLL
      for (int gate = 0; gate < kTape; ++gate)
        for (int i = 0; i < 2; ++i) tape[gate][i] = pair_of<Element>(active[gate][i], active[gate][2 + i]);
    }
  }

  SORA_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (rows.steps > 0) store_step(i, rows.steps - 1);
    const int64_t state = (states_before + rows.batch[i]) * H + unit;
    const int there = rows.there[i] ? units : 0;
    if (there <= 0) continue;
    store_pair<Element, kAccess>(static_cast<Element*>(args.h_n) + state, h[i], there);
    if constexpr (kCell == Cell::lstm)
      store_pair<Element, kAccess>(static_cast<Element*>(args.c_n) + state, pair_of<Element>(c[i], c[2 + i]), there);
  }
}

// For launch_pass.
struct ForwardPass {
  using Args = LstmResidentForward;
  template <class Element, int kUnits, Cell kCell>
  using Shared = ForwardShared<Element, kUnits>;
  template <class Element, int kUnits, Cell kCell, Access kAccess, bool kRagged>
  static constexpr auto kernel = &lstm_resident_fwd_kernel<Element, kUnits, kCell, kAccess, kRagged>;
};

}  // namespace resident
}  // namespace sora
