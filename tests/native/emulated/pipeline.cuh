// Demonstration: a double-buffered cp.async pipeline, one barrier a step. out [rows, 64] = sums of neighbours of x.
#pragma once

#include <common/async_copy.cuh>
#include <common/barrier.cuh>
#include <common/launch.cuh>
#include <common/memory.cuh>
#include <common/mma.cuh>

namespace sora {

struct PipelineShared {
  alignas(16) float x[2][64];
};

SORA_KERNEL(64, 1) pipeline_kernel(const float* x_ptr, float* out_ptr, int rows) {
  PipelineShared& s = shared_memory<PipelineShared>();
  const unsigned i = thread_index().x;
  auto fetch = [&](int row) {
    if (row < rows && i < 16) cp_async<16>(shared_address(&s.x[row & 1][4 * i]), x_ptr + 64 * row + 4 * i);
  };
  fetch(0);
  cp_async_commit();
  for (int row = 0; row < rows; ++row) {
    cp_async_wait<0>();
    sync_block();  // row is there; everybody has read the buffer of row - 1
    fetch(row + 1);
    cp_async_commit();
    out_ptr[64 * row + i] = s.x[row & 1][i] + s.x[row & 1][63 - i];
  }
}

}  // namespace sora
