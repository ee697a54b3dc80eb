// Matrix products of the recurrence for one instruction set (see simd.h for how it is chosen): rows of states times
// packed weights, sums in registers.
#pragma once

#include "../common/simd.h"
#include "lstm_kernels.h"

namespace sora {
namespace SORA_ISA {

// Rows of sums held in registers at once: with 4 columns, those, the 4 weights and a broadcast must fit the registers.
constexpr int64_t kMaxRows = SORA_VECTOR_REGISTERS >= 32 ? 6 : 2;
constexpr int64_t kMaxColumns = 4;
// Rows whose sums wait in memory between slices of the depth, and the terms of a slice: 4 columns of them fill half of
// a first-level cache, and are read once for every kMaxRows rows.
constexpr int64_t kBlockRows = 48;
constexpr int64_t kSliceTerms = 64;
constexpr int64_t kPlacesAhead = 8;  // whose inputs are prefetched

// sums[r][c] = (add ? sums[r][c] : 0) + sum over k of packed[k][c] * x[r][k], each [c] a vector.
template <class State, class Weight, int R, int C>
__attribute__((noinline)) void accumulate(const Weight* packed, const State* x, int64_t x_stride, int64_t depth,
                                          bool add, State* sums) {
  using V = typename Simd<State>::V;
  constexpr int64_t lanes = Simd<State>::lanes;
  // Eight independent sums hide the latency of a multiply-add: with fewer, terms are summed in U interleaved parts.
  constexpr int U = R * C >= 8 ? 1 : R * C >= 4 ? 2 : R * C >= 2 ? 4 : 8;
  V part[U][R][C] = {};
  if (add)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) part[0][r][c] = Simd<State>::load(sums + (r * C + c) * lanes);
  int64_t k = 0;
  for (; k + U <= depth; k += U) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      V w[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) w[c] = Simd<Weight>::load(packed + ((k + u) * C + c) * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const State value = x[r * x_stride + k + u];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) part[u][r][c] += w[c] * value;
      }
    }
  }
  for (; k < depth; ++k)
    for (int c = 0; c < C; ++c) {
      const V w = Simd<Weight>::load(packed + (k * C + c) * lanes);
      for (int r = 0; r < R; ++r) part[0][r][c] += w * x[r * x_stride + k];
    }
  for (int half = U / 2; half > 0; half /= 2)
    for (int u = 0; u < half; ++u)
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) part[u][r][c] += part[u + half][r][c];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) Simd<State>::store(sums + (r * C + c) * lanes, part[0][r][c]);
}

// x [rows, depth] times one block of packed weights, [depth][columns][lanes] -> sums [rows][columns][lanes].
template <class State, class Weight, int C>
void multiply(const Weight* packed, const State* x, int64_t x_stride, int64_t depth, int64_t rows, State* sums) {
  const int64_t tiles = (rows + kMaxRows - 1) / kMaxRows, slice = tiles > 1 ? kSliceTerms : depth;
  for (int64_t k = 0; k < depth; k += slice)
    for (int64_t tile = 0; tile < tiles; ++tile) {  // of nearly equal height
      const int64_t first = rows * tile / tiles;
      const Weight* w = packed + k * C * Simd<State>::lanes;
      const State* from = x + first * x_stride + k;
      State* to = sums + first * C * Simd<State>::lanes;
      const int64_t terms = std::min(slice, depth - k);
      switch (rows * (tile + 1) / tiles - first) {
        case 1: accumulate<State, Weight, 1, C>(w, from, x_stride, terms, k > 0, to); break;
        case 2: accumulate<State, Weight, 2, C>(w, from, x_stride, terms, k > 0, to); break;
#if SORA_VECTOR_REGISTERS >= 32
        case 3: accumulate<State, Weight, 3, C>(w, from, x_stride, terms, k > 0, to); break;
        case 4: accumulate<State, Weight, 4, C>(w, from, x_stride, terms, k > 0, to); break;
        case 5: accumulate<State, Weight, 5, C>(w, from, x_stride, terms, k > 0, to); break;
        case 6: accumulate<State, Weight, 6, C>(w, from, x_stride, terms, k > 0, to); break;
#endif
      }
    }
}

// The block that begins at `unit`, whatever its weights are kept as.
template <class Element, class State>
void multiply_block(const void* packed, const LstmPacking& p, int64_t unit, const State* x, int64_t rows, State* sums) {
  const auto as = [&](const auto* weights) {
    const auto* w = weights + unit * p.gates * p.depth;
    using Weight = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
    switch (p.columns()) {
      case 1: return multiply<State, Weight, 1>(w, x, p.depth, p.depth, rows, sums);
      case 2: return multiply<State, Weight, 2>(w, x, p.depth, p.depth, rows, sums);
      case 3: return multiply<State, Weight, 3>(w, x, p.depth, p.depth, rows, sums);
      case 4: return multiply<State, Weight, 4>(w, x, p.depth, p.depth, rows, sums);
    }
  };
  switch (p.kept_as) {
    case LstmWeights::state: return as(static_cast<const State*>(packed));
    case LstmWeights::element: return as(static_cast<const Element*>(packed));
    case LstmWeights::int8:
      if constexpr (std::is_same_v<State, float>) as(static_cast<const int8_t*>(packed));
  }
}

// Packs `From` as `To`: one vector of outputs of one gate from w [depth, outputs] ...
template <class From, class To>
void pack_rows(const From* w, int64_t stride, int64_t n, int64_t depth, int64_t to_stride, To* to) {
  for (int64_t k = 0; k < depth; ++k) Simd<To>::store(to + k * to_stride, load_n<From>(w + k * stride, n));
}

// ... and from w [outputs, depth].
template <class From, class To>
void pack_columns(const From* w, int64_t n, int64_t depth, int64_t to_stride, To* to) {
  constexpr int64_t lanes = Simd<From>::lanes;
  for (int64_t k = 0; k < depth; k += lanes) {
    const int64_t terms = std::min(lanes, depth - k);
    typename Simd<From>::V block[lanes] = {};
    for (int64_t l = 0; l < n; ++l) block[l] = load_n<From>(w + l * depth + k, terms);
    transpose<typename Simd<From>::State>(block);
    for (int64_t i = 0; i < terms; ++i) Simd<To>::store(to + (k + i) * to_stride, block[i]);
  }
}

template <class From, class To>
void pack_as(const void* weights, const LstmPacking& p, Range units, void* packed) {
  constexpr int64_t lanes = Simd<From>::lanes;
  const From* w = static_cast<const From*>(weights);
  const int64_t grain = p.grain(lanes);
  for (int64_t unit = units.begin; unit < units.end; unit += grain)
    for (int64_t v = 0; v < p.vectors; ++v) {
      const int64_t j = unit + v * lanes, n = std::max<int64_t>(0, std::min(lanes, p.outputs - j));
      for (int64_t g = 0; g < p.gates; ++g) {
        To* to = static_cast<To*>(packed) + unit * p.gates * p.depth + (v * p.gates + g) * lanes;
        if (p.transposed)
          pack_rows(w + j, p.outputs, n, p.depth, p.columns() * lanes, to);
        else
          pack_columns(w + (g * p.outputs + j) * p.depth, n, p.depth, p.columns() * lanes, to);
      }
    }
}

// A vector of units of one row, and its sums. `slot` counts the rows since the last call of prepare.
template <class State>
struct Place {
  int64_t row, slot, unit;
  const State* sums;
};

// Calls each(places, integral constant of their number) for the products of rows x [B, depth] with packed weights: a
// vector of units, and the packing's gates of it in `sums`; two places at a time, see Pair. prepare(rows) comes before
// the first place of some rows, ahead(place) some places before each. Without weights (null) the sums are 0. Odd steps
// walk the units backwards: what is left of the weights in the nearer caches is used before it is evicted.
template <class Element, class State, class Prepare, class Ahead, class Each>
void for_products(const void* packed, const LstmPacking& packing, Range rows, Range units, const State* x,
                  int64_t step, const Prepare& prepare, const Ahead& ahead, const Each& each) {
  constexpr int64_t lanes = Simd<State>::lanes;
  const int64_t grain = packing.grain(lanes), columns = packing.columns(), depth = packing.depth;
  const int64_t blocks = (units.end - units.begin + grain - 1) / grain;
  alignas(64) State sums[kBlockRows * kMaxColumns * lanes];
  Place<State> places[kBlockRows * kMaxColumns];
  for (int64_t first = rows.begin; first < rows.end; first += kBlockRows) {
    const int64_t count = std::min(kBlockRows, rows.end - first), together = std::min(blocks, kBlockRows / count);
    if (!packed) std::fill(sums, sums + together * count * columns * lanes, State(0));
    prepare(Range{first, first + count});
    for (int64_t i = 0; i < blocks; i += together) {
      int64_t found = 0;
      for (int64_t k = 0; k < together && i + k < blocks; ++k) {
        const int64_t unit = units.begin + (step % 2 ? blocks - 1 - i - k : i + k) * grain;
        State* own = sums + k * count * columns * lanes;
        if (packed) multiply_block<Element>(packed, packing, unit, x + first * depth, count, own);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t v = 0; v < packing.vectors && unit + v * lanes < units.end; ++v)
            places[found++] = {first + r, r, unit + v * lanes, own + (r * columns + v * packing.gates) * lanes};
      }
      for (int64_t p = 0; p + 1 < found; p += 2) {
        for (int64_t q = p + kPlacesAhead; q < std::min(found, p + kPlacesAhead + 2); ++q) ahead(places[q]);
        each(places + p, std::integral_constant<int, 2>{});
      }
      if (found % 2) each(places + found - 1, std::integral_constant<int, 1>{});
    }
  }
}

// load(place) of each place; and store(place, vector) of each vector.
template <int N, class State, class Load>
inline __attribute__((always_inline)) auto load_each(const Place<State>* places, const Load& load) {
  if constexpr (N == 1)
    return load(places[0]);
  else
    return Pair<decltype(load(places[0]))>{load(places[0]), load(places[1])};
}
template <class State, class V, class Store>
inline __attribute__((always_inline)) void store_each(const Place<State>* places, const V& v, const Store& store) {
  store(places[0], v);
}
template <class State, class V, class Store>
inline __attribute__((always_inline)) void store_each(const Place<State>* places, const Pair<V>& v, const Store& store) {
  store(places[0], v.a);
  store(places[1], v.b);
}

}  // namespace SORA_ISA
}  // namespace sora
