// Lets a plain C++ compiler build the shipped .cu files, so that they are tested where there is no GPU.
//
// Blocks run one after another. The threads of a block are fibers of one thread of the machine: each runs until it
// meets a barrier or a shuffle, then the next one does. In what order is chosen (forward, reverse, random): a
// result that depends on it lacks a barrier. Shared memory starts as NaN. A barrier that some threads never reach,
// and a shuffle that some lanes never reach, end the launch with an error, as does an impossible configuration, more
// than 48 KiB of shared memory that nobody has asked for, and a device that is set to have no code.
// Not covered: inline PTX, tensor cores, TMA, asynchronous copies, clusters, static __shared__ variables, shuffles of
// part of a warp, and races between blocks.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED_MEMORY(type, name) type* const name = reinterpret_cast<type*>(on_cpu::device.shared)
#define LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  ((void)(stream), on_cpu::launch(kernel, grid, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }))

using cudaError_t = int;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaDevAttrMultiProcessorCount = 16;

namespace on_cpu {

constexpr unsigned kLanes = 32, kMaxThreads = 1024, kThreadsAtOnce = 2048;
constexpr size_t kUnasked = 48 * 1024, kMaxShared = 227 * 1024, kStack = 64 * 1024;

enum class Order { forward, reverse, random };
enum class At { running, barrier, shuffle, part_of_a_warp, end };
struct Index {
  unsigned x = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  At at;
  Index index;
  unsigned exchanges;
};

struct Device {
  std::vector<Thread> threads;
  std::vector<uint64_t> slots;  // two for each thread, used in turn: a fast lane may be one shuffle ahead
  std::function<void()> kernel;
  ucontext_t scheduler;
  Thread* current = nullptr;
  Index grid, block, block_index;
  unsigned char* shared = nullptr;
  Order order = Order::forward;
  unsigned last_blocks = ~0u;  // how many of a launch's blocks run, its last ones
  int processors = 1;
  bool has_code = true;
  std::map<const void*, size_t> asked;  // shared memory, by kernel
  std::mt19937 random{0};
  const char* error = nullptr;
};
inline Device device;

inline void wait(At what) {
  device.current->at = what;
  swapcontext(&device.current->context, &device.scheduler);
}

inline void run_thread() {
  device.kernel();
  wait(At::end);
}

inline void start_threads(unsigned count) {
  if (device.threads.size() < count) device.threads.resize(count);
  device.slots.assign(2 * count, 0);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = device.threads[i];
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    thread.at = At::running;
    thread.index.x = i;
    thread.exchanges = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
}

// Frees the lanes of a warp that waits at a shuffle with all its lanes; false if it does not.
inline bool finish_shuffle(unsigned first, unsigned count) {
  const unsigned end = first + kLanes;
  for (unsigned i = first; i < end; ++i)
    if (i >= count || device.threads[i].at != At::shuffle) return false;
  for (unsigned i = first; i < end; ++i) device.threads[i].at = At::running;
  return true;
}

// Runs every thread of a warp to its next wait.
inline void run_warp(const std::vector<unsigned>& lanes, unsigned first, unsigned count) {
  for (unsigned lane : lanes) {
    if (first + lane >= count || device.threads[first + lane].at != At::running) continue;
    device.current = &device.threads[first + lane];
    swapcontext(&device.scheduler, &device.current->context);
  }
}

inline std::vector<unsigned> in_turn(unsigned count) {
  std::vector<unsigned> turn(count);
  for (unsigned i = 0; i < count; ++i) turn[i] = device.order == Order::reverse ? count - 1 - i : i;
  if (device.order == Order::random) std::shuffle(turn.begin(), turn.end(), device.random);
  return turn;
}

inline const char* run_block(unsigned count, size_t shared_bytes) {
  // Its own allocation, of exactly this size, so that a sanitizer sees what runs past it.
  std::unique_ptr<float[]> shared(new float[(shared_bytes + 3) / 4]);
  device.shared = reinterpret_cast<unsigned char*>(shared.get());
  std::memset(device.shared, 0xff, shared_bytes);
  start_threads(count);
  for (;;) {
    bool shuffled = false;
    for (unsigned warp : in_turn((count + kLanes - 1) / kLanes)) {
      run_warp(in_turn(kLanes), warp * kLanes, count);
      // Forward, warps go in step; in the other orders one runs ahead of the rest until a barrier holds it.
      while (finish_shuffle(warp * kLanes, count)) {
        shuffled = true;
        if (device.order == Order::forward) break;
        run_warp(in_turn(kLanes), warp * kLanes, count);
      }
    }
    if (shuffled) continue;
    unsigned ended = 0, at_barrier = 0;
    for (unsigned i = 0; i < count; ++i) {
      if (device.threads[i].at == At::part_of_a_warp) return "a shuffle of part of a warp, which is not covered";
      ended += device.threads[i].at == At::end;
      at_barrier += device.threads[i].at == At::barrier;
    }
    if (ended == count) return nullptr;
    if (at_barrier < count) return at_barrier ? "a barrier that not every thread reaches" : "a shuffle that not every lane reaches";
    for (unsigned i = 0; i < count; ++i) device.threads[i].at = At::running;
  }
}

template <typename K>
size_t allowed(K* kernel) {
  const auto asked = device.asked.find(reinterpret_cast<const void*>(kernel));
  return asked == device.asked.end() ? kUnasked : asked->second;
}

template <typename K, typename F>
void launch(K* which, unsigned grid, unsigned threads, size_t shared_bytes, F kernel) {
  device.error = nullptr;
  if (grid == 0 || threads == 0 || threads > kMaxThreads || shared_bytes > allowed(which))
    device.error = "an invalid launch configuration";
  if (!device.has_code) device.error = "no kernel image is available for execution on the device";
  if (device.error) return;
  device.grid.x = grid;
  device.block.x = threads;
  device.kernel = kernel;
  device.block_index.x = grid > device.last_blocks ? grid - device.last_blocks : 0;
  for (; device.block_index.x < grid && !device.error; ++device.block_index.x)
    device.error = run_block(threads, shared_bytes);
}

template <typename T>
T exchange(unsigned mask, T value, unsigned from_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a slot holds 8 bytes");
  Thread& me = *device.current;
  if (mask != 0xffffffffu) wait(At::part_of_a_warp);  // which nothing ends
  const unsigned warp = me.index.x / kLanes * kLanes, turn = me.exchanges++ % 2;
  std::memcpy(&device.slots[2 * me.index.x + turn], &value, sizeof(T));
  wait(At::shuffle);
  std::memcpy(&value, &device.slots[2 * (warp + from_lane % kLanes) + turn], sizeof(T));
  return value;
}

}  // namespace on_cpu

#define threadIdx (on_cpu::device.current->index)
#define blockIdx (on_cpu::device.block_index)
#define blockDim (on_cpu::device.block)
#define gridDim (on_cpu::device.grid)

inline void __syncthreads() { on_cpu::wait(on_cpu::At::barrier); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return on_cpu::exchange(mask, value, on_cpu::device.current->index.x % on_cpu::kLanes ^ lanes);
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }

inline int cudaGetLastError() { return on_cpu::device.error ? 1 : 0; }
inline const char* cudaGetErrorString(int) { return on_cpu::device.error ? on_cpu::device.error : "shared memory"; }
template <typename K>
int cudaFuncSetAttribute(K* kernel, int, int bytes) {
  if (bytes > static_cast<int>(on_cpu::kMaxShared)) return 2;
  on_cpu::device.asked[reinterpret_cast<const void*>(kernel)] = std::max(size_t(bytes), on_cpu::kUnasked);
  return 0;
}
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, int, int) { return *value = on_cpu::device.processors, 0; }
// Of what bounds it on a GPU, registers are missing here.
template <typename K>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, K* kernel, int threads, size_t bytes) {
  const bool fits = bytes <= on_cpu::allowed(kernel);
  *blocks = fits ? int(std::min(size_t(on_cpu::kThreadsAtOnce / threads), on_cpu::kMaxShared / std::max(bytes, size_t(1)))) : 0;
  return 0;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __bfloat162float(__nv_bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = bits_of(x);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  const float size = exponent ? ldexpf(float(1024 + fraction), int(exponent) - 25) : ldexpf(float(fraction), -24);
  return float_of(bits_of(size) | sign);
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
  if (x != x) return {0x7fff};
  const float size = fabsf(x);
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  if (size < 6.103515625e-05f) return {uint16_t(sign | uint16_t(nearbyintf(size * 16777216.0f)))};  // subnormal: 2⁻²⁴
  const uint32_t bits = bits_of(size);
  return {uint16_t(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)))};
}
