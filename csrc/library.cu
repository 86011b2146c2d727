// What the library says of itself: the sources it was built from, whether this device and its driver take its code,
// and the meaning of an error code.
#include "common/cuda.h"

namespace {

__global__ void nothing() {}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* paralign_sources() { return PARALIGN_SOURCES; }

// All kernels are built for the same architectures: where this one starts, the others do.
EXPORT paralign_trial(void* stream) {
  LAUNCH(nothing, 1, 1, 0, stream);
  return int(cudaGetLastError());
}

extern "C" __attribute__((visibility("default"))) const char* paralign_error(int code) {
  return code < 0 ? "an element type that no kernel was built for" : cudaGetErrorString(static_cast<cudaError_t>(code));
}
