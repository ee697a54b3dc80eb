// dx of one sample and one vector of channels. Where channels are innermost, dx is made in vectors of channels, else
// one channel after another: an index then leads to memory that is near.
#pragma once

#include "pyramid_pool_kernels.h"
#include "tiles.h"

namespace sora {
namespace SORA_ISA {

template <class Element>
class Backward {
 public:
  using Types = Pooled<Element>;
  using State = typename Types::State;
  using V = typename Types::V;
  static constexpr int lanes = Types::lanes;
  static constexpr bool widens = !std::is_same_v<Element, State>;

  Backward(const PyramidPoolBackward& args, const PoolGeometry& geometry, const PoolScratch& scratch, int64_t b,
           int64_t c)
      : args_(args),
        pool_(args.pool),
        geometry_(geometry),
        scratch_(scratch),
        shares_(reinterpret_cast<V*>(scratch.sums)),
        b_(b),
        c_(c),
        n_(pool_.C - c < lanes ? pool_.C - c : lanes),
        positions_(pool_.sizes[0] * pool_.sizes[1] * pool_.sizes[2]),
        dx_(static_cast<Element*>(args.dx) + b * pool_.C * positions_ + c * (pool_.inner ? 1 : positions_)) {}

  void run() {
    if (shares_)
      for (int64_t k = 0; k < pool_.level_count; ++k) read_shares(pool_.levels[k], geometry_.levels[k]);
    pool_.inner ? by_vectors() : by_channels();
  }

 private:
  const Element* gradient(const PyramidPart& part) const {
    if (part.result < 0 || !args_.results[part.result]) return nullptr;
    return static_cast<const Element*>(args_.results[part.result]) + part.offset + b_ * part.batch_stride +
           c_ * part.channel_stride;
  }

  void by_vectors() {
    if (!args_.indices) return lay_shares<true>(dx_);
    State* const volume = reinterpret_cast<State*>(scratch_.volume);
    if (shares_) lay_shares<false>(volume);
    else __builtin_memset(volume, 0, positions_ * sizeof(V));
    for (int64_t k = 0; k < pool_.level_count; ++k) add_maxima_by_vectors(pool_.levels[k], geometry_.levels[k], volume);
    for (int64_t p = 0; p < positions_; ++p) put_n(dx_ + p * pool_.C, n_, Simd<State>::load(volume + p * lanes));
  }

  void by_channels() {
    if (!args_.indices) return lay_shares<true>(dx_);
    if constexpr (widens) {
      State* const volume = reinterpret_cast<State*>(scratch_.volume);
      if (shares_) lay_shares<false>(volume);
      for (int64_t c = 0; c < n_; ++c) {
        // Without shares there is one channel at a time.
        State* const own = shares_ ? volume + c * positions_ : volume;
        if (!shares_) __builtin_memset(own, 0, positions_ * sizeof(State));
        add_maxima(c, own);
        for (int64_t p = 0; p < positions_; p += lanes) {
          const int64_t rest = positions_ - p;
          put_n(dx_ + c * positions_ + p, rest, load_n(own + p, rest));
        }
      }
    } else {
      if (shares_) lay_shares<true>(dx_);
      for (int64_t c = 0; c < n_; ++c) {
        State* const own = dx_ + c * positions_;
        if (!shares_) __builtin_memset(own, 0, positions_ * sizeof(State));
        add_maxima(c, own);
      }
    }
  }

  // What every element of a bin gets of its mean's gradient.
  void read_shares(const PyramidLevel& level, const PoolLevel& bins) {
    const PyramidPart& part = level.means;
    const Element* const from = gradient(part);
    if (!from) return;
    const int64_t count = bins.t.all * bins.h.all * bins.w.all;
    V* const shares = shares_ + level.column;
    if (part.channel_stride == 1) {
      for (int64_t bin = 0; bin < count; ++bin) shares[bin] = load_n(from + bin * part.bin_stride, n_);
    } else {
      NanWatch<V> unwatched;
      load_tiles(from, part.channel_stride, n_, count, shares, unwatched);
    }
    for (int64_t t = 0; t < bins.t.bins; ++t)
      for (int64_t h = 0; h < bins.h.bins; ++h) {
        V* const row = shares + (t * bins.h.all + h) * bins.w.all;
        const int64_t rows = (bins.t.to[t] - bins.t.from[t]) * (bins.h.to[h] - bins.h.from[h]);
        for (int64_t w = 0; w < bins.w.bins; ++w) {
          const int64_t size = rows * (bins.w.to[w] - bins.w.from[w]);
          if (size > 1) row[w] = row[w] / State(size);
        }
      }
  }

  // Writes the sum of the shares that every element has, zero beyond the region. `dense`: target is dx; else it is the
  // volume in scratch memory, of vectors or of channels as dx.
  template <bool dense, class Target>
  void lay_shares(Target* target) {
    const int64_t H = pool_.sizes[1], W = pool_.sizes[2], together = scratch_.slab_positions / W;
    V* const total = reinterpret_cast<V*>(scratch_.total);
    V* const slab = reinterpret_cast<V*>(scratch_.slab);
    int64_t t = 0, h = 0, laid_t = -1, laid_h = -1;  // `total` is of the row laid last
    for (int64_t first = 0, rest = pool_.sizes[0] * H, count; rest > 0; rest -= count, first += count * W) {
      count = rest < together ? rest : together;
      for (int64_t r = 0; r < count; ++r) {
        const bool inside = t < geometry_.size[0] && h < geometry_.size[1];
        if (inside && (laid_t < 0 || !same_bins(t, h, laid_t, laid_h))) {
          total_row(t, h, total);
          laid_t = t, laid_h = h;
        }
        for (int64_t w = 0; w < W; ++w) slab[r * W + w] = inside ? total[w] : V{};
        if (++h == H) h = 0, ++t;
      }
      const int64_t step = !pool_.inner ? 1 : dense ? pool_.C : lanes;
      store_bins(slab, count * W, n_, target + first * step, pool_.inner ? 1 : positions_, step);
    }
  }

  bool same_bins(int64_t t, int64_t h, int64_t other_t, int64_t other_h) const {
    const auto same = [](const PoolAxis& axis, int64_t p, int64_t q) {
      return axis.first[p] == axis.first[q] && axis.last[p] == axis.last[q];
    };
    for (int64_t k = 0; k < pool_.level_count; ++k) {
      const PoolLevel& bins = geometry_.levels[k];
      if (!same(bins.t, t, other_t) || !same(bins.h, h, other_h)) return false;
    }
    return true;
  }

  void total_row(int64_t t, int64_t h, V* total) {
    const int64_t width = geometry_.size[2];
    V* const row = reinterpret_cast<V*>(scratch_.row_values);
    for (int64_t w = 0; w < pool_.sizes[2]; ++w) total[w] = V{};
    for (int64_t k = 0; k < pool_.level_count; ++k) {
      const PyramidLevel& level = pool_.levels[k];
      if (!gradient(level.means)) continue;
      const PoolLevel& bins = geometry_.levels[k];
      for (int64_t c = 0; c < bins.w.bins; ++c) row[c] = V{};
      for (int64_t a = bins.t.first[t]; a < bins.t.last[t]; ++a)
        for (int64_t b = bins.h.first[h]; b < bins.h.last[h]; ++b) {
          const V* const shares = shares_ + level.column + (a * bins.h.all + b) * bins.w.all;
          for (int64_t c = 0; c < bins.w.bins; ++c) row[c] += shares[c];
        }
      for (int64_t w = 0; w < width; ++w)
        for (int64_t c = bins.w.first[w]; c < bins.w.last[w]; ++c) total[w] += row[c];
    }
  }

  // An index beyond the volume is -1: a bin without a maximum.
  void add_maxima(int64_t channel, State* volume) {
    const int32_t* const indices = args_.indices + ((b_ * pool_.C + c_ + channel) * pool_.columns);
    for (int64_t k = 0; k < pool_.level_count; ++k) {
      const PyramidLevel& level = pool_.levels[k];
      const PoolLevel& bins = geometry_.levels[k];
      const Element* const first = gradient(level.maxima);
      if (!first) continue;
      const Element* const from = first + channel * level.maxima.channel_stride;
      const int64_t count = bins.t.all * bins.h.all * bins.w.all, step = level.maxima.bin_stride;
      for (int64_t bin = 0; bin < count; ++bin) {
        const int64_t at = indices[level.column + bin];
        if (uint64_t(at) < uint64_t(positions_)) volume[at] += Simd<Element>::widen(from[bin * step]);
      }
    }
  }

  void add_maxima_by_vectors(const PyramidLevel& level, const PoolLevel& bins, State* volume) {
    const Element* const from = gradient(level.maxima);
    if (!from) return;
    const int64_t count = bins.t.all * bins.h.all * bins.w.all;
    const int64_t step = level.maxima.bin_stride, channel = level.maxima.channel_stride;
    const int32_t* indices = args_.indices + (b_ * pool_.columns + level.column) * pool_.C + c_;
    for (int64_t bin = 0; bin < count; ++bin, indices += pool_.C)
      for (int64_t c = 0; c < n_; ++c) {
        const int64_t at = indices[c];
        if (uint64_t(at) < uint64_t(positions_))
          volume[at * lanes + c] += Simd<Element>::widen(from[bin * step + c * channel]);
      }
  }

  const PyramidPoolBackward& args_;
  const PyramidPool& pool_;
  const PoolGeometry& geometry_;
  const PoolScratch& scratch_;
  V* const shares_;
  const int64_t b_, c_, n_, positions_;
  Element* const dx_;
};

}  // namespace SORA_ISA
}  // namespace sora
