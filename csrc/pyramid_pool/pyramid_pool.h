// Pyramid pooling: maxima and means of x [B, C, T, H, W] over several grids of bins, from one read of x, and the
// gradient in x.
//
// Bin i of o over n elements is [floor(i n / o), ceil((i + 1) n / o)): neighbours overlap where o does not divide n,
// and o may exceed n. Of equal values the first in the order of t, h, w is the maximum, of NaNs the last. Means are
// summed in float32 (float64 for float64). Results do not depend on the thread count.
//
// Forward, a sample and one vector of channels at a time:
//
//     row (t, h) of x   ->  one value a w-bin  ->  joins every (t-bin, h-bin) that contains the row
//     bins of a source  ->  bins of the levels that follow from it
//     bins              ->  results and indices, as they lie in memory
//
// Backward: shares of the means are laid over the rows, each maximum's gradient is added at its index, and dx is
// written.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace sora {

enum PyramidPoolError : int {
  kPyramidPoolOk = 0,
  kPyramidPoolUnsupportedDType = -1,  // this function has no kernel for the element type
  kPyramidPoolOutOfMemory = -2,       // scratch memory could not be allocated
};
// The text lives as long as the process.
const char* pyramid_pool_error(int code);

// One level's maxima or means, or the gradient of them: element (b, c, bin) is `offset + b batch_stride +
// c channel_stride + bin bin_stride` elements behind results[result]. One of the last two strides is 1. With `result`
// < 0 there are none; so it is with a null results[result], which is for gradients alone.
struct PyramidPart {
  int64_t result, offset, batch_stride, channel_stride, bin_stride;
};

// All int64_t: an array of them crosses from Python as plain numbers.
struct PyramidLevel {
  int64_t bins[3];  // over T, H, W; 0: one for every element of the axis
  int64_t column;   // of its first bin among those of all levels; bins are flattened t, h, w
  int64_t source;   // a level before this one whose bins make up this one's, or -1. The source has a multiple of this
                    // level's bins on every axis, 0 being a multiple of 0 alone
  PyramidPart maxima, means;
};

struct PyramidPool {
  int64_t B, C, sizes[3];     // T, H, W; T H W < 2^31
  // [B, 3], or null. Bins lie over the first valid_size[b] elements of each axis, clamped to 0 .. n; where every
  // element has a bin, those from there on are 0, their indices -1. So are all in an empty region.
  const int64_t* valid_size;
  const PyramidLevel* levels;
  int64_t level_count;
  int64_t columns;  // bins of all levels
  bool inner;       // indices are [B, columns, C] and dx is [B, T, H, W, C]; else [B, C, columns] and [B, C, T, H, W]
};

struct PyramidPoolForward {
  PyramidPool pool;
  const void* x;
  int64_t strides[5];    // of x, in elements: B, C, T, H, W
  void* const* results;  // of x's type
  int32_t* indices;      // of the maxima in x's flattened T, H, W; or null
};

struct PyramidPoolBackward {
  PyramidPool pool;
  const void* const* results;  // gradients
  const int32_t* indices;      // as forward left them; null where there are no maxima
  void* dx;                    // of the gradients' type, dense
};

// float32, float64, bfloat16. `threads` is the most that may be used.
int pyramid_pool_forward_cpu(DType dtype, const PyramidPoolForward& args, int threads);
int pyramid_pool_backward_cpu(DType dtype, const PyramidPoolBackward& args, int threads);

const char* pyramid_pool_cpu_isa();

}  // namespace sora
