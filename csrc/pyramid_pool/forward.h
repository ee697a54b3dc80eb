// Maxima, means and indices of one sample and one vector of channels. Lanes are channels.
#pragma once

#include "pyramid_pool_kernels.h"
#include "tiles.h"

namespace sora {
namespace SORA_ISA {

// The region of one sample and up to a vector of channels, as rows of vectors: where they lie in x, or copied from
// there to a slab.
template <class Element>
class Rows {
 public:
  using State = typename Pooled<Element>::State;
  using V = typename Pooled<Element>::V;
  static constexpr int lanes = Pooled<Element>::lanes;

  Rows(const PyramidPoolForward& args, const PoolGeometry& geometry, const PoolScratch& scratch, int64_t b, int64_t c,
       int64_t n)
      : x_(static_cast<const Element*>(args.x) + b * args.strides[0] + c * args.strides[1]),
        channel_(args.strides[1]),
        t_(args.strides[2]),
        h_(args.strides[3]),
        w_(args.strides[4]),
        n_(n),
        height_(geometry.size[1]),
        width_(geometry.size[2]),
        slab_(reinterpret_cast<V*>(scratch.slab)),
        in_place_(std::is_same_v<Element, State> && channel_ == 1 && n == lanes),
        together_(width_ ? scratch.slab_positions / width_ : 1) {}

  int64_t together() const { return together_; }  // rows that one load may take
  int64_t step() const { return in_place_ ? w_ : lanes; }

  // `count` rows from (t, h) on.
  void load(int64_t t, int64_t h, int64_t count, NanWatch<V>& watch) {
    if (!in_place_ && channel_ != 1 && (w_ == 1 || width_ == 1)) return load_channels(t, h, count, watch);
    V* to = slab_;
    for (int64_t k = 0; k < count; ++k, to += width_, next(t, h)) {
      const Element* const row = at(t, h);
      if (in_place_) look(row, watch);
      else if (channel_ == 1) copy(row, to, watch);
      else gather(row, to, watch);
    }
  }

  // Row (t, h), which was the `index`th of those loaded.
  const State* row(int64_t t, int64_t h, int64_t index) const {
    if (in_place_) return reinterpret_cast<const State*>(at(t, h));
    return reinterpret_cast<const State*>(slab_ + index * width_);
  }

  void next(int64_t& t, int64_t& h) const {
    if (++h == height_) h = 0, ++t;
  }

 private:
  const Element* at(int64_t t, int64_t h) const { return x_ + t * t_ + h * h_; }

  void look(const Element* row, NanWatch<V>& watch) const {
    int64_t w = 0;
    for (; w + 1 < width_; w += 2)
      watch.look(Simd<Element>::load(row + w * w_), Simd<Element>::load(row + (w + 1) * w_));
    if (w < width_) {
      const V last = Simd<Element>::load(row + w * w_);
      watch.look(last, last);
    }
  }

  void copy(const Element* row, V* to, NanWatch<V>& watch) const {
    for (int64_t w = 0; w < width_; ++w) {
      to[w] = load_n(row + w * w_, n_);
      watch.look(to[w], to[w]);
    }
  }

  // Rows that lie one behind another are turned over together.
  void load_channels(int64_t t, int64_t h, int64_t count, NanWatch<V>& watch) {
    for (int64_t k = 0; k < count;) {
      const Element* const from = at(t, h);
      const int64_t first = k;
      do next(t, h), ++k;
      while (k < count && at(t, h) == from + (k - first) * width_);
      load_tiles(from, channel_, n_, (k - first) * width_, slab_ + first * width_, watch);
    }
  }

  void gather(const Element* row, V* to, NanWatch<V>& watch) const {
    State buffer[lanes];
    for (int64_t w = 0; w < width_; ++w) {
      for (int64_t c = 0; c < lanes; ++c)
        buffer[c] = Simd<Element>::widen(row[w * w_ + (c < n_ ? c : n_ - 1) * channel_]);
      to[w] = Simd<State>::load(buffer);
      watch.look(to[w], to[w]);
    }
  }

  const Element* x_;
  int64_t channel_, t_, h_, w_, n_, height_, width_;
  V* slab_;
  bool in_place_;
  int64_t together_;
};

template <class Element>
class Forward {
 public:
  using Types = Pooled<Element>;
  using State = typename Types::State;
  using Int = typename Types::Int;
  using V = typename Types::V;
  using I = typename Types::I;

  Forward(const PyramidPoolForward& args, const PoolGeometry& geometry, const PoolScratch& scratch, int64_t b,
          int64_t c)
      : args_(args),
        pool_(args.pool),
        geometry_(geometry),
        values_(reinterpret_cast<V*>(scratch.values)),
        places_(reinterpret_cast<I*>(scratch.places)),
        sums_(reinterpret_cast<V*>(scratch.sums)),
        row_values_(reinterpret_cast<V*>(scratch.row_values)),
        row_places_(reinterpret_cast<I*>(scratch.row_places)),
        b_(b),
        c_(c),
        n_(pool_.C - c < Types::lanes ? pool_.C - c : Types::lanes),
        rows_(args, geometry, scratch, b, c, n_) {}

  void run() {
    if (geometry_.partial) clear();
    const bool indexed = places_ != nullptr;
    // Comparisons that mind NaN cost twice as much: they are for channels that have one.
    const bool done = indexed ? reduce<true, false>() : reduce<false, false>();
    if (!done) indexed ? reduce<true, true>() : reduce<false, true>();
    for (int64_t k = 0; k < pool_.level_count; ++k) {
      const PyramidLevel& level = pool_.levels[k];
      const PoolLevel& bins = geometry_.levels[k];
      if (sums_) divide(level, bins);
      write(values_, level.maxima, level, bins);
      write(sums_, level.means, level, bins);
    }
    if (indexed) write_indices();
  }

 private:
  static int64_t bin_of(const PyramidLevel& level, const PoolLevel& bins, int64_t t, int64_t h) {
    return level.column + (t * bins.h.all + h) * bins.w.all;
  }

  void clear() {
    for (int64_t k = 0; k < pool_.columns; ++k) {
      if (values_) values_[k] = V{};
      if (places_) places_[k] = I{} - 1;
      if (sums_) sums_[k] = V{};
    }
  }

  // Every level's maxima and sums. False: there is a NaN, which `nan` is for.
  template <bool indexed, bool nan>
  bool reduce() {
    int64_t t = 0, h = 0;
    for (int64_t rest = geometry_.size[0] * geometry_.size[1], count; rest > 0; rest -= count) {
      count = rest < rows_.together() ? rest : rows_.together();
      NanWatch<V> watch;
      rows_.load(t, h, count, watch);
      if (!nan && values_ && watch.any()) return false;
      for (int64_t r = 0; r < count; ++r, rows_.next(t, h)) {
        const State* const row = rows_.row(t, h, r);
        for (int64_t k = 0; k < pool_.level_count; ++k) {
          const PyramidLevel& level = pool_.levels[k];
          const PoolLevel& bins = geometry_.levels[k];
          if (values_ && level.source < 0) join_maxima<indexed, nan>(level, bins, row, t, h);
          if (sums_ && !bins.sums_follow) join_sums(level, bins, row, t, h);
        }
      }
    }
    for (int64_t k = 0; k < pool_.level_count; ++k) {
      const PyramidLevel& level = pool_.levels[k];
      if (values_ && level.source >= 0) follow_maxima<indexed, nan>(level, geometry_.levels[k]);
      if (sums_ && geometry_.levels[k].sums_follow) follow_sums(level, geometry_.levels[k]);
    }
    return true;
  }

  // Whether v takes the place of m, which comes before it in x.
  template <bool nan>
  static SORA_INLINE auto wins(V v, V m) {
    if constexpr (nan) return (v > m) | (v != v);
    else return v > m;
  }

  // Whether v, of place i, takes the place of m, of place j, in whatever order the two are.
  template <bool nan>
  static SORA_INLINE auto wins(V v, I i, V m, I j) {
    const auto first = (v > m) | ((v == m) & (i < j));
    if constexpr (nan) return first | ((v != v) & ((m == m) | (i > j)));
    else return first;
  }

  template <bool indexed, bool nan>
  SORA_INLINE void join_maxima(const PyramidLevel& level, const PoolLevel& bins, const State* row, int64_t t,
                               int64_t h) {
    const PoolAxis &T = bins.t, &H = bins.h, &W = bins.w;
    const int64_t a0 = T.first[t], a1 = T.last[t], b0 = H.first[h], b1 = H.last[h], step = rows_.step();
    const bool alone = a1 - a0 == 1 && b1 - b0 == 1 && T.from[a0] == t && H.from[b0] == h;
    const int64_t own = bin_of(level, bins, a0, b0);
    V* const values = alone ? values_ + own : row_values_;
    I* const places = alone ? places_ + own : row_places_;
    const Int place = Int((t * pool_.sizes[1] + h) * pool_.sizes[2]);
    for (int64_t c = 0; c < W.bins; ++c) {
      int64_t w = W.from[c];
      V m = Simd<State>::load(row + w * step);
      I at = I{} + Int(w);
      for (++w; w < W.to[c]; ++w) {
        const V v = Simd<State>::load(row + w * step);
        const auto newer = wins<nan>(v, m);
        m = newer ? v : m;
        if (indexed) at = newer ? I{} + Int(w) : at;
      }
      values[c] = m;
      if (indexed) places[c] = at + place;
    }
    if (alone) return;
    for (int64_t a = a0; a < a1; ++a)
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t bin = bin_of(level, bins, a, b);
        if (T.from[a] == t && H.from[b] == h) {
          for (int64_t c = 0; c < W.bins; ++c) values_[bin + c] = row_values_[c];
          for (int64_t c = 0; indexed && c < W.bins; ++c) places_[bin + c] = row_places_[c];
          continue;
        }
        for (int64_t c = 0; c < W.bins; ++c) {
          const V v = row_values_[c], m = values_[bin + c];
          const auto newer = wins<nan>(v, m);
          values_[bin + c] = newer ? v : m;
          if (indexed) places_[bin + c] = newer ? row_places_[c] : places_[bin + c];
        }
      }
  }

  // Of long rows four sums side by side: an addition waits for the one before.
  static SORA_INLINE V sum_of(const State* row, int64_t count, int64_t step) {
    V sum = Simd<State>::load(row);
    int64_t w = 1;
    if (count >= 8) {
      V others[3];
      for (int k = 0; k < 3; ++k, ++w) others[k] = Simd<State>::load(row + w * step);
      for (; w + 4 <= count; w += 4) {
        sum += Simd<State>::load(row + w * step);
        for (int k = 0; k < 3; ++k) others[k] += Simd<State>::load(row + (w + 1 + k) * step);
      }
      sum = (sum + others[0]) + (others[1] + others[2]);
    }
    for (; w < count; ++w) sum += Simd<State>::load(row + w * step);
    return sum;
  }

  SORA_INLINE void join_sums(const PyramidLevel& level, const PoolLevel& bins, const State* row, int64_t t, int64_t h) {
    const PoolAxis &T = bins.t, &H = bins.h, &W = bins.w;
    const int64_t a0 = T.first[t], a1 = T.last[t], b0 = H.first[h], b1 = H.last[h], step = rows_.step();
    const bool alone = a1 - a0 == 1 && b1 - b0 == 1 && T.from[a0] == t && H.from[b0] == h;
    V* const sums = alone ? sums_ + bin_of(level, bins, a0, b0) : row_values_;
    for (int64_t c = 0; c < W.bins; ++c) sums[c] = sum_of(row + W.from[c] * step, W.to[c] - W.from[c], step);
    if (alone) return;
    for (int64_t a = a0; a < a1; ++a)
      for (int64_t b = b0; b < b1; ++b) {
        V* const target = sums_ + bin_of(level, bins, a, b);
        const bool begins = T.from[a] == t && H.from[b] == h;
        for (int64_t c = 0; c < W.bins; ++c) target[c] = begins ? row_values_[c] : target[c] + row_values_[c];
      }
  }

  template <bool indexed, bool nan>
  void follow_maxima(const PyramidLevel& level, const PoolLevel& bins) {
    const PyramidLevel& source = pool_.levels[level.source];
    const PoolLevel& finer = geometry_.levels[level.source];
    for (int64_t t = 0; t < bins.t.bins; ++t)
      for (int64_t h = 0; h < bins.h.bins; ++h)
        for (int64_t w = 0; w < bins.w.bins; ++w) {
          const int64_t own = bin_of(level, bins, t, h) + w;
          const int64_t first = bin_of(source, finer, t * bins.t.children, h * bins.h.children) + w * bins.w.children;
          V m = values_[first];
          I at = indexed ? places_[first] : I{};
          for (int64_t i = 0; i < bins.t.children; ++i)
            for (int64_t j = 0; j < bins.h.children; ++j)
              for (int64_t k = 0; k < bins.w.children; ++k) {
                const int64_t child = first + (i * finer.h.all + j) * finer.w.all + k;
                const V v = values_[child];
                if constexpr (indexed) {
                  const auto better = wins<nan>(v, places_[child], m, at);
                  m = better ? v : m;
                  at = better ? places_[child] : at;
                } else {
                  m = wins<nan>(v, m) ? v : m;
                }
              }
          values_[own] = m;
          if (indexed) places_[own] = at;
        }
  }

  void follow_sums(const PyramidLevel& level, const PoolLevel& bins) {
    const PyramidLevel& source = pool_.levels[level.source];
    const PoolLevel& finer = geometry_.levels[level.source];
    for (int64_t t = 0; t < bins.t.bins; ++t)
      for (int64_t h = 0; h < bins.h.bins; ++h)
        for (int64_t w = 0; w < bins.w.bins; ++w) {
          const int64_t first = bin_of(source, finer, t * bins.t.children, h * bins.h.children) + w * bins.w.children;
          V sum{};
          for (int64_t i = 0; i < bins.t.children; ++i)
            for (int64_t j = 0; j < bins.h.children; ++j)
              for (int64_t k = 0; k < bins.w.children; ++k)
                sum += sums_[first + (i * finer.h.all + j) * finer.w.all + k];
          sums_[bin_of(level, bins, t, h) + w] = sum;
        }
  }

  // After the last level's sums are known.
  void divide(const PyramidLevel& level, const PoolLevel& bins) {
    for (int64_t t = 0; t < bins.t.bins; ++t)
      for (int64_t h = 0; h < bins.h.bins; ++h) {
        V* const sums = sums_ + bin_of(level, bins, t, h);
        const int64_t rows = (bins.t.to[t] - bins.t.from[t]) * (bins.h.to[h] - bins.h.from[h]);
        for (int64_t w = 0; w < bins.w.bins; ++w) {
          const int64_t count = rows * (bins.w.to[w] - bins.w.from[w]);
          if (count > 1) sums[w] = sums[w] / State(count);
        }
      }
  }

  void write(const V* bins, const PyramidPart& part, const PyramidLevel& level, const PoolLevel& geometry) {
    if (part.result < 0) return;
    Element* const target = static_cast<Element*>(args_.results[part.result]) + part.offset + b_ * part.batch_stride +
                            c_ * part.channel_stride;
    const int64_t count = geometry.t.all * geometry.h.all * geometry.w.all;
    store_bins(bins + level.column, count, n_, target, part.channel_stride, part.bin_stride);
  }

  void write_indices() {
    const int64_t batch = b_ * pool_.columns * pool_.C;
    const V* const bits = reinterpret_cast<const V*>(places_);
    if (pool_.inner) return store_bins(bits, pool_.columns, n_, args_.indices + batch + c_, 1, pool_.C);
    store_bins(bits, pool_.columns, n_, args_.indices + batch + c_ * pool_.columns, pool_.columns, 1);
  }

  const PyramidPoolForward& args_;
  const PyramidPool& pool_;
  const PoolGeometry& geometry_;
  V* const values_;
  I* const places_;
  V* const sums_;
  V* const row_values_;
  I* const row_places_;
  const int64_t b_, c_, n_;
  Rows<Element> rows_;
};

}  // namespace SORA_ISA
}  // namespace sora
