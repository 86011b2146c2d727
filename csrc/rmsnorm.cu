// RMSNorm, alone or after a residual addition, forward and backward; the definition is kernels/rms_norm.py.
//
// A team of threads takes a row, so that a block takes one row of 8192 bf16 elements at once, or 64 rows of 128. Each
// thread keeps its first kKept packs of the row in registers: memory is read once, and all that is kept is asked for
// before the first of it is used. Longer rows are read again, from cache. Bytes per bf16 element: 4 forward and 6
// backward, with the residual 8 and 8.
#include <algorithm>

#include "common/numeric.cuh"
#include "common/reduce.cuh"

namespace {

constexpr int kKept = 4;
constexpr int kMaxThreads = 256;

// Threads that share a row: a power of two up to a warp, or whole warps up to a block.
int team_for(int packs) {
  const int wanted = (packs + kKept - 1) / kKept;
  if (wanted > kWarp) return wanted < kMaxThreads ? (wanted + kWarp - 1) / kWarp * kWarp : kMaxThreads;
  int team = 1;
  while (team < wanted) team *= 2;
  return team;
}

// A block of as many whole teams as it may have.
int threads_for(int team) { return kMaxThreads / team * team; }

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> add(const Pack<T, N>& x, const Pack<T, N>& y) {
  Pack<T, N> sum;
#pragma unroll
  for (int e = 0; e < N; ++e) sum.at[e] = from_float<T>(to_float(x.at[e]) + to_float(y.at[e]));
  return sum;
}

template <typename T, int N>
__device__ __forceinline__ float squares(const Pack<T, N>& row) {
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < N; ++e) total += to_float(row.at[e]) * to_float(row.at[e]);
  return total;
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> normed(const Pack<T, N>& row, const Pack<T, N>& weight, float rstd) {
  Pack<T, N> out;
#pragma unroll
  for (int e = 0; e < N; ++e) out.at[e] = from_float<T>(to_float(row.at[e]) * rstd * to_float(weight.at[e]));
  return out;
}

// With the residual, x + residual is rounded to T and written out, as the unfused pair of operations does.
template <typename T, int N, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads, kResidual ? 3 : 4) forward(
    const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ weight, T* __restrict__ y,
    T* __restrict__ sum, float* __restrict__ rstd_out, int64_t rows, int hidden, int team, float eps) {
  SHARED_MEMORY(float, scratch);
  const int packs = hidden / N, teams = blockDim.x / team, lane = threadIdx.x % team;
  for (int64_t first = int64_t(blockIdx.x) * teams; first < rows; first += int64_t(gridDim.x) * teams) {
    const int64_t row = first + threadIdx.x / team, start = row * packs;
    const int end = row < rows ? packs : 0;  // a team without a row comes to every barrier, with nothing
    Pack<T, N> kept[kKept], other[kKept];
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int pack = lane + k * team;
      if (pack >= end) continue;
      kept[k] = load<T, N>(x, start + pack);
      if constexpr (kResidual) other[k] = load<T, N>(residual, start + pack);
    }
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int pack = lane + k * team;
      if (pack >= end) continue;
      if constexpr (kResidual) {
        kept[k] = add(kept[k], other[k]);
        store<T, N>(sum, start + pack, kept[k]);
      }
      total += squares(kept[k]);
      forget(kept[k]);
    }
    for (int pack = lane + kKept * team; pack < end; pack += team) {
      Pack<T, N> part = load<T, N>(x, start + pack);
      if constexpr (kResidual) {
        part = add(part, load<T, N>(residual, start + pack));
        store<T, N>(sum, start + pack, part);
      }
      total += squares(part);
    }
    const float rstd = rsqrtf(team_sum(total, team, scratch) / hidden + eps);
    if (lane == 0 && row < rows) rstd_out[row] = rstd;
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int pack = lane + k * team;
      if (pack >= end) continue;
      store<T, N>(y, start + pack, normed(kept[k], load<T, N>(weight, pack), rstd));
    }
    for (int pack = lane + kKept * team; pack < end; pack += team) {
      const Pack<T, N> part = load<T, N>(kResidual ? sum : x, start + pack);
      store<T, N>(y, start + pack, normed(part, load<T, N>(weight, pack), rstd));
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ float weighted_dot(const Pack<T, N>& x, const Pack<T, N>& dy, const Pack<T, N>& weight) {
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < N; ++e) total += to_float(x.at[e]) * to_float(dy.at[e]) * to_float(weight.at[e]);
  return total;
}

// One pack of dx; its share of the weight's gradient is added to dweight, where elements lie `stride` apart.
template <bool kSumGrad, typename T, int N>
__device__ __forceinline__ Pack<T, N> gradient(
    const Pack<T, N>& x, const Pack<T, N>& dy, const Pack<T, N>& dsum, const Pack<T, N>& weight, float rstd,
    float projection, float* dweight, int stride) {
  Pack<T, N> out;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float xe = to_float(x.at[e]), de = to_float(dy.at[e]);
    float dx = rstd * de * to_float(weight.at[e]) - projection * xe;
    if constexpr (kSumGrad) dx += to_float(dsum.at[e]);
    out.at[e] = from_float<T>(dx);
    dweight[e * stride] += de * xe * rstd;
  }
  return out;
}

// dx = rstd·w·dy − x·rstd³·mean(w·dy·x) (+ dsum). Each thread adds up dweight over its rows in shared memory, its own
// columns only, of which neighbouring threads find theirs in neighbouring banks. A block writes one row of `partial`,
// its teams added up in order: no atomics, so the result never changes.
// Where a pack has been used, the same pack of the next row is asked for, so that memory is never idle for long even
// where a multiprocessor has one block.
template <typename T, int N, bool kSumGrad>
__global__ void __launch_bounds__(kMaxThreads, 2) backward(
    const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ dy, const T* __restrict__ dsum,
    const float* __restrict__ rstd_in, T* __restrict__ dx, float* __restrict__ partial, int64_t rows, int hidden,
    int team) {
  SHARED_MEMORY(float, scratch);
  const int packs = hidden / N, teams = blockDim.x / team, lane = threadIdx.x % team, stride = blockDim.x;
  float* const dweight = scratch + kWarp;
  float* const own = dweight + threadIdx.x;
  for (int pack = lane; pack < packs; pack += team)
    for (int e = 0; e < N; ++e) own[(pack / team * N + e) * stride] = 0.0f;

  Pack<T, N> kept_x[kKept], kept_dy[kKept], kept_dsum[kKept];
  const auto keep = [&](int64_t row, int k) {
    const int pack = lane + k * team;
    if (row >= rows || pack >= packs) return;
    kept_x[k] = load<T, N>(x, row * packs + pack);
    kept_dy[k] = load<T, N>(dy, row * packs + pack);
    if constexpr (kSumGrad) kept_dsum[k] = load<T, N>(dsum, row * packs + pack);
  };
  const int64_t step = int64_t(gridDim.x) * teams;
  int64_t row = int64_t(blockIdx.x) * teams + threadIdx.x / team;
#pragma unroll
  for (int k = 0; k < kKept; ++k) keep(row, k);
  float next_rstd = row < rows ? rstd_in[row] : 0.0f;
  for (int64_t first = int64_t(blockIdx.x) * teams; first < rows; first += step, row += step) {
    const int64_t start = row * packs;
    const int end = row < rows ? packs : 0;
    const float rstd = next_rstd;
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int pack = lane + k * team;
      if (pack >= end) continue;
      total += weighted_dot(kept_x[k], kept_dy[k], load<T, N>(weight, pack));
      forget(kept_x[k]);
      forget(kept_dy[k]);
    }
    for (int pack = lane + kKept * team; pack < end; pack += team)
      total += weighted_dot(load<T, N>(x, start + pack), load<T, N>(dy, start + pack), load<T, N>(weight, pack));
    const float projection = team_sum(total, team, scratch) * rstd * rstd * rstd / hidden;
    if (row + step < rows) next_rstd = rstd_in[row + step];
    const auto write = [&](const Pack<T, N>& part_x, const Pack<T, N>& part_dy, const Pack<T, N>& part_dsum, int pack) {
      const Pack<T, N> w = load<T, N>(weight, pack);
      store<T, N>(dx, start + pack, gradient<kSumGrad>(part_x, part_dy, part_dsum, w, rstd, projection,
                                                       own + pack / team * N * stride, stride));
    };
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int pack = lane + k * team;
      if (pack < end) write(kept_x[k], kept_dy[k], kept_dsum[k], pack);
      keep(row + step, k);
    }
    for (int pack = lane + kKept * team; pack < end; pack += team) {
      Pack<T, N> more;
      if constexpr (kSumGrad) more = load<T, N>(dsum, start + pack);
      write(load<T, N>(x, start + pack), load<T, N>(dy, start + pack), more, pack);
    }
  }
  __syncthreads();  // before what other teams have added up is read
  for (int pack = threadIdx.x; pack < packs; pack += stride) {
    Pack<float, N> total = {};
    for (int place = pack % team; place < stride; place += team) {
#pragma unroll
      for (int e = 0; e < N; ++e) total.at[e] += dweight[(pack / team * N + e) * stride + place];
    }
    store<float, N>(partial + int64_t(blockIdx.x) * hidden, pack, total);
  }
}

}  // namespace

EXPORT paralign_rms_norm_forward(const void* x, const void* residual, const void* weight, void* y, void* sum, void* rstd,
                                 int64_t rows, int64_t hidden, double eps, int64_t type, void* stream) {
  return with_type(type, [&](auto chosen) {
    using T = typename decltype(chosen)::type;
    const bool packed = hidden % Type<T>::pack == 0 && aligned(x, residual, weight, y, sum);
    return with_width<T>(packed, [&](auto width) {
      constexpr int N = decltype(width)::value;
      const auto kernel = residual ? forward<T, N, true> : forward<T, N, false>;
      const int team = team_for(int(hidden / N)), threads = threads_for(team);
      LAUNCH(kernel, blocks_for(rows, threads / team), threads, kWarp * sizeof(float), stream, (const T*)x,
             (const T*)residual, (const T*)weight, (T*)y, (T*)sum, (float*)rstd, rows, int(hidden), team, float(eps));
      return int(cudaGetLastError());
    });
  });
}

namespace {

// f(type, kernel, team, threads, bytes of shared memory) for the backward pass over such rows.
template <typename F>
int with_backward(const void* x, const void* weight, const void* dy, const void* dsum, const void* dx, int64_t hidden,
                  int64_t type, F f) {
  return with_type(type, [&](auto chosen) {
    using T = typename decltype(chosen)::type;
    const bool packed = hidden % Type<T>::pack == 0 && aligned(x, weight, dy, dsum, dx);
    return with_width<T>(packed, [&](auto width) {
      constexpr int N = decltype(width)::value;
      const auto kernel = dsum ? backward<T, N, true> : backward<T, N, false>;
      const int packs = int(hidden / N), team = team_for(packs), threads = threads_for(team);
      const int bytes = (kWarp + (packs + team - 1) / team * N * threads) * int(sizeof(float));
      // Beyond 48 KiB shared memory must be asked for; where the device has less, this is the error.
      const auto refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      return refused ? int(refused) : f(chosen, kernel, team, threads, bytes);
    });
  });
}

}  // namespace

// How many blocks to run the backward pass with: no more than run at once on this device, and no more than have rows.
//
// A block costs 8 bytes a column for its row of `partial`, written and read, where a bf16 row costs 6. With
// kRowsABlock rows each that is 8/96, 8% of the traffic at most. Fewer rows are given to a block where
// multiprocessors would stay idle: 2048 rows of 8192 on 132 of them take 132 blocks, whose 8.7 MB are 9% of 101 MB
// (with four blocks each it was 34%); at 1024 rows it is 17%.
EXPORT paralign_rms_norm_backward_blocks(const void* x, const void* weight, const void* dy, const void* dsum,
                                         const void* dx, int64_t rows, int64_t hidden, int64_t type, int64_t* blocks) {
  constexpr int64_t kRowsABlock = 16;
  return with_backward(x, weight, dy, dsum, dx, hidden, type, [&](auto, auto kernel, int team, int threads, int bytes) {
    int device = 0, processors = 0, on_each = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const auto failed = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_each, kernel, threads, bytes);
    const int64_t with_rows = blocks_for(rows, threads / team), worth = std::max<int64_t>(processors, rows / kRowsABlock);
    *blocks = std::max<int64_t>(1, std::min({with_rows, worth, int64_t(on_each) * processors}));
    return int(failed);
  });
}

EXPORT paralign_rms_norm_backward(const void* x, const void* weight, const void* dy, const void* dsum, const void* rstd,
                                  void* dx, void* partial, int64_t rows, int64_t hidden, int64_t blocks, int64_t type,
                                  void* stream) {
  return with_backward(x, weight, dy, dsum, dx, hidden, type,
                       [&](auto chosen, auto kernel, int team, int threads, int bytes) {
    using T = typename decltype(chosen)::type;
    LAUNCH(kernel, unsigned(blocks), threads, bytes, stream, (const T*)x, (const T*)weight, (const T*)dy,
           (const T*)dsum, (const float*)rstd, (T*)dx, (float*)partial, rows, int(hidden), team);
    return int(cudaGetLastError());
  });
}
