// Rotary embedding of queries and keys in one launch, from the position of each row; defined by kernels/rope.py.
//
// A block takes one row: its angles are computed once, in fp32, and serve every head. Inputs may be slices of one
// projection (any strides between rows and heads); outputs are dense. The backward pass is the same rotation,
// turned back. Bytes per bf16 element: 4.
#include "common/numeric.cuh"

namespace {

constexpr int kThreads = 256;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) rotate(
    const T* q, const T* k, const int64_t* positions, const float* frequencies, T* q_out, T* k_out, int64_t rows,
    int q_heads, int k_heads, int half, int64_t q_row, int64_t q_head, int64_t k_row, int64_t k_head, float direction) {
  SHARED_MEMORY(float, cosines);
  float* const sines = cosines + half;
  const int packs = half / N, heads = q_heads + k_heads;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
      float sine, cosine;
      sincosf(static_cast<float>(positions[row]) * frequencies[i], &sine, &cosine);
      cosines[i] = cosine;
      sines[i] = sine * direction;
    }
    __syncthreads();
    for (int work = threadIdx.x; work < heads * packs; work += blockDim.x) {
      const int head = work / packs, pack = work % packs;
      const bool is_query = head < q_heads;
      const int own = is_query ? head : head - q_heads;
      const T* const from = is_query ? q + row * q_row + own * q_head : k + row * k_row + own * k_head;
      T* const to = (is_query ? q_out + row * q_heads * 2 * half : k_out + row * k_heads * 2 * half) + own * 2 * half;
      const Pack<T, N> first = load<T, N>(from, pack), second = load<T, N>(from + half, pack);
      Pack<T, N> out_first, out_second;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float a = to_float(first.at[e]), b = to_float(second.at[e]);
        const float cosine = cosines[pack * N + e], sine = sines[pack * N + e];
        out_first.at[e] = from_float<T>(a * cosine - b * sine);
        out_second.at[e] = from_float<T>(b * cosine + a * sine);
      }
      store<T, N>(to, pack, out_first);
      store<T, N>(to + half, pack, out_second);
    }
    __syncthreads();  // the next row writes the table again
  }
}

}  // namespace

EXPORT paralign_rope(const void* q, const void* k, const void* positions, const void* frequencies, void* q_out,
                     void* k_out, int64_t rows, int64_t q_heads, int64_t k_heads, int64_t half, int64_t q_row,
                     int64_t q_head, int64_t k_row, int64_t k_head, double direction, int64_t type, void* stream) {
  return with_type(type, [&](auto chosen) {
    using T = typename decltype(chosen)::type;
    constexpr int whole = Type<T>::pack;
    const bool packed = half % whole == 0 && q_row % whole == 0 && q_head % whole == 0 && k_row % whole == 0 &&
                        k_head % whole == 0 && aligned(q, k, q_out, k_out);
    return with_width<T>(packed, [&](auto width) {
      constexpr int N = decltype(width)::value;
      LAUNCH((rotate<T, N>), blocks_for(rows), kThreads, 2 * half * sizeof(float), stream, (const T*)q, (const T*)k,
             (const int64_t*)positions, (const float*)frequencies, (T*)q_out, (T*)k_out, rows, int(q_heads),
             int(k_heads), int(half), q_row, q_head, k_row, k_head, float(direction));
      return int(cudaGetLastError());
    });
  });
}
