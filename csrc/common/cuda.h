// The one include of every kernel file: CUDA's own headers, or the tests' stand-in for a plain C++ compiler.
// It owns the two spellings that differ between them: dynamic shared memory, and a launch.
//
// Kernels keep to what the stand-in runs (tests/csrc/on_cpu.h): no inline PTX, no TMA, shuffles of whole warps,
// and shared memory only through SHARED_MEMORY, so that the tests can poison it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED_MEMORY(type, name)                                \
  extern __shared__ __align__(16) unsigned char shared_bytes_[]; \
  type* const name = reinterpret_cast<type*>(shared_bytes_)

#define LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

#else
#include "on_cpu.h"
#endif

// Functions that Python calls: only pointers, int64_t and double, so that ctypes needs no signatures.
#define EXPORT extern "C" __attribute__((visibility("default"))) int
