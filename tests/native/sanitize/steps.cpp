// The cases of driver.cpp a step at a time: LstmSteps of csrc/lstm/lstm.h, with the products made here.
#include <algorithm>

#include "cases.h"

namespace cases {
namespace {

using scalar::Cell;
using scalar::Problem;

// Where each (step, row) pair of a problem lies for LstmSteps, which has no order: with one, rows have lengths.
struct Layout {
  const Problem& p;
  bool packed = !p.batch_sizes.empty() && p.order.empty();
  std::unique_ptr<int64_t[]> offsets, lengths;
  std::unique_ptr<uint8_t[]> reset;

  explicit Layout(const Problem& p) : p(p) {
    if (packed) {
      offsets.reset(new int64_t[p.T + 1]);
      for (int64_t t = 0; t <= p.T; ++t) offsets[t] = p.packed(t, 0);
    } else if (!p.order.empty()) {
      lengths.reset(new int64_t[p.B]);
      for (int64_t b = 0; b < p.B; ++b) lengths[p.order[b]] = p.length(b);
    }
    if (!p.reset.empty()) {
      reset.reset(new uint8_t[p.reset.size()]);
      std::memcpy(reset.get(), p.reset.data(), p.reset.size());
    }
  }
  sora::LstmSteps steps(int d) const {
    return {p.cell, p.T, p.B, p.H, d, offsets.get(), lengths.get(), reset.get()};
  }
  int64_t rows(int64_t t) const { return packed ? p.rows_at(t) : p.B; }
  int64_t first(int64_t t) const { return packed ? p.packed(t, 0) : t * p.B; }
  int64_t step(int d, int64_t s) const { return d == 0 ? s : p.T - 1 - s; }
  // [packed rows, width] of direction d -> data rows.
  Values spread(const Values& values, int d, int64_t width, double elsewhere) const {
    Values found(p.data_rows() * width, elsewhere);
    for (int64_t t = 0; t < p.T; ++t)
      for (int64_t b = 0; b < p.rows_at(t); ++b)
        for (int64_t k = 0; k < width; ++k)
          found[p.data(t, b) * width + k] = values[(d * p.packed_rows() + p.packed(t, b)) * width + k];
    return found;
  }
};

Values zeros_for_nan(Values values) {
  for (double& v : values)
    if (v != v) v = 0;
  return values;
}

// Columns of direction d in rows of `width`; the others NaN, which is: not written.
Values own_columns(const Values& values, int d, int64_t width, int64_t columns) {
  Values found(values.size(), std::nan(""));
  for (size_t i = 0; i < values.size(); ++i)
    if (int64_t(i) % width / columns == d) found[i] = values[i];
  return found;
}

DType state_of(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

// a [rows, depth] times w [depth, columns], or its transpose, rounded as a GEMM's result is.
Array product(const Problem& p, const Array& a, int64_t first, int64_t stride, int64_t rows, const Values& w,
              int64_t depth, int64_t columns, bool transposed, Random& random) {
  Array found(p.dtype, rows * columns, random);
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k)
        sum += a.get(first + b * stride + k) * w[transposed ? j * depth + k : k * columns + j];
      found.set(b * columns + j, sum);
    }
  return found;
}

Values slice(const Values& values, int64_t at, int64_t count) {
  return values.empty() ? Values(count) : Values(values.begin() + at, values.begin() + at + count);
}

void check_forward(const Layout& layout, const scalar::Outputs& run, int d, Random& random) {
  const Problem& p = layout.p;
  const int64_t H = p.H, G = p.gates(), M = p.data_rows(), states = p.B * H;
  const bool lstm = p.cell == Cell::lstm;
  const bool alias = p.tape() && random.one_in(2), with_y = !random.one_in(4), with_cells = lstm && !random.one_in(4);
  const int64_t stride = alias ? 4 * H : G * H + random.in(0, 5), wide = p.D * H;
  const Values given = layout.spread(p.input, d, G * H, std::nan(""));
  Array input(p.dtype, M ? (M - 1) * stride + (alias ? stride : G * H) : 0, random);
  for (int64_t row = 0; row < M; ++row)
    for (int64_t k = 0; k < G * H; ++k) input.set(row * stride + k, given[row * G * H + k]);
  const Array b_ih(p.dtype, p.b_ih[d], random), b_hh(p.dtype, p.b_hh[d], random),
      h(p.dtype, slice(p.h0, d * states, states), random),
      c(state_of(p.dtype), lstm ? slice(p.c0, d * states, states) : Values(), random),
      gates(p.dtype, p.tape() && !alias ? M * 4 * H : 0, random), y(p.dtype, with_y ? M * wide : 0, random),
      cells(state_of(p.dtype), with_cells ? M * wide : 0, random);
  const auto column = [&](const Array& a, DType dtype) -> void* {
    return a.count() ? a.data() + d * H * bytes_of(dtype) : nullptr;
  };
  const sora::LstmStepForward args{layout.steps(d), input.data(), stride, b_ih.or_null(), b_hh.or_null(), h.data(),
                                   h.data(), c.or_null(), column(y, p.dtype), wide, column(cells, state_of(p.dtype)),
                                   wide, alias ? input.data() : gates.or_null()};
  for (int64_t s = 0; s < p.T; ++s) {
    const int64_t t = layout.step(d, s);
    const Array hidden = product(p, h, 0, H, layout.rows(t), p.w_hh[d], H, G * H, true, random);
    const bool zero = s == 0 && p.h0.empty();
    if (const int code = sora::lstm_step_forward_cpu(p.dtype, args, t, zero ? nullptr : hidden.data()))
      fail(sora::lstm_error(code));
  }
  const double limit = tolerance(p.dtype);
  const Values gates_want = zeros_for_nan(p.tape() ? slice(run.gates, d * M * 4 * H, M * 4 * H) : Values());
  if (p.tape()) compare("steps: gates", alias ? input : gates, gates_want, limit);
  if (with_y) compare("steps: y", y, own_columns(zeros_for_nan(run.y), d, wide, H), limit);
  if (with_cells) compare("steps: cells", cells, own_columns(zeros_for_nan(run.cells), d, wide, H), limit);
  compare("steps: h", h, slice(run.h_n, d * states, states), limit);
  if (lstm) compare("steps: c", c, slice(run.c_n, d * states, states), limit);
}

void check_backward(const Layout& layout, const scalar::Outputs& run, const scalar::Gradients& expected, int d,
                    Random& random) {
  const Problem& p = layout.p;
  const int64_t H = p.H, G = p.gates(), A = p.dgates(), M = p.data_rows(), states = p.B * H, wide = p.D * H;
  const bool lstm = p.cell == Cell::lstm, gru = p.cell == Cell::gru;
  const DType state = state_of(p.dtype);
  const bool carries = gru || layout.offsets || layout.lengths || layout.reset || random.one_in(2);
  const auto own = [&](const Values& values, bool exists) {  // NaN: may not be read
    return exists && !values.empty() ? own_columns(values, d, wide, H) : Values();
  };
  const Values ended = layout.spread(Values(p.D * p.packed_rows() * wide), d, wide, std::nan(""));
  const auto live = [&](Values values) {
    for (size_t i = 0; i < values.size(); ++i)
      if (ended[i] != ended[i]) values[i] = std::nan("");
    return values;
  };
  const Array gates(p.dtype, p.tape() ? slice(run.gates, d * M * 4 * H, M * 4 * H) : Values(), random),
      cells(state, own(run.cells, lstm), random), c0(p.dtype, p.c0.empty() ? Values() : slice(p.c0, d * states, states), random),
      h_prev(p.dtype, gru ? layout.spread(run.h_prev[d], 0, H, std::nan("")) : Values(), random),
      y(p.dtype, own(run.y, !lstm), random), dy(p.dtype, live(own(p.dy, true)), random),
      dcells(state, live(own(p.dcells, lstm)), random),
      dh_n(p.dtype, p.dh_n.empty() ? Values() : slice(p.dh_n, d * states, states), random),
      dh(state, carries ? Values(states) : Values(), random),
      dc(state, lstm ? slice(p.dc_n, d * states, states) : Values(), random), dgates(p.dtype, M * A * H, random);
  const auto column = [&](const Array& a, DType dtype) -> void* {
    return a.count() ? a.data() + d * H * bytes_of(dtype) : nullptr;
  };
  const sora::LstmStepBackward args{layout.steps(d), gates.or_null(), column(cells, state), wide, c0.or_null(),
                                    gru ? h_prev.data() : column(y, p.dtype), gru ? H : wide, column(dy, p.dtype), wide,
                                    column(dcells, state), wide, dh.or_null(), dc.or_null(), dgates.data()};
  const auto step = [&](int64_t t, const void* dh_next) {
    if (const int code = sora::lstm_step_backward_cpu(p.dtype, args, t, dh_next)) fail(sora::lstm_error(code));
  };
  Array sent(p.dtype, 0, random);
  for (int64_t s = p.T - 1; s >= 0; --s) {
    const int64_t t = layout.step(d, s);
    step(t, s == p.T - 1 ? dh_n.or_null() : sent.or_null());
    const int64_t first = layout.first(t) * A * H + (A - G) * H;
    sent = product(p, dgates, first, A * H, layout.rows(t), p.w_hh[d], G * H, H, false, random);
  }
  const double limit = tolerance(p.dtype);
  const Values dh0_want = slice(expected.dh0, d * states, states);
  if (carries) {
    step(d == 0 ? -1 : p.T, sent.or_null());
    compare("steps: dh", dh, dh0_want, limit);
  } else {
    compare("steps: last product", sent, dh0_want, limit);
  }
  if (lstm) compare("steps: dc", dc, slice(expected.dc0, d * states, states), limit);
  Values dgates_want = layout.spread(expected.dgates, d, A * H, 0);
  for (int64_t row = 0; gru && row < M; ++row) {  // r, z, n, q -> n, r, z, q
    double* at = dgates_want.data() + row * 4 * H;
    std::rotate(at, at + 2 * H, at + 3 * H);
  }
  compare("steps: dgates", dgates, dgates_want, limit);
}

}  // namespace

void check_steps(const Problem& p, const scalar::Outputs& run, const scalar::Gradients& expected, Random& random) {
  if (p.P || p.B == 0 || p.int8) return;  // weights of int8 cases are large: rounded products would show
  const Layout layout(p);
  for (int d = 0; d < p.D; ++d) {
    check_forward(layout, run, d, random);
    check_backward(layout, run, expected, d, random);
  }
}

}  // namespace cases
