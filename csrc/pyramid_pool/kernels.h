// The kernels of the instruction set that SORA_ISA and SORA_VECTOR_BYTES name (see common/simd.h). On x86-64 the
// includer has seen <immintrin.h>.
#include "backward.h"
#include "forward.h"

namespace sora {
namespace SORA_ISA {

template <class Element>
void forward(const PyramidPoolForward& args, const PoolGeometry& geometry, const PoolScratch& scratch, int64_t b,
             int64_t c) {
  Forward<Element>(args, geometry, scratch, b, c).run();
}

template <class Element>
void backward(const PyramidPoolBackward& args, const PoolGeometry& geometry, const PoolScratch& scratch, int64_t b,
              int64_t c) {
  Backward<Element>(args, geometry, scratch, b, c).run();
}

template <class Element>
constexpr PoolKernels kKernels = {Pooled<Element>::lanes, SORA_VECTOR_BYTES,
                                  !std::is_same_v<Element, typename Pooled<Element>::State>, forward<Element>,
                                  backward<Element>};

inline const PoolKernels* kernels_for(DType dtype) {
  switch (dtype) {
    case DType::float32: return &kKernels<float>;
    case DType::float64: return &kKernels<double>;
    case DType::bfloat16: return &kKernels<BFloat16>;
    case DType::float16: break;
  }
  return nullptr;
}

}  // namespace SORA_ISA
}  // namespace sora
