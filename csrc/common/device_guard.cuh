// Makes a device current for one call.
#pragma once

#if !defined(SORA_HOST_EMULATION)
#include <cuda_runtime.h>
#endif

namespace sora {

#if defined(SORA_HOST_EMULATION)

// The emulation is its only device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  int error() const { return 0; }
};

#else

// The runtime is linked statically, so the current device is not the one that torch has set.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

#endif

}  // namespace sora
