// SwiGLU over rows [gate | up], forward and backward; the definition is kernels/swiglu.py.
//
// The backward pass reads the same input again, so nothing is kept beside it. Bytes per bf16 element of the
// output: 6 forward, 10 backward.
#include "common/numeric.cuh"

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) forward(const T* gate_up, T* out, int64_t rows, int width) {
  const int packs = width / N;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int pack = threadIdx.x; pack < packs; pack += blockDim.x) {
      const Pack<T, N> gate = load<T, N>(gate_up, 2 * row * packs + pack);
      const Pack<T, N> up = load<T, N>(gate_up, (2 * row + 1) * packs + pack);
      Pack<T, N> product;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float g = to_float(gate.at[e]);
        product.at[e] = from_float<T>(g * sigmoid(g) * to_float(up.at[e]));
      }
      store<T, N>(out, row * packs + pack, product);
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) backward(
    const T* gate_up, const T* dout, T* dgate_up, int64_t rows, int width) {
  const int packs = width / N;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int pack = threadIdx.x; pack < packs; pack += blockDim.x) {
      const Pack<T, N> gate = load<T, N>(gate_up, 2 * row * packs + pack);
      const Pack<T, N> up = load<T, N>(gate_up, (2 * row + 1) * packs + pack);
      const Pack<T, N> gradient = load<T, N>(dout, row * packs + pack);
      Pack<T, N> dgate, dup;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float g = to_float(gate.at[e]), d = to_float(gradient.at[e]), s = sigmoid(g);
        dgate.at[e] = from_float<T>(d * to_float(up.at[e]) * s * (1.0f + g * (1.0f - s)));
        dup.at[e] = from_float<T>(d * g * s);
      }
      store<T, N>(dgate_up, 2 * row * packs + pack, dgate);
      store<T, N>(dgate_up, (2 * row + 1) * packs + pack, dup);
    }
  }
}

}  // namespace

EXPORT paralign_swiglu_forward(const void* gate_up, void* out, int64_t rows, int64_t width, int64_t type, void* stream) {
  return with_type(type, [&](auto chosen) {
    using T = typename decltype(chosen)::type;
    return with_width<T>(width % Type<T>::pack == 0 && aligned(gate_up, out), [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      LAUNCH((forward<T, N>), blocks_for(rows), kThreads, 0, stream, (const T*)gate_up, (T*)out, rows, int(width));
      return int(cudaGetLastError());
    });
  });
}

EXPORT paralign_swiglu_backward(const void* gate_up, const void* dout, void* dgate_up, int64_t rows, int64_t width,
                                int64_t type, void* stream) {
  return with_type(type, [&](auto chosen) {
    using T = typename decltype(chosen)::type;
    return with_width<T>(width % Type<T>::pack == 0 && aligned(gate_up, dout, dgate_up), [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      LAUNCH((backward<T, N>), blocks_for(rows), kThreads, 0, stream, (const T*)gate_up, (const T*)dout, (T*)dgate_up,
             rows, int(width));
      return int(cudaGetLastError());
    });
  });
}
