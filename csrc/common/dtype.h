// Element types as they cross from Python: one int, because no torch header is seen here.
#pragma once

namespace sora {

enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

}  // namespace sora
