// The arithmetic of lstm_cpu.cpp for one instruction set (see simd.h for how it is chosen): what a cell does with the
// sums of products.h, forward and backward.
#pragma once

#include "../common/simd.h"
#include "cell.h"
#include "lstm_kernels.h"
#include "lstm_step.h"
#include "products.h"

namespace sora {
namespace SORA_ISA {

template <class Element, Cell cell>
struct Recurrence {
  using S = Simd<Element>;
  using State = typename S::State;
  using States = Simd<State>;
  using V = typename S::V;
  static constexpr int64_t lanes = S::lanes;
  static constexpr int G = cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;
  static constexpr int kTape = 4;                        // columns of the gates array, in units of H
  static constexpr int kGrads = cell == Cell::gru ? 4 : G;  // of the dgates array

  static int64_t output_size(const LstmShape& shape) { return shape.P ? shape.P : shape.H; }
  static const Element* element(const void* p) { return static_cast<const Element*>(p); }
  static const State* state(const void* p) { return static_cast<const State*>(p); }
  // Row b of direction d in a scratch array [D, B, width].
  static State* scratch_row(void* array, const LstmShape& shape, int d, int64_t b, int64_t width) {
    return static_cast<State*>(array) + (d * shape.B + b) * width;
  }
  // The same in an array of states that the caller gave.
  static int64_t state_row(const LstmRows& where, int d, int64_t b, int64_t width) {
    return (d * where.shape.B + where.state(b)) * width;
  }
  // Row (t, b) in an array [data rows, D * width].
  static int64_t wide_row(const LstmRows& where, int d, int64_t t, int64_t b, int64_t width) {
    return (where.data(t, b) * where.shape.D + d) * width;
  }
  static Range active(const LstmRows& where, Range rows, int64_t t) {
    return {rows.begin, std::min(rows.end, where.active(t))};
  }
  static V load_or_zero(const void* array, int64_t at, int64_t n) {
    return array ? load_n<Element>(element(array) + at, n) : V{};
  }

  static void pack(const void* w, const LstmPacking& p, Range units, void* packed) {
    switch (p.kept_as) {
      case LstmWeights::state: return pack_as<Element, State>(w, p, units, packed);
      case LstmWeights::element: return pack_as<Element, Element>(w, p, units, packed);
      case LstmWeights::int8:
        if constexpr (std::is_same_v<State, float>) pack_as<int8_t, int8_t>(w, p, units, packed);
    }
  }

  static void add_biases(const LstmForward& a, int d, void* bias) {
    const int64_t H = a.shape.H;
    const Element *b_ih = element(a.b_ih[d]), *b_hh = element(a.b_hh[d]);
    const int64_t whole = cell == Cell::gru ? 2 * H : G * H;
    State* to = static_cast<State*>(bias);
    for (int64_t j = 0; j < whole; ++j) to[j] = S::widen(b_ih[j]) + S::widen(b_hh[j]);
    if constexpr (cell == Cell::gru)
      for (int64_t j = 0; j < H; ++j) {
        to[2 * H + j] = S::widen(b_ih[2 * H + j]);
        to[3 * H + j] = S::widen(b_hh[2 * H + j]);
      }
  }

  // Calls each(row, unit, units of the vector).
  template <class Each>
  static void for_units(const LstmPart& part, const Each& each) {
    for (int64_t b = part.rows.begin; b < part.rows.end; ++b)
      for (int64_t j = part.units.begin; j < part.units.end; j += lanes)
        each(b, j, std::min(lanes, part.units.end - j));
  }

  static void forward_begin(const LstmForward& a, const LstmScratch& scratch, const LstmPart& outputs,
                            const LstmPart& hidden) {
    const LstmRows where{a.shape, scratch.offsets};
    const int64_t O = output_size(a.shape), H = a.shape.H;
    const int d = outputs.direction;
    // Whether the row's first step clears the state; only the forward direction's can.
    const auto cleared = [&](int64_t b) { return d == 0 && where.clears(d, 0, b); };
    const auto has_step = [&](int64_t b) { return where.has(0, b); };
    for_units(outputs, [&](int64_t b, int64_t j, int64_t n) {
      const int64_t at = state_row(where, d, b, O) + j;
      const V h = load_or_zero(a.h0, at, n);
      if (a.h_n && !has_step(b)) store_n<Element>(static_cast<Element*>(a.h_n) + at, n, h);
      for (int64_t parity = 0; parity < 2; ++parity)  // rows do not all begin at the same step
        store_n<State>(scratch_row(scratch.h, a.shape, parity * a.shape.D + d, b, O) + j, n, cleared(b) ? V{} : h);
    });
    if constexpr (cell == Cell::lstm)
      for_units(hidden, [&](int64_t b, int64_t j, int64_t n) {
        const int64_t at = state_row(where, d, b, H) + j;
        const V c = load_or_zero(a.c0, at, n);
        if (a.c_n && !has_step(b)) store_n<Element>(static_cast<Element*>(a.c_n) + at, n, c);
        store_n<State>(scratch_row(scratch.c, a.shape, d, b, H) + j, n, cleared(b) ? V{} : c);
      });
  }

  // Where row b of a step reads and writes; null for what is not there or not wanted.
  struct ForwardRow {
    const Element* input;
    const State* h_prev;
    Element* gates;
    State *c, *m, *cells;
    State* h;  // for the next step
    Element* y;
    Element *h_n, *c_n;  // of the row's last step
    bool clears;         // the next step begins a new sequence
  };
  static ForwardRow forward_row(const LstmForward& a, const LstmScratch& scratch, const LstmRows& where, int d,
                                int64_t s, int64_t b) {
    const LstmShape& shape = a.shape;
    const int64_t t = where.step(d, s), next = where.after(d, t), O = output_size(shape), H = shape.H;
    const bool last = !where.has(next, b);
    const auto row = [](void* array, int64_t at) { return array ? static_cast<Element*>(array) + at : nullptr; };
    ForwardRow found{};
    found.input = element(a.input) + (d * where.packed_rows() + where.packed(t, b)) * a.input_stride;
    found.h_prev = scratch_row(scratch.h, shape, s % 2 * shape.D + d, b, O);
    found.h = scratch_row(scratch.h, shape, (s + 1) % 2 * shape.D + d, b, O);
    found.gates = row(a.gates, (d * where.data_rows() + where.data(t, b)) * kTape * H);
    found.y = row(a.y, wide_row(where, d, t, b, O));
    if (scratch.c) found.c = scratch_row(scratch.c, shape, d, b, H);
    if (scratch.m) found.m = scratch_row(scratch.m, shape, d, b, H);
    if (a.cells) found.cells = static_cast<State*>(a.cells) + wide_row(where, d, t, b, H);
    if (last) {
      found.h_n = row(a.h_n, state_row(where, d, b, O));
      found.c_n = row(a.c_n, state_row(where, d, b, H));
    }
    found.clears = !last && where.clears(d, next, b);
    return found;
  }

  static void store_h(const ForwardRow& row, int64_t j, int64_t n, V h) {
    store_n<State>(row.h + j, n, row.clears ? V{} : h);
    if (row.y) store_n<Element>(row.y + j, n, h);
    if (row.h_n) store_n<Element>(row.h_n + j, n, h);
  }

  static void forward_cell(const LstmForward& a, const LstmScratch& scratch, const LstmPart& part, int64_t s) {
    const LstmRows where{a.shape, scratch.offsets};
    const int d = part.direction;
    const int64_t H = a.shape.H;
    const State* bias = state(scratch.bias[d]);
    const bool with_h = scratch.w_hh[d];
    const float* scale = a.int8_scale[d];
    ForwardRow rows[kBlockRows];
    const auto prepare = [&](Range some) {
      for (int64_t b = some.begin; b < some.end; ++b) rows[b - some.begin] = forward_row(a, scratch, where, d, s, b);
    };
    const auto ahead = [&rows, H](const Place<State>& p) __attribute__((always_inline)) {
      for (int g = 0; g < G; ++g) __builtin_prefetch(rows[p.slot].input + g * H + p.unit);
    };
    const auto each = [&rows, bias, scale, H, with_h](const Place<State>* places, auto number) __attribute__((always_inline)) {
      constexpr int N = decltype(number)::value;
      const auto load = [places](const auto& one) __attribute__((always_inline)) { return load_each<N>(places, one); };
      const auto units = [H](const Place<State>& p) __attribute__((always_inline)) {
        return std::min(lanes, H - p.unit);
      };
      // Gate g before activation, from the input's and the biases' column and the sum of that number.
      const auto from_x = [&](int g) __attribute__((always_inline)) {
        return load([&](const Place<State>& p) __attribute__((always_inline)) {
          const V x = load_n<Element>(rows[p.slot].input + g * H + p.unit, units(p));
          return bias ? x + load_n<State>(bias + g * H + p.unit, units(p)) : x;
        });
      };
      const auto from_h = [&](int g) __attribute__((always_inline)) {
        return load([&](const Place<State>& p) __attribute__((always_inline)) {
          const V sum = States::load(p.sums + g * lanes);
          if constexpr (std::is_same_v<State, float>)
            if (scale) return sum * load_n<float>(scale + g * H + p.unit, units(p));
          return sum;
        });
      };
      const auto rounded = [&](const auto& v) __attribute__((always_inline)) {
        if constexpr (N == 1)
          return S::round(v);
        else
          return Pair<V>{S::round(v.a), S::round(v.b)};
      };
      // Gates for the backward pass.
      const auto keep = [&](const auto& g0, const auto& g1, const auto& g2, const auto& g3)
          __attribute__((always_inline)) {
        if (!rows[places[0].slot].gates) return;
        const auto store = [&](int g) __attribute__((always_inline)) {
          return [&, g](const Place<State>& p, V one) __attribute__((always_inline)) {
            store_n<Element>(rows[p.slot].gates + g * H + p.unit, units(p), one);
          };
        };
        store_each(places, g0, store(0)), store_each(places, g1, store(1));
        store_each(places, g2, store(2)), store_each(places, g3, store(3));
      };
      const auto give_h = [&](const auto& h) __attribute__((always_inline)) {
        store_each(places, h, [&](const Place<State>& p, V one) __attribute__((always_inline)) {
          store_h(rows[p.slot], p.unit, units(p), one);
        });
      };
      if constexpr (cell == Cell::lstm) {
        LstmGates<decltype(from_x(0))> gate{from_x(0) + from_h(0), from_x(1) + from_h(1), from_x(2) + from_h(2),
                                            from_x(3) + from_h(3)};
        auto h = load([&](const Place<State>& p) __attribute__((always_inline)) {
          return load_n<State>(rows[p.slot].c + p.unit, units(p));
        });
        const auto c = lstm_cell(gate, h, h);
        h = rounded(h);
        keep(gate.i, gate.f, gate.g, gate.o);
        store_each(places, c, [&](const Place<State>& p, V one) __attribute__((always_inline)) {
          const ForwardRow& row = rows[p.slot];
          store_n<State>(row.c + p.unit, units(p), row.clears ? V{} : one);
          if (row.cells) store_n<State>(row.cells + p.unit, units(p), one);
          if (row.c_n) store_n<Element>(row.c_n + p.unit, units(p), one);
        });
        if (!rows[places[0].slot].m) return give_h(h);
        store_each(places, h, [&](const Place<State>& p, V one) __attribute__((always_inline)) {
          store_n<State>(rows[p.slot].m + p.unit, units(p), one);
        });
      } else if constexpr (cell == Cell::gru) {
        // W_hn h is the sum, or of the input's columns the fourth.
        const auto q = with_h ? from_h(2) : load([&](const Place<State>& p) __attribute__((always_inline)) {
          return load_n<Element>(rows[p.slot].input + 3 * H + p.unit, units(p));
        });
        const auto b_hn = load([&](const Place<State>& p) __attribute__((always_inline)) {
          return bias ? load_n<State>(bias + 3 * H + p.unit, units(p)) : V{};
        });
        GruGates<decltype(from_x(0))> gate{from_x(0) + from_h(0), from_x(1) + from_h(1), from_x(2), q + b_hn};
        const auto h_prev = load([&](const Place<State>& p) __attribute__((always_inline)) {
          return load_n<State>(rows[p.slot].h_prev + p.unit, units(p));
        });
        const auto h = rounded(gru_cell(gate, h_prev));
        keep(gate.r, gate.z, gate.n, gate.q);
        give_h(h);
      } else if constexpr (cell == Cell::rnn_tanh) {
        give_h(rounded(tanh(from_x(0) + from_h(0))));
      } else {
        store_each(places, from_x(0) + from_h(0), [&](const Place<State>& p, V one) __attribute__((always_inline)) {
          store_h(rows[p.slot], p.unit, units(p), S::round(relu(one)));
        });
      }
    };
    for_products<Element>(with_h ? scratch.w_hh[d] : nullptr, scratch.hh, active(where, part.rows, where.step(d, s)),
                 part.units, scratch_row(scratch.h, a.shape, s % 2 * a.shape.D + d, 0, output_size(a.shape)), s,
                 prepare, ahead, each);
  }

  // As for_products, a place and its only sum at a time.
  template <class Each>
  static void for_sums(const void* packed, const LstmPacking& packing, Range rows, Range units, const State* x,
                       int64_t s, const Each& each) {
    for_products<Element>(
        packed, packing, rows, units, x, s, [](Range) {}, [](const Place<State>&) {},
        [&](const Place<State>* places, auto number) {
          for (int i = 0; i < decltype(number)::value; ++i)
            each(places[i].row, places[i].unit, States::load(places[i].sums));
        });
  }

  static void forward_project(const LstmForward& a, const LstmScratch& scratch, const LstmPart& part, int64_t s) {
    const LstmRows where{a.shape, scratch.offsets};
    const int d = part.direction;
    for_sums(scratch.w_hr[d], scratch.hr, active(where, part.rows, where.step(d, s)), part.units,
             scratch_row(scratch.m, a.shape, d, 0, a.shape.H), s, [&](int64_t b, int64_t j, V sum) {
               const int64_t n = std::min(lanes, a.shape.P - j);
               store_h(forward_row(a, scratch, where, d, s, b), j, n, S::round(sum));
             });
  }

  static void backward_begin(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& outputs,
                             const LstmPart& hidden) {
    const LstmRows where{a.shape, scratch.offsets};
    const int64_t O = output_size(a.shape), H = a.shape.H;
    const int d = outputs.direction;
    for_units(outputs, [&](int64_t b, int64_t j, int64_t n) {
      const V dh = load_or_zero(a.dh_n, state_row(where, d, b, O) + j, n);
      store_n<State>(scratch_row(scratch.h, a.shape, d, b, O) + j, n, dh);
    });
    if constexpr (cell == Cell::lstm)
      for_units(hidden, [&](int64_t b, int64_t j, int64_t n) {
        const V dc = load_or_zero(a.dc_n, state_row(where, d, b, H) + j, n);
        store_n<State>(scratch_row(scratch.c, a.shape, d, b, H) + j, n, dc);
      });
  }

  static void backward_end(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& outputs,
                           const LstmPart& hidden) {
    const LstmRows where{a.shape, scratch.offsets};
    const int64_t O = output_size(a.shape), H = a.shape.H;
    const int d = outputs.direction;
    for_units(outputs, [&](int64_t b, int64_t j, int64_t n) {
      const V dh = load_n<State>(scratch_row(scratch.h, a.shape, d, b, O) + j, n);
      store_n<Element>(static_cast<Element*>(a.dh0) + state_row(where, d, b, O) + j, n, dh);
    });
    if constexpr (cell == Cell::lstm)
      for_units(hidden, [&](int64_t b, int64_t j, int64_t n) {
        const V dc = load_n<State>(scratch_row(scratch.c, a.shape, d, b, H) + j, n);
        store_n<Element>(static_cast<Element*>(a.dc0) + state_row(where, d, b, H) + j, n, dc);
      });
  }

  static void backward_outputs(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& part, int64_t s) {
    const LstmRows where{a.shape, scratch.offsets};
    const int d = part.direction;
    const int64_t t = where.step(1 - d, s), P = a.shape.P, packed_rows = where.packed_rows();
    for_units({d, active(where, part.rows, t), part.units}, [&](int64_t b, int64_t j, int64_t n) {
      V dh = load_n<State>(scratch_row(scratch.h, a.shape, d, b, P) + j, n);
      if (a.dy) dh += load_n<Element>(element(a.dy) + wide_row(where, d, t, b, P) + j, n);
      store_n<State>(scratch_row(scratch.dh, a.shape, d, b, P) + j, n, dh);
      store_n<Element>(static_cast<Element*>(a.dh) + (d * packed_rows + where.packed(t, b)) * P + j, n, dh);
    });
  }

  static void backward_project(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& part, int64_t s) {
    const LstmRows where{a.shape, scratch.offsets};
    const int d = part.direction;
    const int64_t t = where.step(1 - d, s), H = a.shape.H;
    for_sums(scratch.w_hr[d], scratch.hr, active(where, part.rows, t), part.units,
             scratch_row(scratch.dh, a.shape, d, 0, a.shape.P), s, [&](int64_t b, int64_t j, V sum) {
               store_n<State>(scratch_row(scratch.m, a.shape, d, b, H) + j, std::min(lanes, H - j), sum);
             });
  }

  // The state that step t of row b started from: `states` [data rows, D*H] holds what the steps left.
  template <class Kept>
  static V previous(const LstmRows& where, int d, int64_t t, int64_t b, int64_t j, int64_t n, const Kept* states,
                    const void* first) {
    const int64_t H = where.shape.H, before = where.before(d, t);
    if (where.clears(d, t, b)) return V{};
    if (where.has(before, b)) return load_n<Kept>(states + wide_row(where, d, before, b, H) + j, n);
    return load_or_zero(first, state_row(where, d, b, H) + j, n);
  }

  static void backward_cell(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& part, int64_t s) {
    const LstmRows where{a.shape, scratch.offsets};
    const int d = part.direction;
    const int64_t t = where.step(1 - d, s), H = a.shape.H;
    const int64_t packed_rows = where.packed_rows(), data_rows = where.data_rows();
    for_units({d, active(where, part.rows, t), part.units}, [&](int64_t b, int64_t j, int64_t n) {
      const int64_t at = wide_row(where, d, t, b, H) + j;
      State* dgates_state = scratch_row(scratch.dgates, a.shape, s % 2 * a.shape.D + d, b, G * H) + j;
      Element* dgates = static_cast<Element*>(a.dgates) + (d * packed_rows + where.packed(t, b)) * kGrads * H + j;
      const auto gate = [&](int g) {
        return load_n<Element>(element(a.gates) + (d * data_rows + where.data(t, b)) * kTape * H + g * H + j, n);
      };
      const auto give = [&](int column, V grad) { store_n<Element>(dgates + column * H, n, grad); };
      const auto give_product = [&](int column, V grad) { store_n<State>(dgates_state + column * H, n, grad); };
      const bool clears = where.clears(d, t, b);
      State* dh_state = scratch_row(scratch.h, a.shape, d, b, H) + j;  // without a projection
      V dh;
      if (scratch.m) {
        dh = load_n<State>(scratch_row(scratch.m, a.shape, d, b, H) + j, n);
      } else {
        dh = load_n<State>(dh_state, n);
        if (a.dy) dh += load_n<Element>(element(a.dy) + at, n);
        if (!a.w_hh[d]) store_n<State>(dh_state, n, V{});
      }
      if constexpr (cell == Cell::lstm) {
        State* dc_state = scratch_row(scratch.c, a.shape, d, b, H) + j;
        V dc = load_n<State>(dc_state, n);
        if (a.dcells) dc += load_n<State>(state(a.dcells) + at, n);
        const LstmGates<V> gates{gate(0), gate(1), gate(2), gate(3)};
        const V c_prev = previous(where, d, t, b, j, n, state(a.cells), a.c0);
        const LstmGates<V> grad = lstm_cell_backward(gates, c_prev, load_n<State>(state(a.cells) + at, n), dh, dc);
        store_n<State>(dc_state, n, clears ? V{} : dc);
        give(0, grad.i), give(1, grad.f), give(2, grad.g), give(3, grad.o);
        give_product(0, grad.i), give_product(1, grad.f), give_product(2, grad.g), give_product(3, grad.o);
      } else if constexpr (cell == Cell::gru) {
        const GruGates<V> gates{gate(0), gate(1), gate(2), gate(3)};
        const GruGates<V> grad = gru_cell_backward(gates, previous(where, d, t, b, j, n, element(a.y), a.h0), dh);
        store_n<State>(dh_state, n, !a.w_hh[d] && clears ? V{} : dh);
        give(0, grad.r), give(1, grad.z), give(2, grad.n), give(3, grad.q);
        give_product(0, grad.r), give_product(1, grad.z), give_product(2, grad.q);
      } else {
        const V h = load_n<Element>(element(a.y) + at, n);
        const V grad = cell == Cell::rnn_tanh ? tanh_backward(h, dh) : relu_backward(h, dh);
        give(0, grad), give_product(0, grad);
      }
    });
  }

  static void backward_product(const LstmBackward& a, const LstmScratch& scratch, const LstmPart& part, int64_t s) {
    const LstmRows where{a.shape, scratch.offsets};
    const int d = part.direction;
    const int64_t t = where.step(1 - d, s), O = output_size(a.shape);
    for_sums(scratch.w_hh[d], scratch.hh, active(where, part.rows, t), part.units,
             scratch_row(scratch.dgates, a.shape, s % 2 * a.shape.D + d, 0, G * a.shape.H), s,
             [&](int64_t b, int64_t j, V dh) {
               const int64_t n = std::min(lanes, O - j);
               State* dh_state = scratch_row(scratch.h, a.shape, d, b, O) + j;
               if constexpr (cell == Cell::gru) dh += load_n<State>(dh_state, n);  // what went past the gates
               store_n<State>(dh_state, n, where.clears(d, t, b) ? V{} : dh);
             });
  }

  static const LstmKernels* table() {
    static const LstmKernels kernels{SORA_ISA_NAME,     lanes,
                                     sizeof(State),     sizeof(Element),
                                     pack,              add_biases,
                                     forward_begin,     backward_begin,
                                     backward_end,      forward_cell,
                                     forward_project,   backward_outputs,
                                     backward_project,  backward_cell,
                                     backward_product,  LstmStep<Element, cell>::forward,
                                     LstmStep<Element, cell>::backward};
    return &kernels;
  }
};

template <class Element>
const LstmKernels* table_for(Cell cell) {
  switch (cell) {
    case Cell::lstm: return Recurrence<Element, Cell::lstm>::table();
    case Cell::gru: return Recurrence<Element, Cell::gru>::table();
    case Cell::rnn_tanh: return Recurrence<Element, Cell::rnn_tanh>::table();
    case Cell::rnn_relu: return Recurrence<Element, Cell::rnn_relu>::table();
  }
  return nullptr;
}

inline const LstmKernels* kernels_for(DType dtype, Cell cell) {
  switch (dtype) {
    case DType::float32: return table_for<float>(cell);
    case DType::float64: return table_for<double>(cell);
    case DType::bfloat16: return table_for<BFloat16>(cell);
    default: return nullptr;
  }
}

}  // namespace SORA_ISA
}  // namespace sora
