// ldmatrix and mma, with the layouts that csrc/common/mma.cuh writes down.
#include "../common/element.cuh"
#include "threads.h"

namespace emu {
namespace {

float element(uint32_t bits, Operand type) {
  if (type == Operand::bf16) return sora::to_float(sora::BFloat16{uint16_t(bits)});
  if (type == Operand::f16) return sora::to_float(sora::Half{uint16_t(bits)});
  return sora::bits_float(bits & 0xffffe000u);
}

struct MmaArgument {
  Operand type;
  float* d;
  const uint32_t *a, *b;
};

// A register holds `packed` elements, neighbours along k; K = 8 * packed.
template <int packed>
void multiply(const WarpOperation& operation, Operand type) {
  constexpr int K = 8 * packed, half = K / 2;
  float a[16][K], b[K][8], sum[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const auto& from = *static_cast<const MmaArgument*>(operation.arguments[lane]);
    const int group = lane / 4, k = lane % 4 * packed;
    for (int i = 0; i < packed; ++i) {
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][k + r / 2 * half + i] = element(from.a[r] >> (16 * i), type);
      for (int r = 0; r < 2; ++r) b[k + r * half + i][group] = element(from.b[r] >> (16 * i), type);
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) sum[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const MmaArgument*>(operation.arguments[lane])->d;
    for (int r = 0; r < 4; ++r) d[r] += sum[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
  }
}

}  // namespace

void mma(Operand type, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  MmaArgument argument{type, d, a, b};
  uint32_t mask = kAllLanes;
  WarpOperation* operation = join_warp(kMma, mask, &argument, true, site);
  if (!operation) return;
  if (type == Operand::tf32)
    multiply<1>(*operation, type);
  else
    multiply<2>(*operation, type);
  complete_warp(operation);
}

void ldmatrix(uint32_t* fragments, int count, uint32_t row_address, bool transposed, Site site) {
  struct Argument {
    uint32_t* fragments;
    uint32_t address;
    const unsigned char* row;
  } argument{fragments, row_address, nullptr};
  // Only lanes 0 to 8 count - 1 give addresses.
  if (int(lane()) < 8 * count) argument.row = shared_pointer(row_address, 16, 16, false, site);
  uint32_t mask = kAllLanes;
  WarpOperation* operation = join_warp(kLdmatrix, mask, &argument, true, site);
  if (!operation) return;
  for (int matrix = 0; matrix < count; ++matrix) {
    uint16_t m[8][8];
    for (int i = 0; i < 8; ++i) {
      const int giver = 8 * matrix + i;
      const unsigned char* row = static_cast<const Argument*>(operation->arguments[giver])->row;
      record(*operation->threads[giver], row, 16, kRead, site);
      __builtin_memcpy(m[i], row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = transposed ? m[t][g] : m[g][t], high = transposed ? m[t + 1][g] : m[g][t + 1];
      static_cast<Argument*>(operation->arguments[lane])->fragments[matrix] = low | high << 16;
    }
  }
  complete_warp(operation);
}

}  // namespace emu
