#pragma once

namespace sora {

// Versions as CUDA writes them: 1000 * major + 10 * minor. Neither creates a context.
int cuda_runtime_version();
// The newest CUDA that the installed driver supports; 0 if there is no driver.
int cuda_driver_version();

}  // namespace sora
