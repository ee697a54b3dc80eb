// Private to csrc/pyramid_pool: what pyramid_pool_cpu.cpp asks of forward.h and backward.h, which are compiled once for
// each instruction set.
#pragma once

#include "pyramid_pool.h"

namespace sora {

// The bins of one level over one axis of a sample's region.
struct PoolAxis {
  int64_t bins;              // that lie over the region
  int64_t all;               // that there is room for; more than `bins` where every element has one
  const int64_t *from, *to;  // [bins] the elements of each
  const int64_t *first, *last;  // [elements of the region] the bins that contain each
  int64_t children;          // bins of the source that make up one of these
};

struct PoolLevel {
  PoolAxis t, h, w;
  bool sums_follow;  // the source's bins tile the region: sums over them are sums over these
};

// The bins of all levels over one sample's region.
struct PoolGeometry {
  int64_t size[3];  // of the region; all 0 if one is
  bool partial;     // some bins do not lie over it
  const PoolLevel* levels;
};

// A thread's scratch memory: vectors of the instruction set, aligned. Of the arrays that a pass does not need, null.
struct PoolScratch {
  char* values;      // [columns] maxima
  char* places;      // [columns] their indices, integers as wide as the state
  char* sums;        // [columns] sums; backward: a bin's share of its mean's gradient
  char* row_values;  // [most bins over W] of one row
  char* row_places;  // the same
  char* slab;        // [slab_positions] some rows of x or dx
  char* total;       // backward: [W] shares in one row
  char* volume;      // backward: [T H W] of dx
  int64_t slab_positions;  // at least W
};

// The work of one sample b and the channels from c on, as many as there are lanes.
using PoolForwardKernel = void (*)(const PyramidPoolForward& args, const PoolGeometry& geometry,
                                   const PoolScratch& scratch, int64_t b, int64_t c);
using PoolBackwardKernel = void (*)(const PyramidPoolBackward& args, const PoolGeometry& geometry,
                                    const PoolScratch& scratch, int64_t b, int64_t c);

struct PoolKernels {
  int64_t lanes, vector_bytes;
  bool widens;  // the state is wider than the element
  PoolForwardKernel forward;
  PoolBackwardKernel backward;
};

// Null when the element type has no kernel.
const PoolKernels* pool_kernels_generic(DType dtype);
#if defined(__x86_64__)
const PoolKernels* pool_kernels_avx2(DType dtype);
const PoolKernels* pool_kernels_avx512(DType dtype);
#endif

}  // namespace sora
