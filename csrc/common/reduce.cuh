// Sums and maxima over a warp and over a block, in an order that never changes.
#pragma once

#include "cuda.h"

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// The sum over each `team` of neighbouring threads, a power of two below a warp or whole warps, on every thread of it.
// `scratch`: kWarp floats of shared memory; the block has whole warps, and all of them come here.
__device__ __forceinline__ float team_sum(float x, int team, float* scratch) {
  if (team < kWarp) {
    for (int step = team / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = team / kWarp;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? scratch[warp / warps * warps + lane] : 0.0f);
  __syncthreads();  // the caller may use scratch again
  return x;
}

__device__ __forceinline__ float block_sum(float x, float* scratch) { return team_sum(x, blockDim.x, scratch); }

__device__ __forceinline__ float block_max(float x, float* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x = warp_max(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = warp_max(scratch[lane < static_cast<int>(blockDim.x) / kWarp ? lane : 0]);
  __syncthreads();
  return x;
}
