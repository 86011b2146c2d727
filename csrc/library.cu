// What the library says of itself: the sources it was built from, and the meaning of an error code.
#include "common/cuda.h"

extern "C" __attribute__((visibility("default"))) const char* paralign_sources() { return PARALIGN_SOURCES; }

extern "C" __attribute__((visibility("default"))) const char* paralign_error(int code) {
  return code < 0 ? "an element type that no kernel was built for" : cudaGetErrorString(static_cast<cudaError_t>(code));
}
