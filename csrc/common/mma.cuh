// Matrix fragments in the registers of a warp: D[16][8] += A[16][k] B[k][8], fp32 accumulators.
//
//   mma_m16n8k16<Half>(d, a, b), <BFloat16>    a[4], b[2]: two elements a register
//   mma_m16n8k8_tf32(d, a, b)                  a[4], b[2]: one element a register, the low 13 bits are ignored
//   ldmatrix_x4(r, address), _x2, _x1          8x8 matrices of 16-bit elements in shared memory; lane 8 i + j gives the
//   ldmatrix_x4_trans(r, address), _x2_trans   address of row j of matrix i, 16 bytes, aligned to 16
//   shared_address(p)                          the 32-bit shared address of p
//
// Layouts, with g = lane / 4, t = lane % 4 (PTX ISA, "Matrix Fragments for mma"):
//   k = 16: a[0] = A[g][2t..2t+1]  a[1] = A[g+8][2t..]  a[2] = A[g][2t+8..]  a[3] = A[g+8][2t+8..]
//           b[0] = B[2t..2t+1][g]  b[1] = B[2t+8..][g]
//   k = 8:  a[0] = A[g][t]  a[1] = A[g+8][t]  a[2] = A[g][t+4]  a[3] = A[g+8][t+4];  b[0] = B[t][g]  b[1] = B[t+4][g]
//   both:   d[0], d[1] = D[g][2t], D[g][2t+1];  d[2], d[3] = D[g+8][2t], D[g+8][2t+1]
//   ldmatrix: r[i] = M_i[g][2t..2t+1], with _trans M_i[2t..2t+1][g]
// So ldmatrix on rows of A gives a[0..3] from the blocks (0, 0), (8, 0), (0, 8), (8, 8) of (row, k); on rows of B^T,
// that is on [n][k], b[0..1] from the blocks k = 0, 8; with _trans on [k][n] the same.
#pragma once

#include "element.cuh"
#include "launch.cuh"

namespace sora {

#if defined(SORA_HOST_EMULATION)

SORA_DEVICE uint32_t shared_address(const void* p SORA_AND_SITE) { return emu::shared_address(p, site); }

SORA_DEVICE void ldmatrix_x1(uint32_t (&r)[1], uint32_t address SORA_AND_SITE) {
  emu::ldmatrix(r, 1, address, false, site);
}
SORA_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t address SORA_AND_SITE) {
  emu::ldmatrix(r, 2, address, false, site);
}
SORA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address SORA_AND_SITE) {
  emu::ldmatrix(r, 4, address, false, site);
}
SORA_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address SORA_AND_SITE) {
  emu::ldmatrix(r, 2, address, true, site);
}
SORA_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address SORA_AND_SITE) {
  emu::ldmatrix(r, 4, address, true, site);
}

template <class T>
constexpr emu::Operand kOperand = emu::Operand::tf32;
template <>
constexpr emu::Operand kOperand<Half> = emu::Operand::f16;
template <>
constexpr emu::Operand kOperand<BFloat16> = emu::Operand::bf16;

template <class T>
SORA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] SORA_AND_SITE) {
  static_assert(sizeof(T) == 2, "Half or BFloat16");
  emu::mma(kOperand<T>, d, a, b, site);
}
SORA_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] SORA_AND_SITE) {
  emu::mma(emu::Operand::tf32, d, a, b, site);
}

#else

SORA_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

SORA_DEVICE void ldmatrix_x1(uint32_t (&r)[1], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
}
SORA_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
SORA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
SORA_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
SORA_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Not volatile: a pure function of registers, which the compiler may schedule among the loads.
#define SORA_MMA(SHAPE, TYPE)                                 \
  asm("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "             \
      "{%8, %9}, {%0, %1, %2, %3};"                           \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
SORA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
SORA_DEVICE void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  SORA_MMA("m16n8k16", "f16");
}
template <>
SORA_DEVICE void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  SORA_MMA("m16n8k16", "bf16");
}
SORA_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  SORA_MMA("m16n8k8", "tf32");
}
#undef SORA_MMA

#endif

}  // namespace sora
