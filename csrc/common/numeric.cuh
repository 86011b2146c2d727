// Element types: conversion to and from float, packs of 16 bytes, and the choice of a type by its code.
#pragma once

#include "cuda.h"

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// N neighbours, moved as one: a warp that moves 16 bytes a thread reaches the bandwidth of memory. Wider ones (floats
// beside packs of half as many bytes) are moved in such parts.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load(const T* from, int64_t pack) {
  return reinterpret_cast<const Pack<T, N>*>(from)[pack];
}

template <typename T, int N>
__device__ __forceinline__ void store(T* to, int64_t pack, const Pack<T, N>& value) {
  reinterpret_cast<Pack<T, N>*>(to)[pack] = value;
}

// Hides a pack's values from the compiler, which else keeps the floats that it has made of them, in twice the
// registers, until they are used again. No instruction comes of it.
template <typename T, int N>
__device__ __forceinline__ void forget(Pack<T, N>& pack) {
  unsigned* const words = reinterpret_cast<unsigned*>(&pack);
#pragma unroll
  for (int i = 0; i < int(sizeof(pack) / sizeof(unsigned)); ++i) asm("" : "+r"(words[i]));
}

template <typename T>
struct Type {
  using type = T;
  static constexpr int pack = 16 / sizeof(T);
};

template <int N>
struct Width {
  static constexpr int value = N;
};

constexpr int kUnknownType = -1;

// f(Type<T>) for the type that `code` names; the codes stand in engine/kernels/library.py too.
template <typename F>
int with_type(int64_t code, F f) {
  switch (code) {
    case 0: return f(Type<float>{});
    case 1: return f(Type<__half>{});
    case 2: return f(Type<__nv_bfloat16>{});
    default: return kUnknownType;
  }
}

// f(Width<N>) with whole packs where sizes and addresses allow them, else with single elements.
template <typename T, typename F>
int with_width(bool packed, F f) {
  if (packed) return f(Width<Type<T>::pack>{});
  return f(Width<1>{});
}

template <typename... P>
bool aligned(P... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);  // null is aligned
}

// Blocks of a launch that takes so many rows a block; they stride where there are more than a grid may have.
inline unsigned blocks_for(int64_t rows, int64_t rows_a_block = 1) {
  const int64_t blocks = (rows + rows_a_block - 1) / rows_a_block;
  return static_cast<unsigned>(blocks < (1 << 30) ? blocks : (1 << 30));
}
