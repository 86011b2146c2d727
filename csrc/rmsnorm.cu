// RMSNorm, alone or after a residual addition, forward and backward; the definition is kernels/rms_norm.py.
//
// A block takes one row at a time. Each thread keeps its first kKept packs of the row in registers, so that memory
// is read once; longer rows are read again, from cache. Bytes per bf16 element: 4 forward and 6 backward, with the
// residual 8 and 8.
#include "common/numeric.cuh"
#include "common/reduce.cuh"

namespace {

constexpr int kKept = 4;
constexpr int kMaxThreads = 256;

unsigned threads_for(int packs) {
  const int wanted = (packs + kKept - 1) / kKept;
  const int whole = (wanted + kWarp - 1) / kWarp * kWarp;
  return whole > kMaxThreads ? kMaxThreads : whole;
}

// x, or x + residual rounded to T and written out, as the unfused pair of operations does.
template <typename T, int N, bool kResidual>
__device__ __forceinline__ Pack<T, N> read_row(const T* x, const T* residual, T* sum, int64_t pack) {
  Pack<T, N> row = load<T, N>(x, pack);
  if constexpr (kResidual) {
    const Pack<T, N> other = load<T, N>(residual, pack);
#pragma unroll
    for (int e = 0; e < N; ++e) row.at[e] = from_float<T>(to_float(row.at[e]) + to_float(other.at[e]));
    store<T, N>(sum, pack, row);
  }
  return row;
}

template <typename T, int N>
__device__ __forceinline__ float squares(const Pack<T, N>& row) {
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < N; ++e) total += to_float(row.at[e]) * to_float(row.at[e]);
  return total;
}

template <typename T, int N>
__device__ __forceinline__ void write_normed(
    const Pack<T, N>& row, const T* weight, float rstd, T* y, int64_t first, int pack) {
  const Pack<T, N> w = load<T, N>(weight, pack);
  Pack<T, N> out;
#pragma unroll
  for (int e = 0; e < N; ++e) out.at[e] = from_float<T>(to_float(row.at[e]) * rstd * to_float(w.at[e]));
  store<T, N>(y, first + pack, out);
}

template <typename T, int N, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads) forward(
    const T* x, const T* residual, const T* weight, T* y, T* sum, float* rstd_out, int64_t rows, int hidden, float eps) {
  SHARED_MEMORY(float, scratch);
  const int packs = hidden / N, stride = blockDim.x;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t first = row * packs;
    Pack<T, N> kept[kKept];
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int pack = threadIdx.x + k * stride;
      if (pack >= packs) break;
      kept[k] = read_row<T, N, kResidual>(x, residual, sum, first + pack);
      total += squares(kept[k]);
    }
    for (int pack = threadIdx.x + kKept * stride; pack < packs; pack += stride)
      total += squares(read_row<T, N, kResidual>(x, residual, sum, first + pack));
    const float rstd = rsqrtf(block_sum(total, scratch) / hidden + eps);
    if (threadIdx.x == 0) rstd_out[row] = rstd;
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int pack = threadIdx.x + k * stride;
      if (pack >= packs) break;
      write_normed(kept[k], weight, rstd, y, first, pack);
    }
    for (int pack = threadIdx.x + kKept * stride; pack < packs; pack += stride)
      write_normed(load<T, N>(kResidual ? sum : x, first + pack), weight, rstd, y, first, pack);
  }
}

template <typename T, int N>
__device__ __forceinline__ float weighted_dot(const Pack<T, N>& x, const Pack<T, N>& dy, const T* weight, int pack) {
  const Pack<T, N> w = load<T, N>(weight, pack);
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < N; ++e) total += to_float(x.at[e]) * to_float(dy.at[e]) * to_float(w.at[e]);
  return total;
}

// One pack of dx, and its share of the weight's gradient, which lies as [element of a pack][pack]: neighbouring
// threads then add to neighbouring banks.
template <typename T, int N, bool kSumGrad>
__device__ __forceinline__ void write_gradient(
    const Pack<T, N>& x, const Pack<T, N>& dy, const T* weight, const T* dsum, float rstd, float projection, T* dx,
    float* dweight, int64_t first, int pack, int packs) {
  const Pack<T, N> w = load<T, N>(weight, pack);
  Pack<T, N> out, more;
  if constexpr (kSumGrad) more = load<T, N>(dsum, first + pack);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float xe = to_float(x.at[e]), de = to_float(dy.at[e]);
    float gradient = rstd * de * to_float(w.at[e]) - projection * xe;
    if constexpr (kSumGrad) gradient += to_float(more.at[e]);
    out.at[e] = from_float<T>(gradient);
    dweight[e * packs + pack] += de * xe * rstd;
  }
  store<T, N>(dx, first + pack, out);
}

// dx = rstd·w·dy − x·rstd³·mean(w·dy·x) (+ dsum). Each block adds dweight over its rows in shared memory, every
// thread its own columns, and writes one row of `partial`: no atomics, so the result never changes.
// One block a multiprocessor is all that is promised: held to more, fp32 spills registers on sm_80.
template <typename T, int N, bool kSumGrad>
__global__ void __launch_bounds__(kMaxThreads, 1) backward(
    const T* x, const T* weight, const T* dy, const T* dsum, const float* rstd_in, T* dx, float* partial, int64_t rows,
    int hidden) {
  SHARED_MEMORY(float, scratch);
  float* const dweight = scratch + kWarp;
  const int packs = hidden / N, stride = blockDim.x;
  for (int pack = threadIdx.x; pack < packs; pack += stride)
    for (int e = 0; e < N; ++e) dweight[e * packs + pack] = 0.0f;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t first = row * packs;
    const float rstd = rstd_in[row];
    Pack<T, N> kept_x[kKept], kept_dy[kKept];
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int pack = threadIdx.x + k * stride;
      if (pack >= packs) break;
      kept_x[k] = load<T, N>(x, first + pack);
      kept_dy[k] = load<T, N>(dy, first + pack);
      total += weighted_dot(kept_x[k], kept_dy[k], weight, pack);
    }
    for (int pack = threadIdx.x + kKept * stride; pack < packs; pack += stride)
      total += weighted_dot(load<T, N>(x, first + pack), load<T, N>(dy, first + pack), weight, pack);
    const float projection = block_sum(total, scratch) * rstd * rstd * rstd / hidden;
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int pack = threadIdx.x + k * stride;
      if (pack >= packs) break;
      write_gradient<T, N, kSumGrad>(
          kept_x[k], kept_dy[k], weight, dsum, rstd, projection, dx, dweight, first, pack, packs);
    }
    for (int pack = threadIdx.x + kKept * stride; pack < packs; pack += stride)
      write_gradient<T, N, kSumGrad>(load<T, N>(x, first + pack), load<T, N>(dy, first + pack), weight, dsum, rstd,
                                     projection, dx, dweight, first, pack, packs);
  }
  for (int pack = threadIdx.x; pack < packs; pack += stride)
    for (int e = 0; e < N; ++e) partial[int64_t(blockIdx.x) * hidden + pack * N + e] = dweight[e * packs + pack];
}

}  // namespace

EXPORT paralign_rms_norm_forward(const void* x, const void* residual, const void* weight, void* y, void* sum, void* rstd,
                                 int64_t rows, int64_t hidden, double eps, int64_t type, void* stream) {
  return with_type(type, [&](auto chosen) {
    using T = typename decltype(chosen)::type;
    const bool packed = hidden % Type<T>::pack == 0 && aligned(x, residual, weight, y, sum);
    return with_width<T>(packed, [&](auto width) {
      constexpr int N = decltype(width)::value;
      const unsigned threads = threads_for(static_cast<int>(hidden / N));
      const size_t bytes = kWarp * sizeof(float);
      if (residual) {
        LAUNCH((forward<T, N, true>), blocks_for(rows), threads, bytes, stream, (const T*)x, (const T*)residual,
               (const T*)weight, (T*)y, (T*)sum, (float*)rstd, rows, int(hidden), float(eps));
      } else {
        LAUNCH((forward<T, N, false>), blocks_for(rows), threads, bytes, stream, (const T*)x, (const T*)nullptr,
               (const T*)weight, (T*)y, (T*)nullptr, (float*)rstd, rows, int(hidden), float(eps));
      }
      return int(cudaGetLastError());
    });
  });
}

EXPORT paralign_rms_norm_backward(const void* x, const void* weight, const void* dy, const void* dsum, const void* rstd,
                                  void* dx, void* partial, int64_t rows, int64_t hidden, int64_t blocks, int64_t type,
                                  void* stream) {
  return with_type(type, [&](auto chosen) {
    using T = typename decltype(chosen)::type;
    const bool packed = hidden % Type<T>::pack == 0 && aligned(x, weight, dy, dsum, dx);
    return with_width<T>(packed, [&](auto width) {
      constexpr int N = decltype(width)::value;
      const auto kernel = dsum ? backward<T, N, true> : backward<T, N, false>;
      const size_t bytes = (kWarp + hidden) * sizeof(float);
      // Beyond 48 KiB shared memory must be asked for; where the device has less, this is the error.
      const auto refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
      if (refused) return int(refused);
      LAUNCH(kernel, unsigned(blocks), threads_for(static_cast<int>(hidden / N)), bytes, stream, (const T*)x,
             (const T*)weight, (const T*)dy, (const T*)dsum, (const float*)rstd, (T*)dx, (float*)partial, rows,
             int(hidden));
      return int(cudaGetLastError());
    });
  });
}
