// Bins, threads, scratch memory and the choice of an instruction set; the arithmetic is in forward.h and backward.h.
#include <cstdlib>
#include <new>
#include <vector>

#include "../common/cpu_isa.h"
#include "../common/threads.h"
#include "pyramid_pool_kernels.h"

namespace sora {
namespace {

constexpr int64_t kElementsPerThread = 1 << 15;  // some 30 us of work, to pay for starting a team
constexpr int64_t kSlabPositions = 256;          // of 64 bytes: half of a first-level cache

const PoolKernels* kernels_for(DType dtype) {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::avx512) return pool_kernels_avx512(dtype);
  if (cpu_isa() == CpuIsa::avx2) return pool_kernels_avx2(dtype);
#endif
  return pool_kernels_generic(dtype);
}

// Owns what a PoolGeometry points to.
class Geometry : public PoolGeometry {
 public:
  explicit Geometry(const PyramidPool& pool) : pool_(pool), own_(pool.level_count) {
    int64_t room = 0;
    for (int64_t k = 0; k < pool.level_count; ++k)
      for (int axis = 0; axis < 3; ++axis)
        room += 2 * (all(pool.levels[k].bins[axis], pool.sizes[axis]) + pool.sizes[axis]);
    numbers_.resize(room);
    levels = own_.data();
  }
  Geometry(const Geometry&) = delete;

  // Lays the bins over sample b's region.
  void lay(int64_t b) {
    bool empty = false;
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t n = pool_.sizes[axis], valid = pool_.valid_size ? pool_.valid_size[3 * b + axis] : n;
      size[axis] = std::min(std::max<int64_t>(valid, 0), n);
      empty |= size[axis] == 0;
    }
    if (empty) size[0] = size[1] = size[2] = 0;
    partial = empty;
    int64_t* room = numbers_.data();
    for (int64_t k = 0; k < pool_.level_count; ++k) {
      const PyramidLevel& level = pool_.levels[k];
      const PyramidLevel* source = level.source < 0 ? nullptr : pool_.levels + level.source;
      PoolAxis* const axes[] = {&own_[k].t, &own_[k].h, &own_[k].w};
      own_[k].sums_follow = source != nullptr;
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t o = level.bins[axis], finer = source ? source->bins[axis] : o;
        room = lay_axis(o, pool_.sizes[axis], size[axis], *axes[axis], room);
        axes[axis]->children = o ? finer / o : 1;
        partial |= axes[axis]->bins < axes[axis]->all;
        if (finer != o && size[axis] % finer) own_[k].sums_follow = false;
      }
    }
  }

 private:
  static int64_t all(int64_t o, int64_t n) { return o ? o : n; }

  static int64_t* lay_axis(int64_t o, int64_t whole, int64_t n, PoolAxis& axis, int64_t* room) {
    axis.all = all(o, whole);
    axis.bins = n ? all(o, n) : 0;
    int64_t *const from = room, *const to = from + axis.bins, *const first = to + axis.bins, *const last = first + n;
    for (int64_t i = 0; i < axis.bins; ++i) {
      from[i] = i * n / axis.bins;
      to[i] = ((i + 1) * n + axis.bins - 1) / axis.bins;
    }
    for (int64_t p = 0; p < n; ++p) {
      first[p] = p * axis.bins / n;
      last[p] = ((p + 1) * axis.bins + n - 1) / n;
    }
    axis.from = from, axis.to = to, axis.first = first, axis.last = last;
    return last + n;
  }

  const PyramidPool& pool_;
  std::vector<PoolLevel> own_;
  std::vector<int64_t> numbers_;
};

// What a pass needs, in vectors.
struct Needs {
  int64_t values, places, sums, row_values, row_places, slab, total, volume;
};

// A thread's scratch memory in one block.
class Scratch {
 public:
  Scratch(const Needs& needs, int64_t vector_bytes) {
    const int64_t all = needs.values + needs.places + needs.sums + needs.row_values + needs.row_places + needs.slab +
                        needs.total + needs.volume;
    if (posix_memalign(&base_, 64, std::max<int64_t>(all * vector_bytes, 64)) != 0) throw std::bad_alloc();
    char* next = static_cast<char*>(base_);
    const auto take = [&](int64_t vectors) {
      char* const own = vectors ? next : nullptr;
      next += vectors * vector_bytes;
      return own;
    };
    arrays.values = take(needs.values);
    arrays.places = take(needs.places);
    arrays.sums = take(needs.sums);
    arrays.row_values = take(needs.row_values);
    arrays.row_places = take(needs.row_places);
    arrays.slab = take(needs.slab);
    arrays.total = take(needs.total);
    arrays.volume = take(needs.volume);
    arrays.slab_positions = needs.slab;
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(base_); }

  PoolScratch arrays{};

 private:
  void* base_ = nullptr;
};

int64_t most_row_bins(const PyramidPool& pool) {
  int64_t most = 0;
  for (int64_t k = 0; k < pool.level_count; ++k)
    most = std::max(most, pool.levels[k].bins[2] ? pool.levels[k].bins[2] : pool.sizes[2]);
  return most;
}

int64_t positions(const PyramidPool& pool) { return pool.sizes[0] * pool.sizes[1] * pool.sizes[2]; }

int64_t slab_positions(const PyramidPool& pool) {
  return std::max(pool.sizes[2], std::min(kSlabPositions, positions(pool)));
}

Needs forward_needs(const PyramidPoolForward& args, const PoolKernels&) {
  const PyramidPool& pool = args.pool;
  const bool maxima = pool.levels[0].maxima.result >= 0, means = pool.levels[0].means.result >= 0;
  Needs needs{};
  needs.values = maxima ? pool.columns : 0;
  needs.places = maxima && args.indices ? pool.columns : 0;
  needs.sums = means ? pool.columns : 0;
  needs.row_values = most_row_bins(pool);
  needs.row_places = needs.places ? needs.row_values : 0;
  needs.slab = slab_positions(pool);
  return needs;
}

Needs backward_needs(const PyramidPoolBackward& args, const PoolKernels& kernels) {
  const PyramidPool& pool = args.pool;
  const bool means = pool.levels[0].means.result >= 0;
  Needs needs{};
  if (means) {
    needs.sums = pool.columns;
    needs.row_values = most_row_bins(pool);
    needs.slab = slab_positions(pool);
    needs.total = pool.sizes[2];
  }
  if (args.indices && (pool.inner || kernels.widens)) {
    // Without means, channels in planes are done one at a time.
    const int64_t channels = pool.inner || means ? kernels.lanes : 1;
    needs.volume = (positions(pool) * channels + kernels.lanes - 1) / kernels.lanes;
  }
  return needs;
}

template <class Args, class Kernel>
int run(const Args& args, const PoolKernels* kernels, Needs (*needs_of)(const Args&, const PoolKernels&),
        Kernel PoolKernels::*kernel, int threads) {
  if (!kernels) return kPyramidPoolUnsupportedDType;
  const PyramidPool& pool = args.pool;
  const int64_t blocks = (pool.C + kernels->lanes - 1) / kernels->lanes, units = pool.B * blocks;
  const int64_t elements = pool.B * pool.C * (positions(pool) + pool.columns);
  const int64_t most = std::min<int64_t>(threads, std::min(units, elements / kElementsPerThread));
  const Needs needs = needs_of(args, *kernels);
  bool failed = false;  // exceptions must not leave a team
  run_team(static_cast<int>(std::max<int64_t>(most, 1)), [&](int thread, int team) {
    try {
      const Range own = part_of(units, team, thread);
      if (own.begin == own.end) return;
      const Scratch scratch(needs, kernels->vector_bytes);
      Geometry geometry(pool);
      for (int64_t unit = own.begin; unit < own.end; ++unit) {
        if (unit == own.begin || (pool.valid_size && unit % blocks == 0)) geometry.lay(unit / blocks);
        (kernels->*kernel)(args, geometry, scratch.arrays, unit / blocks, unit % blocks * kernels->lanes);
      }
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = true;
    }
  });
  return failed ? kPyramidPoolOutOfMemory : kPyramidPoolOk;
}

}  // namespace

int pyramid_pool_forward_cpu(DType dtype, const PyramidPoolForward& args, int threads) {
  return run(args, kernels_for(dtype), forward_needs, &PoolKernels::forward, threads);
}

int pyramid_pool_backward_cpu(DType dtype, const PyramidPoolBackward& args, int threads) {
  return run(args, kernels_for(dtype), backward_needs, &PoolKernels::backward, threads);
}

const char* pyramid_pool_error(int code) {
  switch (code) {
    case kPyramidPoolOk: return "ok";
    case kPyramidPoolUnsupportedDType: return "no kernel for this element type";
    case kPyramidPoolOutOfMemory: return "out of memory";
  }
  return "unknown error";
}

const char* pyramid_pool_cpu_isa() {
  constexpr const char* names[] = {"generic", "avx2", "avx512"};
  return names[static_cast<int>(cpu_isa())];
}

}  // namespace sora
