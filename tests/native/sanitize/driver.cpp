// Random small problems through the C++ API of csrc/lstm, csrc/dropout and csrc/pyramid_pool, without Python and torch,
// for a build under sanitizers: `driver FIRST LAST` runs the cases of these numbers. Each array is a block of exactly
// its size, so that a read or write past it is caught; outputs begin as NaN; what may not be read is NaN as well.
// Results of the layers are compared with scalar.h, and scalar.h's gradients with central differences of its own forward
// pass.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cases.h"
#include "common/philox.h"
#include "dropout/dropout.h"
#include "scalar.h"

namespace {

using namespace cases;
using scalar::Cell;
using scalar::Problem;

Problem make_problem(Random& random, bool large) {
  Problem p{};
  p.cell = static_cast<Cell>(random.in(0, 3));
  p.dtype = random.one_in(3) ? DType::float64 : random.one_in(2) ? DType::bfloat16 : DType::float32;
  p.T = random.in(1, 7), p.B = random.in(random.one_in(8) ? 0 : 1, 9), p.H = random.in(1, random.one_in(4) ? 70 : 36);
  p.D = static_cast<int>(random.in(1, 2));
  if (large) {  // enough work for threads: shared rows, or one row and shared units
    const bool rows = random.one_in(2);
    p.T = rows ? 12 : 10, p.B = rows ? random.in(9, 13) : 1, p.H = rows ? random.in(90, 100) : random.in(320, 330);
  }
  if (p.cell == Cell::lstm && p.H > 1 && random.one_in(3)) p.P = random.in(1, p.H - 1);
  if (random.one_in(2)) {
    std::vector<int64_t> lengths(p.B);
    for (int64_t& length : lengths) length = random.in(random.one_in(4) ? 0 : 1, p.T);
    for (int64_t t = 0; t < p.T; ++t) {
      p.batch_sizes.push_back(0);
      for (int64_t length : lengths) p.batch_sizes.back() += length > t;
    }
    for (int64_t b = 0, rows = random.one_in(2) ? p.B : 0; b < rows; ++b) p.order.push_back(b);
    for (int64_t b = 1; b < int64_t(p.order.size()); ++b) std::swap(p.order[b], p.order[random.in(0, b)]);
  }
  if (random.one_in(3))
    for (int64_t row = 0; row < p.data_rows(); ++row) p.reset.push_back(random.one_in(4));
  const int64_t G = p.gates(), O = p.out();
  const double weight = 1 / std::sqrt(double(p.H));
  const bool bias = !random.one_in(4);
  for (int d = 0; d < p.D; ++d) {
    p.w_hh[d] = random.values(G * p.H * O, p.dtype, weight);
    if (bias) p.b_ih[d] = random.values(G * p.H, p.dtype, 0.5), p.b_hh[d] = random.values(G * p.H, p.dtype, 0.5);
    if (p.P) p.w_hr[d] = random.values(p.P * p.H, p.dtype, weight);
  }
  p.int8 = p.dtype != DType::float64 && random.one_in(5);
  for (int64_t d = 0; p.int8 && d < p.D; ++d)
    for (int64_t k = 0; k < G * p.H * O; ++k) p.w_hh[d][k] = random.in(-127, 127) * p.int8_scale(k / O);
  const int64_t rows = p.data_rows() * p.D;
  p.input = random.values(p.D * p.packed_rows() * p.input_width(), p.dtype, 2);
  if (!random.one_in(3)) p.h0 = random.values(p.D * p.B * O, p.dtype, 1);
  if (!random.one_in(4)) p.dy = random.values(rows * O, p.dtype, 1);
  if (random.one_in(2)) p.dh_n = random.values(p.D * p.B * O, p.dtype, 1);
  if (p.cell == Cell::lstm) {
    if (!random.one_in(3)) p.c0 = random.values(p.D * p.B * p.H, p.dtype, 1);
    if (random.one_in(2)) p.dc_n = random.values(p.D * p.B * p.H, p.dtype, 1);
    if (random.one_in(2)) p.dcells = random.values(rows * p.H, DType::float32, 1);
  }
  return p;
}

std::string describe(const Problem& p, int threads) {
  static const char* const cells[] = {"lstm", "gru", "rnn_tanh", "rnn_relu"};
  char text[200];
  std::snprintf(text, sizeof(text), "%s, %lld-byte elements, T %lld, B %lld, H %lld, P %lld, D %d%s%s%s%s%s%s, threads %d",
                cells[static_cast<int>(p.cell)], static_cast<long long>(bytes_of(p.dtype)),
                static_cast<long long>(p.T), static_cast<long long>(p.B), static_cast<long long>(p.H),
                static_cast<long long>(p.P), p.D, p.batch_sizes.empty() ? "" : ", ragged",
                p.order.empty() ? "" : " by order", p.reset.empty() ? "" : ", reset",
                p.b_ih[0].empty() ? ", no bias" : "", p.gates_given ? ", gates given" : "",
                p.int8 ? ", int8" : "", threads);
  return text;
}

// The kernels see arrays of exactly the sizes that lstm.h promises to touch.
struct ShapeArrays {
  std::unique_ptr<int64_t[]> batch_sizes, order;
  std::unique_ptr<uint8_t[]> reset;
  sora::LstmShape shape;

  explicit ShapeArrays(const Problem& p)
      : batch_sizes(copy(p.batch_sizes)), order(copy(p.order)), reset(copy(p.reset)),
        shape{p.cell, p.T, p.B, p.H, p.P, p.D, batch_sizes.get(), order.get(), reset.get()} {}

  template <class T>
  static std::unique_ptr<T[]> copy(const std::vector<T>& values) {
    if (values.empty()) return nullptr;
    std::unique_ptr<T[]> found(new T[values.size()]);
    std::memcpy(found.get(), values.data(), values.size() * sizeof(T));
    return found;
  }
};

struct Int8Weights {
  std::unique_ptr<char[]> packed[2];
  std::unique_ptr<float[]> scale[2];

  explicit Int8Weights(const Problem& p) {
    for (int d = 0; p.int8 && d < p.D; ++d) {
      const int64_t rows = p.gates() * p.H, O = p.out();
      scale[d].reset(new float[rows]);
      const std::unique_ptr<int8_t[]> whole(new int8_t[rows * O]);
      for (int64_t r = 0; r < rows; ++r) {
        scale[d][r] = float(p.int8_scale(r));
        for (int64_t k = 0; k < O; ++k) whole[r * O + k] = int8_t(std::lrint(p.w_hh[d][r * O + k] / p.int8_scale(r)));
      }
      packed[d].reset(new char[sora::lstm_int8_bytes_cpu(p.cell, p.H, O)]);
      sora::lstm_pack_int8_cpu(p.cell, p.H, O, whole.get(), packed[d].get());
    }
  }
};

DType state_of(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

void check_forward(const Problem& p, const scalar::Outputs& expected, Random& random, int threads) {
  const bool lstm = p.cell == Cell::lstm;
  const ShapeArrays arrays(p);
  const int64_t width = p.input_width(), rows = p.D * p.packed_rows();
  const bool alias = p.tape() && random.one_in(3) && (p.order.empty() || p.batch_sizes.empty());
  const int64_t stride = alias ? 4 * p.H : width + random.in(0, 5);
  Array input(p.dtype, rows ? (rows - 1) * stride + (alias ? stride : width) : 0, random);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k < width; ++k) input.set(row * stride + k, p.input[row * width + k]);
  const auto wanted = [&](const Values& values, bool exists) { return exists && random.in(1, 4) > 1 ? values : Values(); };
  const Values gates_wanted = wanted(expected.gates, p.tape() && !alias), y_wanted = wanted(expected.y, true),
               cells_wanted = wanted(expected.cells, lstm), h_n_wanted = wanted(expected.h_n, true),
               c_n_wanted = wanted(expected.c_n, lstm);
  const auto output = [&](DType dtype, const Values& like) { return Array(dtype, int64_t(like.size()), random); };
  const Array gates = output(p.dtype, gates_wanted), y = output(p.dtype, y_wanted),
              cells = output(state_of(p.dtype), cells_wanted), h_n = output(p.dtype, h_n_wanted),
              c_n = output(p.dtype, c_n_wanted);
  const auto given = [&](const Values& values) { return Array(p.dtype, values, random); };
  const Array b_ih[2] = {given(p.b_ih[0]), given(p.b_ih[1])}, b_hh[2] = {given(p.b_hh[0]), given(p.b_hh[1])},
              w_hh[2] = {given(p.w_hh[0]), given(p.w_hh[1])}, w_hr[2] = {given(p.w_hr[0]), given(p.w_hr[1])},
              h0 = given(p.h0), c0 = given(p.c0);
  const bool int8 = p.int8 && !p.gates_given;
  const Int8Weights quantised(p);
  const auto weight = [&](const Array& w) { return p.gates_given || int8 ? nullptr : w.or_null(); };
  const auto packed = [&](int d) { return int8 ? quantised.packed[d].get() : nullptr; };
  const auto scale = [&](int d) { return int8 ? quantised.scale[d].get() : nullptr; };
  const sora::LstmForward args{arrays.shape,
                               input.data(),
                               stride,
                               {b_ih[0].or_null(), b_ih[1].or_null()},
                               {b_hh[0].or_null(), b_hh[1].or_null()},
                               {weight(w_hh[0]), weight(w_hh[1])},
                               {packed(0), packed(1)},
                               {scale(0), scale(1)},
                               {w_hr[0].or_null(), w_hr[1].or_null()},
                               h0.or_null(),
                               c0.or_null(),
                               alias ? input.data() : gates.or_null(),
                               y.or_null(),
                               cells.or_null(),
                               h_n.or_null(),
                               c_n.or_null()};
  if (const int code = sora::lstm_forward_cpu(p.dtype, args, threads)) fail(sora::lstm_error(code));
  const double limit = tolerance(p.dtype);
  if (alias)
    compare("gates over input", input, expected.gates, limit);
  else
    compare("gates", gates, gates_wanted, limit);
  compare("y", y, y_wanted, limit);
  compare("cells", cells, cells_wanted, limit);
  compare("h_n", h_n, h_n_wanted, limit);
  compare("c_n", c_n, c_n_wanted, limit);
}

void check_backward(const Problem& p, const scalar::Outputs& tapes, const scalar::Gradients& expected, Random& random,
                    int threads) {
  const bool lstm = p.cell == Cell::lstm, gated = p.tape() > 0;
  const ShapeArrays arrays(p);
  const auto given = [&](const Values& values) { return Array(p.dtype, values, random); };
  const auto state = [&](const Values& values) { return Array(state_of(p.dtype), values, random); };
  // Past a row's length these may not be read: the tapes are NaN there already.
  const auto only_rows = [&](Values values, int64_t width) {
    std::vector<bool> used(p.data_rows());
    for (int64_t t = 0; t < p.T; ++t)
      for (int64_t b = 0; b < p.rows_at(t); ++b) used[p.data(t, b)] = true;
    for (int64_t row = 0; row < p.data_rows() && !values.empty(); ++row)
      for (int64_t k = 0; k < width && !used[row]; ++k) values[row * width + k] = std::nan("");
    return values;
  };
  const Array gates = given(gated ? tapes.gates : Values()), cells = state(lstm ? tapes.cells : Values()),
              y = given(lstm ? Values() : tapes.y), w_hh[2] = {given(p.w_hh[0]), given(p.w_hh[1])},
              w_hr[2] = {given(p.w_hr[0]), given(p.w_hr[1])}, h0 = given(lstm ? Values() : p.h0), c0 = given(p.c0),
              dy = given(only_rows(p.dy, p.D * p.out())), dcells = state(only_rows(p.dcells, p.D * p.H)),
              dh_n = given(p.dh_n), dc_n = given(p.dc_n);
  const auto output = [&](const Values& like) { return Array(p.dtype, int64_t(like.size()), random); };
  const Array dgates = output(expected.dgates), dh = output(expected.dh), dh0 = output(expected.dh0),
              dc0 = output(lstm ? expected.dc0 : Values());
  const sora::LstmBackward args{arrays.shape,
                                gates.or_null(),
                                cells.or_null(),
                                y.or_null(),
                                {w_hh[0].or_null(), w_hh[1].or_null()},
                                {w_hr[0].or_null(), w_hr[1].or_null()},
                                h0.or_null(),
                                c0.or_null(),
                                dy.or_null(),
                                dcells.or_null(),
                                dh_n.or_null(),
                                dc_n.or_null(),
                                dgates.data(),
                                dh.or_null(),
                                dh0.data(),
                                dc0.or_null()};
  if (const int code = sora::lstm_backward_cpu(p.dtype, args, threads)) fail(sora::lstm_error(code));
  const double limit = tolerance(p.dtype);
  compare("dgates", dgates, expected.dgates, limit);
  compare("dh", dh, expected.dh, limit);
  compare("dh0", dh0, expected.dh0, limit);
  compare("dc0", dc0, lstm ? expected.dc0 : Values(), limit);
}

void check_previous_states(const Problem& p, const scalar::Outputs& expected, Random& random) {
  const ShapeArrays arrays(p);
  const Array y(p.dtype, expected.y, random), h0(p.dtype, p.h0, random);
  for (int d = 0; d < p.D; ++d) {
    const Array h_prev(p.dtype, p.packed_rows() * p.out(), random);
    sora::lstm_previous_states_cpu(bytes_of(p.dtype), arrays.shape, d, y.data(), h0.or_null(), h_prev.data());
    compare("h_prev", h_prev, expected.h_prev[d], 0);
  }
}

// The same steps with W_hh h(t-1) added by the caller.
Problem with_gates_given(const Problem& p, const scalar::Outputs& run) {
  Problem given = p;
  given.gates_given = true;
  const int64_t N = p.packed_rows(), G = p.gates(), O = p.out(), width = given.input_width();
  given.input.assign(p.D * N * width, 0);
  for (int d = 0; d < p.D; ++d)
    for (int64_t row = 0; row < N; ++row)
      for (int64_t k = 0; k < G * p.H; ++k) {
        double product = 0;
        for (int64_t j = 0; j < O; ++j) product += p.w_hh[d][k * O + j] * run.h_prev[d][row * O + j];
        const double x = p.input[(d * N + row) * G * p.H + k];
        double* to = given.input.data() + (d * N + row) * width + k;
        const bool apart = p.cell == Cell::gru && k >= 2 * p.H;
        to[0] = scalar::round_to(p.dtype, apart ? x : x + product);
        if (apart) to[p.H] = scalar::round_to(p.dtype, product);
      }
  return given;
}

void check_dropout(Random& random) {
  const DType dtype = static_cast<DType>(random.one_in(3) ? 3 : random.in(0, 1));
  const int64_t count = random.one_in(20) ? random.in(70'000, 140'000) : random.in(0, 600);
  const double p = random.one_in(5) ? random.in(0, 1) : (random.real(1) + 1) / 2;
  const auto seed = std::make_unique<int64_t>(random.in(INT64_MIN, INT64_MAX));
  const Values x = random.values(count, dtype, 3);
  const Array given(dtype, x, random), y(dtype, count, random);
  if (const int code = sora::dropout_cpu(dtype, {count, given.data(), seed.get(), p, y.data()}, int(random.in(1, 3))))
    fail(sora::dropout_error(code));
  Values expected(count);
  const auto state = [&](double v) { return scalar::round_to(state_of(dtype), v); };
  for (int64_t e = 0; e < count; ++e) {
    uint64_t words[4] = {uint64_t(e / 4), 0, 0, 0};
    sora::philox4x32_10(words, uint64_t(*seed), sora::WideProduct{});
    const bool kept = double(uint32_t(words[e % 4])) >= std::floor(p * 4294967296.0);
    expected[e] = kept ? scalar::round_to(dtype, x[e] * state(1 / (1 - p))) : 0;
  }
  compare("dropout", y, expected, 0);
}

void check_philox() {  // kat_vectors of the Random123 library
  const uint64_t published[3][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
       0x24126ea1}};
  for (const auto& row : published) {
    uint64_t words[4] = {row[0], row[1], row[2], row[3]};
    sora::philox4x32_10(words, row[4] | row[5] << 32, sora::WideProduct{});
    for (int k = 0; k < 4; ++k)
      if (uint32_t(words[k]) != row[6 + k]) fail("philox4x32_10 misses a published vector");
  }
}

// scalar::backward against central differences of scalar::forward, for input, h0 and c0.
void check_scalar(Random& random) {
  Problem p = make_problem(random, false);
  while (p.H > 6 || p.dtype != DType::float64) p = make_problem(random, false);
  const scalar::Outputs run = scalar::forward(p);
  const scalar::Gradients found = scalar::backward(p, run);
  const auto dot = [](const Values& a, const Values& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i)
      if (b[i] == b[i]) sum += a[i] * b[i];
    return sum;
  };
  const auto loss = [&] {
    const scalar::Outputs out = scalar::forward(p);
    return dot(p.dy, out.y) + dot(p.dh_n, out.h_n) + dot(p.dc_n, out.c_n) + dot(p.dcells, out.cells);
  };
  const auto slope = [&](double& value) {
    const double step = 1e-6, was = value;
    value = was + step;
    const double up = loss();
    value = was - step;
    const double down = loss();
    value = was;
    return (up - down) / (2 * step);
  };
  const auto check = [&](const char* name, double analytic, double numeric) {
    if (!(std::fabs(analytic - numeric) <= 1e-7 * std::fmax(1, std::fabs(numeric))))
      fail(std::string("scalar.h: gradient of ") + name + " differs from central differences");
  };
  const int64_t G = p.gates() * p.H, A = p.dgates() * p.H;
  for (int64_t row = 0; row < p.D * p.packed_rows(); ++row)
    for (int64_t k = 0; k < G; ++k) check("input", found.dgates[row * A + k], slope(p.input[row * G + k]));
  for (size_t i = 0; i < p.h0.size(); ++i) check("h0", found.dh0[i], slope(p.h0[i]));
  for (size_t i = 0; i < p.c0.size(); ++i) check("c0", found.dc0[i], slope(p.c0[i]));
}

void run_case(uint64_t number) {
  Random random(number * 0x9e3779b97f4a7c15u + 1);
  Problem p = make_problem(random, number % 40 == 39);
  const int threads = random.one_in(2) ? 1 : 3;
  g_case = "case " + std::to_string(number) + ": " + describe(p, threads);
  scalar::Outputs run = scalar::forward(p);
  if (random.one_in(5)) {
    p = with_gates_given(p, run);
    g_case = "case " + std::to_string(number) + ": " + describe(p, threads);
    check_forward(p, scalar::forward(p), random, threads);
    return;
  }
  check_forward(p, run, random, threads);
  for (Values* tape : {&run.gates, &run.y})
    for (double& v : *tape) v = scalar::round_to(p.dtype, v);
  for (double& v : run.cells) v = scalar::round_to(state_of(p.dtype), v);
  const scalar::Gradients gradients = scalar::backward(p, run);
  check_backward(p, run, gradients, random, threads);
  check_steps(p, run, gradients, random);
  check_previous_states(p, run, random);
  g_case = "case " + std::to_string(number);
  check_dropout(random);
  if (number % 10 == 0) check_scalar(random);
  check_pyramid_pool(number);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: %s FIRST LAST\n", argv[0]), 2;
  const uint64_t first = std::strtoull(argv[1], nullptr, 10), last = std::strtoull(argv[2], nullptr, 10);
  check_philox();
  sora::LstmForward none{};
  if (sora::lstm_forward_cpu(DType::float16, none, 1) != sora::kLstmUnsupportedDType) fail("float16 was not refused");
  for (uint64_t number = first; number <= last; ++number) run_case(number);
  std::printf("%s: cases %s to %s agree\n", sora::lstm_cpu_isa(), argv[1], argv[2]);
}
