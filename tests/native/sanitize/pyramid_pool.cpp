// Random pyramids through csrc/pyramid_pool, against loops over every bin.
#include "pyramid_pool/pyramid_pool.h"

#include <algorithm>
#include <vector>

#include "cases.h"

namespace cases {
namespace {

using Level = sora::PyramidLevel;

struct Case {
  DType dtype;
  int64_t B, C, sizes[3];
  bool maxima, means, inner, keep;
  std::vector<Level> levels;
  std::vector<int64_t> valid;         // [B, 3], or none
  std::vector<int64_t> result_sizes;  // elements of each result
  int64_t columns = 0, strides[5], reach = 1;  // of x: one past its last element
  Values x;                           // [B, C, T, H, W]

  int64_t volume() const { return sizes[0] * sizes[1] * sizes[2]; }
  int64_t all(const Level& level, int axis) const {
    return level.bins[axis] ? level.bins[axis] : sizes[axis];
  }
  int64_t count(const Level& level) const { return all(level, 0) * all(level, 1) * all(level, 2); }
  int64_t size(int64_t b, int axis) const {
    return valid.empty() ? sizes[axis] : std::clamp<int64_t>(valid[3 * b + axis], 0, sizes[axis]);
  }
  int64_t tape(int64_t b, int64_t c, int64_t column) const {
    return inner ? (b * columns + column) * C + c : (b * C + c) * columns + column;
  }
  int64_t dx(int64_t b, int64_t c, int64_t p) const {
    return inner ? (b * volume() + p) * C + c : (b * C + c) * volume() + p;
  }
  int64_t x_offset(int64_t b, int64_t c, int64_t t, int64_t h, int64_t w) const {
    return b * strides[0] + c * strides[1] + t * strides[2] + h * strides[3] + w * strides[4];
  }
};

bool follows(const Level& level, const Level& source) {
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t o = level.bins[axis], finer = source.bins[axis];
    if (o == 0 || finer == 0 ? o != finer : finer % o != 0) return false;
  }
  return true;
}

Level coarser(Level level, Random& random) {
  for (int64_t& o : level.bins) {
    const int64_t finer = o;
    while (o && (o = random.in(1, finer), finer % o != 0)) {
    }
  }
  return level;
}

void lay_results(Case& p, Random& random) {
  const bool flat = random.one_in(2), last = random.one_in(2);
  const int64_t parts = p.maxima + p.means;
  int64_t start = 0, width = 0;
  for (const auto& level : p.levels) width += p.C * parts * p.count(level);
  for (auto& level : p.levels) {
    const int64_t count = p.count(level), result = flat ? 0 : int64_t(p.result_sizes.size());
    int64_t part = 0;
    for (auto* one : {&level.maxima, &level.means}) {
      *one = {-1, 0, 0, 0, 0};
      if (one == &level.maxima ? !p.maxima : !p.means) continue;
      if (flat) *one = {0, start, width, count, 1}, start += p.C * count;
      else if (last) *one = {result, part * p.C, parts * p.C * count, 1, parts * p.C};
      else *one = {result, part * p.C * count, parts * p.C * count, count, 1};
      ++part;
    }
    if (!flat) p.result_sizes.push_back(p.B * p.C * parts * count);
  }
  if (flat) p.result_sizes.push_back(p.B * width);
}

Case make_case(Random& random, bool large) {
  Case p{};
  p.dtype = random.one_in(3) ? DType::float64 : random.one_in(2) ? DType::bfloat16 : DType::float32;
  p.B = random.in(1, 3), p.C = random.in(1, random.one_in(3) ? 37 : 6);
  for (int64_t& n : p.sizes) n = random.in(1, 9);
  if (large) p.C = random.in(30, 50), p.sizes[1] = random.in(12, 24), p.sizes[2] = random.in(20, 30);  // threads, slabs
  p.maxima = random.one_in(2), p.means = !p.maxima || random.one_in(2), p.keep = p.maxima && random.one_in(2);
  p.inner = random.one_in(2);
  for (int64_t rest = random.in(1, 4); rest > 0; --rest) {
    Level level{};
    for (int64_t& o : level.bins) o = random.one_in(8) ? 0 : random.in(1, 11);
    if (!p.levels.empty() && !random.one_in(3)) level = coarser(p.levels[random.in(0, p.levels.size() - 1)], random);
    level.column = p.columns, level.source = -1;
    for (int64_t j = 0; j < int64_t(p.levels.size()); ++j)
      if (!random.one_in(4) && follows(level, p.levels[j])) level.source = j;
    p.columns += p.count(level);
    p.levels.push_back(level);
  }
  if (random.one_in(3))
    for (int64_t k = 0; k < 3 * p.B; ++k) p.valid.push_back(random.in(random.one_in(4) ? -1 : 1, p.sizes[k % 3] + 1));
  lay_results(p, random);

  const int64_t extents[] = {p.B, p.C, p.sizes[0], p.sizes[1], p.sizes[2]};
  int axes[] = {4, 3, 2, 1, 0};
  if (random.one_in(2)) std::swap(axes[0], axes[3]), std::swap(axes[1], axes[3]);  // w h t c -> c w t h
  for (int k = 1; random.one_in(3) && k < 5; ++k) std::swap(axes[k], axes[random.in(0, k)]);
  int64_t next = 1;
  for (const int axis : axes) {
    if (random.one_in(12)) next *= 2;
    p.strides[axis] = random.one_in(16) ? 0 : next;
    next *= extents[axis];
    p.reach += p.strides[axis] * (extents[axis] - 1);
  }
  return p;
}

// Values of x, as kernels may read them: nothing beyond the regions.
Array fill_x(Case& p, Random& random) {
  Array memory(p.dtype, p.reach, random);
  const bool ties = random.one_in(2);
  const int64_t nan_in = random.one_in(4) ? 5 : 0;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t c = 0; c < p.C; ++c)
      for (int64_t t = 0; t < p.size(b, 0); ++t)
        for (int64_t h = 0; h < p.size(b, 1); ++h)
          for (int64_t w = 0; w < p.size(b, 2); ++w) {
            const double value = ties ? double(random.in(-1, 1)) : scalar::round_to(p.dtype, random.real(2));
            memory.set(p.x_offset(b, c, t, h, w), nan_in && random.one_in(nan_in) ? NAN : value);
          }
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t c = 0; c < p.C; ++c)
      for (int64_t t = 0; t < p.sizes[0]; ++t)
        for (int64_t h = 0; h < p.sizes[1]; ++h)
          for (int64_t w = 0; w < p.sizes[2]; ++w) p.x.push_back(memory.get(p.x_offset(b, c, t, h, w)));
  return memory;
}

// Calls bin(b, c, level, bin, [places in T H W]) for every bin, with no places for those beyond a region.
template <class Bin>
void each_bin(const Case& p, const Bin& bin) {
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t n[] = {p.size(b, 0), p.size(b, 1), p.size(b, 2)};
    const bool empty = !n[0] || !n[1] || !n[2];
    for (const auto& level : p.levels) {
      const int64_t all[] = {p.all(level, 0), p.all(level, 1), p.all(level, 2)};
      for (int64_t i = 0; i < p.count(level); ++i) {
        const int64_t at[] = {i / (all[1] * all[2]), i / all[2] % all[1], i % all[2]};
        int64_t from[3], to[3];
        bool beyond = empty;
        for (int axis = 0; axis < 3 && !empty; ++axis) {
          const int64_t o = level.bins[axis] ? level.bins[axis] : n[axis];
          beyond |= at[axis] >= o;
          from[axis] = at[axis] * n[axis] / o, to[axis] = ((at[axis] + 1) * n[axis] + o - 1) / o;
        }
        std::vector<int64_t> places;
        if (!beyond)
          for (int64_t t = from[0]; t < to[0]; ++t)
            for (int64_t h = from[1]; h < to[1]; ++h)
              for (int64_t w = from[2]; w < to[2]; ++w) places.push_back((t * p.sizes[1] + h) * p.sizes[2] + w);
        for (int64_t c = 0; c < p.C; ++c) bin(b, c, level, i, places);
      }
    }
  }
}

int64_t element(const sora::PyramidPart& part, int64_t b, int64_t c, int64_t bin) {
  return part.offset + b * part.batch_stride + c * part.channel_stride + bin * part.bin_stride;
}

sora::PyramidPool pool_of(const Case& p) {
  return {p.B, p.C, {p.sizes[0], p.sizes[1], p.sizes[2]}, p.valid.empty() ? nullptr : p.valid.data(), p.levels.data(),
          int64_t(p.levels.size()), p.columns, p.inner};
}

std::vector<int32_t> check_forward(Case& p, Random& random, int threads) {
  const Array x = fill_x(p, random);
  std::vector<Array> results;
  std::vector<Values> expected;
  std::vector<void*> addresses;
  for (int64_t count : p.result_sizes) {
    results.emplace_back(p.dtype, count, random);
    expected.emplace_back(count, NAN);
    addresses.push_back(results.back().data());
  }
  std::vector<int32_t> found(p.maxima ? p.B * p.C * p.columns : 0, -7), indices = found;
  each_bin(p, [&](int64_t b, int64_t c, const Level& level, int64_t bin, const std::vector<int64_t>& places) {
    const double* const own = p.x.data() + (b * p.C + c) * p.volume();
    int64_t best = places.empty() ? -1 : places[0];
    double sum = 0;
    for (int64_t place : places) {
      if (own[place] > own[best] || own[place] != own[place]) best = place;
      sum += own[place];
    }
    if (p.maxima) {
      expected[level.maxima.result][element(level.maxima, b, c, bin)] = best < 0 ? 0 : own[best];
      indices[p.tape(b, c, level.column + bin)] = int32_t(best);
    }
    if (p.means)
      expected[level.means.result][element(level.means, b, c, bin)] = places.empty() ? 0 : sum / double(places.size());
  });
  sora::PyramidPoolForward args{pool_of(p), x.data(), {}, addresses.data(), p.keep ? found.data() : nullptr};
  std::copy(p.strides, p.strides + 5, args.strides);
  if (sora::pyramid_pool_forward_cpu(p.dtype, args, threads) != sora::kPyramidPoolOk) fail("forward failed");
  for (size_t k = 0; k < results.size(); ++k)
    compare("results", results[k], expected[k], p.means ? tolerance(p.dtype) : 0);
  if (p.keep && found != indices) fail("indices differ");
  return indices;
}

void check_backward(const Case& p, const std::vector<int32_t>& indices, Random& random, int threads) {
  std::vector<Array> gradients;
  std::vector<const void*> addresses;
  for (int64_t count : p.result_sizes) {
    gradients.emplace_back(p.dtype, random.values(count, p.dtype, 1), random);
    const bool missing = p.result_sizes.size() > 1 && random.one_in(4);
    addresses.push_back(missing ? nullptr : gradients.back().data());
  }
  Values expected(p.B * p.C * p.volume(), 0.0);
  each_bin(p, [&](int64_t b, int64_t c, const Level& level, int64_t bin, const std::vector<int64_t>& places) {
    if (p.maxima && addresses[level.maxima.result] && !places.empty())
      expected[p.dx(b, c, indices[p.tape(b, c, level.column + bin)])] +=
          gradients[level.maxima.result].get(element(level.maxima, b, c, bin));
    if (p.means && addresses[level.means.result])
      for (int64_t place : places)
        expected[p.dx(b, c, place)] +=
            gradients[level.means.result].get(element(level.means, b, c, bin)) / double(places.size());
  });
  const Array dx(p.dtype, int64_t(expected.size()), random);
  const sora::PyramidPoolBackward args{pool_of(p), addresses.data(), p.maxima ? indices.data() : nullptr, dx.data()};
  if (sora::pyramid_pool_backward_cpu(p.dtype, args, threads) != sora::kPyramidPoolOk) fail("backward failed");
  compare("dx", dx, expected, tolerance(p.dtype));
}

}  // namespace

void check_pyramid_pool(uint64_t number) {
  Random random(number * 0x9e3779b97f4a7c15u + 2);
  const int threads = random.one_in(2) ? 1 : 3;
  g_case = "case " + std::to_string(number) + ": pyramid_pool, threads " + std::to_string(threads);
  Case p = make_case(random, number % 20 == 19);
  const std::vector<int32_t> indices = check_forward(p, random, threads);
  check_backward(p, indices, random, threads);
}

}  // namespace cases
