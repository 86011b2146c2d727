// Rotary embedding of queries and keys in one launch, from the position of each row; defined by kernels/rope.py.
//
// A block takes so many rows that each of its threads has kKept packs to turn, and asks for them first. While they are
// on their way it works out the rows' angles, in fp32, once for all heads. Inputs may be slices of one projection (any
// strides between rows and heads); outputs are dense. The backward pass is the same rotation, turned back. Bytes per
// bf16 element: 4.
#include "common/numeric.cuh"
#include "common/reduce.cuh"

namespace {

constexpr int kKept = 2;
constexpr int kMaxThreads = 288;

// Where the n-th pack of a block lies: in which row of its tile, in which head, and which of the head's.
struct Place {
  int row, head, pack;
};

__device__ __forceinline__ Place place_of(int n, int heads, int packs) {
  const int head = n / packs;
  return {head / heads, head % heads, n % packs};
}

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads, 3) rotate(
    const T* __restrict__ q, const T* __restrict__ k, const int64_t* __restrict__ positions,
    const float* __restrict__ frequencies, T* __restrict__ q_out, T* __restrict__ k_out, int64_t rows, int q_heads,
    int k_heads, int half, int64_t q_row, int64_t q_head, int64_t k_row, int64_t k_head, float direction, int tile) {
  SHARED_MEMORY(float, cosines);
  float* const sines = cosines + tile * half;
  const int packs = half / N, heads = q_heads + k_heads;
  for (int64_t first = int64_t(blockIdx.x) * tile; first < rows; first += int64_t(gridDim.x) * tile) {
    const int here = rows - first < tile ? int(rows - first) : tile, count = here * heads * packs;
    for (int begin = 0; begin < count; begin += kKept * blockDim.x) {
      Pack<T, N> kept_first[kKept], kept_second[kKept];
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int n = begin + i * blockDim.x + threadIdx.x;
        if (n >= count) continue;
        const auto [in_tile, head, pack] = place_of(n, heads, packs);
        const int64_t row = first + in_tile;
        const T* const from = head < q_heads ? q + row * q_row + head * q_head
                                             : k + row * k_row + (head - q_heads) * k_head;
        kept_first[i] = load<T, N>(from, pack);
        kept_second[i] = load<T, N>(from + half, pack);
      }
      if (begin == 0) {
        for (int i = threadIdx.x; i < here * half; i += blockDim.x) {
          float sine, cosine;
          sincosf(static_cast<float>(positions[first + i / half]) * frequencies[i % half], &sine, &cosine);
          cosines[i] = cosine;
          sines[i] = sine * direction;
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int n = begin + i * blockDim.x + threadIdx.x;
        if (n >= count) continue;
        const auto [in_tile, head, pack] = place_of(n, heads, packs);
        const int64_t row = first + in_tile;
        const int angles = in_tile * packs + pack;
        T* const to = head < q_heads ? q_out + (row * q_heads + head) * 2 * half
                                     : k_out + (row * k_heads + head - q_heads) * 2 * half;
        const Pack<float, N> cosine = load<float, N>(cosines, angles), sine = load<float, N>(sines, angles);
        Pack<T, N> out_first, out_second;
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const float a = to_float(kept_first[i].at[e]), b = to_float(kept_second[i].at[e]);
          out_first.at[e] = from_float<T>(a * cosine.at[e] - b * sine.at[e]);
          out_second.at[e] = from_float<T>(b * cosine.at[e] + a * sine.at[e]);
        }
        store<T, N>(to, pack, out_first);
        store<T, N>(to + half, pack, out_second);
      }
    }
    __syncthreads();  // the next rows write the table again
  }
}

// Rows of a block: so many that they are whole warps' work, as far as a block reaches. 16 + 2 heads of 128 are 144 packs
// a row, and 4 rows the work of 9 warps.
int tile_for(int64_t packs_a_row) {
  int tile = 1;
  while (tile * packs_a_row % (kKept * kWarp) && 2 * tile * packs_a_row <= kKept * kMaxThreads) tile *= 2;
  return tile;
}

// As few passes over the tile as a block's threads allow, and as few threads as these need.
int threads_for(int64_t packs) {
  const int64_t passes = (packs + kKept * kMaxThreads - 1) / (kKept * kMaxThreads), shares = passes * kKept * kWarp;
  return int((packs + shares - 1) / shares * kWarp);
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
      const int64_t packs_a_row = (q_heads + k_heads) * half / N;
      const int tile = tile_for(packs_a_row);
      const size_t bytes = 2 * tile * half * sizeof(float);
      LAUNCH((rotate<T, N>), blocks_for(rows, tile), threads_for(tile * packs_a_row), bytes, stream, (const T*)q,
             (const T*)k, (const int64_t*)positions, (const float*)frequencies, (T*)q_out, (T*)k_out, rows,
             int(q_heads), int(k_heads), int(half), q_row, q_head, k_row, k_head, float(direction), tile);
      return int(cudaGetLastError());
    });
  });
}
