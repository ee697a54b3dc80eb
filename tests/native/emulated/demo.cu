// Launches of the demonstration kernels for ctypes; 0 or an error.
#include "all_gather.cuh"
#include "pipeline.cuh"

extern "C" {

int run_pipeline(const float* x, float* out, int rows, void* stream) {
  const sora::LaunchConfig config{{1}, {64}, sizeof(sora::PipelineShared)};
  return sora::launch_kernel(sora::pipeline_kernel, config, stream, x, out, rows);
}

int run_all_gather(int bulk, uint32_t* out, int size, int steps, void* stream) {
  sora::LaunchConfig config{{unsigned(size)}, {32}, sizeof(sora::AllGatherShared)};
  config.cluster = unsigned(size);
  const auto kernel = bulk ? sora::all_gather_kernel<true> : sora::all_gather_kernel<false>;
  return sora::launch_kernel(kernel, config, stream, out, steps);
}

}  // extern "C"
