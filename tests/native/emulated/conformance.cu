// Launches of csrc/emu/conformance.cuh for ctypes; 0 or an error. Compiled by g++ for the emulation or by nvcc.
#include <emu/conformance.cuh>

using namespace sora;

namespace {

LaunchConfig one_block(unsigned threads, size_t shared_bytes = 0) { return {{1}, {threads}, shared_bytes}; }

template <class T>
int mma(const uint32_t* a, const uint32_t* b, float* d, void* stream) {
  return launch_kernel(conformance_mma_kernel<T>, one_block(32), stream, a, b, d);
}

template <int count, bool transposed>
int ldmatrix(const uint16_t* rows, const int* row_of, uint32_t* fragments, void* stream) {
  const auto config = one_block(32, sizeof(LdmatrixShared));
  return launch_kernel(conformance_ldmatrix_kernel<count, transposed>, config, stream, rows, row_of, fragments);
}

template <int size>
int cp_async(const unsigned char* x, const int* from_bytes, unsigned char* out, void* stream) {
  const auto config = one_block(32, sizeof(CopyShared));
  return launch_kernel(conformance_cp_async_kernel<size>, config, stream, x, from_bytes, out);
}

LaunchConfig clusters(unsigned size) {
  LaunchConfig config{{2 * size}, {64}, sizeof(ClusterShared)};
  config.cluster = size;
  return config;
}

LaunchConfig cooperative(unsigned ctas) {
  LaunchConfig config{{ctas}, {64}};
  config.cooperative = true;
  return config;
}

}  // namespace

extern "C" {

int run_mma(int type, const uint32_t* a, const uint32_t* b, float* d, void* stream) {
  return type == 0   ? mma<Half>(a, b, d, stream)
         : type == 1 ? mma<BFloat16>(a, b, d, stream)
                     : mma<float>(a, b, d, stream);
}
int run_ldmatrix(int count, int transposed, const uint16_t* rows, const int* row_of, uint32_t* fragments,
                 void* stream) {
  if (count == 1) return ldmatrix<1, false>(rows, row_of, fragments, stream);
  if (count == 2 && transposed) return ldmatrix<2, true>(rows, row_of, fragments, stream);
  if (count == 2) return ldmatrix<2, false>(rows, row_of, fragments, stream);
  if (transposed) return ldmatrix<4, true>(rows, row_of, fragments, stream);
  return ldmatrix<4, false>(rows, row_of, fragments, stream);
}
int run_warp(const float* x, float* out, void* stream) {
  return launch_kernel(conformance_warp_kernel, one_block(32), stream, x, out);
}
int run_block(const float* x, float* out, void* stream) {
  return launch_kernel(conformance_block_kernel, one_block(128, sizeof(BlockShared)), stream, x, out);
}
int run_named_barrier(float* out, int rounds, void* stream) {
  return launch_kernel(conformance_named_barrier_kernel, one_block(128, sizeof(BlockShared)), stream, out, rounds);
}
int run_cp_async(int size, const unsigned char* x, const int* from_bytes, unsigned char* out, void* stream) {
  if (size == 4) return cp_async<4>(x, from_bytes, out, stream);
  if (size == 8) return cp_async<8>(x, from_bytes, out, stream);
  return cp_async<16>(x, from_bytes, out, stream);
}
int run_memory(const uint32_t* x, uint32_t* out, void* stream) {
  return launch_kernel(conformance_memory_kernel, one_block(32), stream, x, out);
}
int run_math(const float* x, uint32_t* out, int n, void* stream) {
  const LaunchConfig config{{unsigned(n + 127) / 128}, {128}};
  return launch_kernel(conformance_math_kernel, config, stream, x, out, n);
}
int run_mbarrier(const uint32_t* x, uint32_t* out, int rounds, void* stream) {
  return launch_kernel(conformance_mbarrier_kernel, one_block(64, sizeof(MbarrierShared)), stream, x, out, rounds);
}
int run_cluster(uint32_t* out, void* stream) {
  return launch_kernel(conformance_cluster_kernel, clusters(4), stream, out);
}
int run_multicast(const uint32_t* x, uint32_t* out, void* stream) {
  return launch_kernel(conformance_multicast_kernel, clusters(4), stream, x, out);
}
int run_grid(uint32_t* values, uint32_t* counter, int ctas, int rounds, void* stream) {
  return launch_kernel(conformance_grid_kernel, cooperative(unsigned(ctas)), stream, values, counter, rounds);
}
int run_flags(const uint32_t* x, uint32_t* out, uint32_t* flags, int ctas, int variant, void* stream) {
  return launch_kernel(conformance_flags_kernel, cooperative(unsigned(ctas)), stream, x, out, flags, variant);
}

}  // extern "C"
