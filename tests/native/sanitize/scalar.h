// The recurrent layer in plain scalar double arithmetic, written from the formulas of csrc/lstm/lstm.h alone: what the
// driver holds the kernels against. Rows are walked one at a time; nothing here knows of vectors, threads or packing.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "lstm/lstm.h"

namespace scalar {

using sora::Cell;
using sora::DType;
using Values = std::vector<double>;

inline double round_to(DType dtype, double value) {
  if (dtype == DType::float64) return value;
  const float narrow = static_cast<float>(value);
  if (dtype == DType::float32) return narrow;
  uint32_t bits;
  __builtin_memcpy(&bits, &narrow, sizeof(bits));
  bits = narrow == narrow ? (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u : bits | 0x00400000u;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// One layer's problem: sizes, which rows run at which step, and every input, already rounded to `dtype`. Empty vectors
// are null pointers.
struct Problem {
  Cell cell;
  DType dtype;
  int64_t T, B, H, P;
  int D;
  std::vector<int64_t> batch_sizes, order;
  std::vector<uint8_t> reset;  // data rows
  bool gates_given = false;    // w_hh is null: `input` holds W_hh h(t-1)
  bool int8 = false;           // row r of w_hh is whole numbers of up to 127 times int8_scale(r)
  Values input;                // [D, packed rows, input_width()], dense
  Values b_ih[2], b_hh[2], w_hh[2], w_hr[2], h0, c0;
  Values dy, dcells, dh_n, dc_n;

  double int8_scale(int64_t row) const { return std::ldexp(1, -7 - int(row % 3)); }
  int64_t gates() const { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
  int64_t tape() const { return cell == Cell::lstm || cell == Cell::gru ? 4 : 0; }
  int64_t dgates() const { return cell == Cell::gru ? 4 : gates(); }
  int64_t input_width() const { return (gates_given && cell == Cell::gru ? 4 : gates()) * H; }
  int64_t out() const { return P ? P : H; }
  int64_t rows_at(int64_t t) const { return batch_sizes.empty() ? B : batch_sizes[t]; }
  int64_t packed_rows() const { return packed(T, 0); }
  int64_t data_rows() const { return order.empty() ? packed_rows() : T * B; }
  int64_t packed(int64_t t, int64_t b) const {
    int64_t row = b;
    for (int64_t earlier = 0; earlier < t; ++earlier) row += rows_at(earlier);
    return row;
  }
  int64_t data(int64_t t, int64_t b) const { return order.empty() ? packed(t, b) : t * B + order[b]; }
  int64_t state(int d, int64_t b) const { return d * B + (order.empty() ? b : order[b]); }
  int64_t length(int64_t b) const {
    int64_t steps = 0;
    while (steps < T && rows_at(steps) > b) ++steps;
    return steps;
  }
  bool cleared_before(int d, int64_t t, int64_t b) const {
    const int64_t boundary = t + d;
    return !reset.empty() && boundary < length(b) && reset[data(boundary, b)];
  }
};

struct Outputs {
  Values gates, y, cells, h_n, c_n;
  Values h_prev[2];  // [packed rows, out()]: after clearing
};

struct Gradients {
  Values dgates, dh, dh0, dc0;
};

inline double at(const Values& values, int64_t index) { return values.empty() ? 0.0 : values[index]; }
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

inline Outputs forward(const Problem& p) {
  const int64_t H = p.H, G = p.gates(), O = p.out(), N = p.packed_rows(), M = p.data_rows();
  const double nan = std::nan("");
  Outputs out;
  out.gates.assign(p.D * M * p.tape() * H, nan);
  out.y.assign(M * p.D * O, nan);
  out.cells.assign(M * p.D * H, nan);
  out.h_n.assign(p.D * p.B * O, nan);
  out.c_n.assign(p.D * p.B * H, nan);
  for (int d = 0; d < p.D; ++d) {
    out.h_prev[d].assign(N * O, nan);
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t length = p.length(b), own = p.state(d, b);
      Values h(O), c(H), m(H);
      for (int64_t k = 0; k < O; ++k) h[k] = at(p.h0, own * O + k);
      for (int64_t j = 0; j < H; ++j) c[j] = at(p.c0, own * H + j);
      for (int64_t s = 0; s < length; ++s) {
        const int64_t t = d == 0 ? s : length - 1 - s, data = p.data(t, b), packed = p.packed(t, b);
        if (p.cleared_before(d, t, b)) h.assign(O, 0.0), c.assign(H, 0.0);
        for (int64_t k = 0; k < O; ++k) out.h_prev[d][packed * O + k] = h[k];
        const double* x = p.input.data() + (d * N + packed) * p.input_width();
        double* tape = out.gates.data() + (d * M + data) * p.tape() * H;
        for (int64_t j = 0; j < H; ++j) {
          double a[4] = {}, u[4] = {};
          for (int64_t g = 0; g < G; ++g) {
            a[g] = x[g * H + j] + at(p.b_ih[d], g * H + j);
            u[g] = at(p.b_hh[d], g * H + j);
            if (p.gates_given && p.cell == Cell::gru && g == 2) u[g] += x[3 * H + j];
            for (int64_t k = 0; k < O && !p.gates_given; ++k) u[g] += p.w_hh[d][(g * H + j) * O + k] * h[k];
          }
          if (p.cell == Cell::lstm) {
            const double i = sigmoid(a[0] + u[0]), f = sigmoid(a[1] + u[1]), g = std::tanh(a[2] + u[2]),
                         o = sigmoid(a[3] + u[3]);
            c[j] = f * c[j] + i * g;
            m[j] = o * std::tanh(c[j]);
            tape[j] = i, tape[H + j] = f, tape[2 * H + j] = g, tape[3 * H + j] = o;
            out.cells[(data * p.D + d) * H + j] = c[j];
          } else if (p.cell == Cell::gru) {
            const double r = sigmoid(a[0] + u[0]), z = sigmoid(a[1] + u[1]), q = u[2], n = std::tanh(a[2] + r * q);
            m[j] = (1 - z) * n + z * h[j];
            tape[j] = r, tape[H + j] = z, tape[2 * H + j] = n, tape[3 * H + j] = q;
          } else {
            m[j] = p.cell == Cell::rnn_tanh ? std::tanh(a[0] + u[0]) : std::fmax(a[0] + u[0], 0);
          }
        }
        for (int64_t k = 0; k < O; ++k) {
          double sum = p.P ? 0 : m[k];
          for (int64_t j = 0; j < H && p.P; ++j) sum += p.w_hr[d][k * H + j] * m[j];
          h[k] = round_to(p.dtype, sum);
          out.y[(data * p.D + d) * O + k] = h[k];
        }
      }
      for (int64_t k = 0; k < O; ++k) out.h_n[own * O + k] = h[k];
      for (int64_t j = 0; j < H; ++j) out.c_n[own * H + j] = c[j];
    }
  }
  return out;
}

// From the tapes of a forward pass, as the kernels are given them.
inline Gradients backward(const Problem& p, const Outputs& tapes) {
  const int64_t H = p.H, G = p.gates(), A = p.dgates(), O = p.out(), N = p.packed_rows(), M = p.data_rows();
  const double nan = std::nan("");
  Gradients out;
  out.dgates.assign(p.D * N * A * H, nan);
  out.dh.assign(p.D * N * p.P, nan);
  out.dh0.assign(p.D * p.B * O, nan);
  out.dc0.assign(p.D * p.B * H, nan);
  for (int d = 0; d < p.D; ++d) {
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t length = p.length(b), own = p.state(d, b);
      Values dh(O), dc(H);
      for (int64_t k = 0; k < O; ++k) dh[k] = at(p.dh_n, own * O + k);
      for (int64_t j = 0; j < H; ++j) dc[j] = at(p.dc_n, own * H + j);
      for (int64_t s = length - 1; s >= 0; --s) {
        const int64_t t = d == 0 ? s : length - 1 - s, data = p.data(t, b), packed = p.packed(t, b);
        const bool first = s == 0, clear = p.cleared_before(d, t, b);
        const int64_t before = first ? -1 : p.data(d == 0 ? t - 1 : t + 1, b);
        const double* tape = tapes.gates.data() + (d * M + data) * p.tape() * H;
        for (int64_t k = 0; k < O; ++k) {
          dh[k] += at(p.dy, (data * p.D + d) * O + k);
          if (p.P) out.dh[(d * N + packed) * p.P + k] = dh[k];
        }
        Values da(A * H), dh_prev(O), dc_prev(H);
        for (int64_t j = 0; j < H; ++j) {
          double dm = p.P ? 0 : dh[j];
          for (int64_t k = 0; k < O && p.P; ++k) dm += p.w_hr[d][k * H + j] * dh[k];
          const auto earlier = [&](const Values& values, const Values& first_values) {
            if (clear) return 0.0;
            return first ? at(first_values, own * H + j) : values[(before * p.D + d) * H + j];
          };
          if (p.cell == Cell::lstm) {
            const double i = tape[j], f = tape[H + j], g = tape[2 * H + j], o = tape[3 * H + j];
            const double tanh_c = std::tanh(tapes.cells[(data * p.D + d) * H + j]);
            const double whole = dc[j] + at(p.dcells, (data * p.D + d) * H + j) + dm * o * (1 - tanh_c * tanh_c);
            da[j] = whole * g * i * (1 - i);
            da[H + j] = whole * earlier(tapes.cells, p.c0) * f * (1 - f);
            da[2 * H + j] = whole * i * (1 - g * g);
            da[3 * H + j] = dm * tanh_c * o * (1 - o);
            dc_prev[j] = whole * f;
          } else if (p.cell == Cell::gru) {
            const double r = tape[j], z = tape[H + j], n = tape[2 * H + j], q = tape[3 * H + j];
            const double dn = dm * (1 - z) * (1 - n * n);
            da[j] = dn * q * r * (1 - r);
            da[H + j] = dm * (earlier(tapes.y, p.h0) - n) * z * (1 - z);
            da[2 * H + j] = dn;
            da[3 * H + j] = dn * r;
            dh_prev[j] = dm * z;
          } else {
            const double h = tapes.y[(data * p.D + d) * H + j];
            da[j] = p.cell == Cell::rnn_tanh ? dm * (1 - h * h) : h > 0 ? dm : 0;
          }
        }
        for (int64_t g = 0; g < G; ++g) {
          const int64_t from = p.cell == Cell::gru && g == 2 ? 3 : g;  // the part of u, not of a
          for (int64_t j = 0; j < H; ++j)
            for (int64_t k = 0; k < O; ++k) dh_prev[k] += da[from * H + j] * p.w_hh[d][(g * H + j) * O + k];
        }
        for (int64_t j = 0; j < A * H; ++j) out.dgates[(d * N + packed) * A * H + j] = da[j];
        dh = clear ? Values(O) : dh_prev;
        dc = clear ? Values(H) : dc_prev;
      }
      for (int64_t k = 0; k < O; ++k) out.dh0[own * O + k] = dh[k];
      for (int64_t j = 0; j < H; ++j) out.dc0[own * H + j] = dc[j];
    }
  }
  return out;
}

}  // namespace scalar
