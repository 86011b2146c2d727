// Statistics of a row of logits over one shard of the vocabulary, and the logits' gradient written in their place;
// defined by kernels/vocab.py, which also says how shards are put together.
//
// A block takes one row and reads it once: maximum, Σ e^(z−max) and Σ e^(z−max)(z−max) are corrected as the maximum
// grows, pack by pack. Chosen logits (a reference model's top k) get the same three sums over themselves alone.
#include "common/numeric.cuh"
#include "common/reduce.cuh"

namespace {

constexpr int kThreads = 256;
constexpr float kLowest = -3.4028234663852886e38f;  // −∞ would make NaN of a difference

// Σ e^(z−top), and Σ e^(z−top)(z − top − offset), over the logits seen so far.
struct Sums {
  float top, weight, moment;
};

__device__ __forceinline__ void raise(Sums& sums, float top) {
  const float scale = __expf(sums.top - top);
  sums.moment = scale * (sums.moment + sums.weight * (sums.top - top));
  sums.weight *= scale;
  sums.top = top;
}

__device__ __forceinline__ void add(Sums& sums, float logit, float offset) {
  const float share = __expf(logit - sums.top);
  sums.weight += share;
  if (share > 0.0f) sums.moment += share * (logit - sums.top - offset);
}

__device__ __forceinline__ void write(Sums sums, float* scratch, float* to) {
  raise(sums, block_max(sums.top, scratch));
  const float weight = block_sum(sums.weight, scratch), moment = block_sum(sums.moment, scratch);
  if (threadIdx.x == 0) {
    to[0] = sums.top;
    to[1] = weight;
    to[2] = moment;
  }
}

// out (rows, 7): top, weight, moment; the label's logit; top, weight, moment of the chosen logits.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) partials(
    const T* logits, const int64_t* labels, const int64_t* chosen, const float* chosen_logprob, float* out,
    int64_t rows, int64_t columns, int64_t first_column, int n_chosen) {
  SHARED_MEMORY(float, scratch);
  const int64_t packs = columns / N;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* const own = logits + row * columns;
    Sums all = {kLowest, 0.0f, 0.0f};
    for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
      const Pack<T, N> part = load<T, N>(own, pack);
      float top = all.top;
#pragma unroll
      for (int e = 0; e < N; ++e) top = fmaxf(top, to_float(part.at[e]));
      if (top > all.top) raise(all, top);
#pragma unroll
      for (int e = 0; e < N; ++e) add(all, to_float(part.at[e]), 0.0f);
    }
    write(all, scratch, out + row * 7);
    if (threadIdx.x == 0) {
      const int64_t label = labels[row] - first_column;
      out[row * 7 + 3] = label >= 0 && label < columns ? to_float(own[label]) : 0.0f;
    }
    Sums few = {kLowest, 0.0f, 0.0f};
    for (int i = threadIdx.x; i < n_chosen; i += blockDim.x) {
      const int64_t column = chosen[row * n_chosen + i] - first_column;
      if (column < 0 || column >= columns) continue;
      const float logit = to_float(own[column]);
      if (logit > few.top) raise(few, logit);
      add(few, logit, chosen_logprob[row * n_chosen + i]);
    }
    write(few, scratch, out + row * 7 + 4);
  }
}

// Per row: log Σ e^z, gradients of log-probability and of entropy, the entropy; the gradient of the divergence,
// log Σ e^z over the chosen, the divergence.
struct Row {
  float log_sum, d_logprob, d_entropy, entropy, d_divergence, chosen_log_sum, divergence;
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) gradient(
    T* logits, const int64_t* labels, const Row* row_values, const int64_t* chosen, const float* chosen_logprob,
    int64_t rows, int64_t columns, int64_t first_column, int n_chosen) {
  SHARED_MEMORY(float, chosen_gradient);
  const int64_t packs = columns / N;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    T* const own = logits + row * columns;
    const Row value = row_values[row];
    const int64_t label = labels[row] - first_column;
    const bool has_label = label >= 0 && label < columns;
    // What is chosen is read before its place is written over, and stored whole: one rounding, not two.
    for (int i = threadIdx.x; i < n_chosen; i += blockDim.x) {
      const int64_t column = chosen[row * n_chosen + i] - first_column;
      if (column < 0 || column >= columns) continue;
      const float logit = to_float(own[column]), log_share = logit - value.log_sum;
      const float chosen_log_share = logit - value.chosen_log_sum;
      chosen_gradient[i] =
          value.d_divergence * __expf(chosen_log_share) *
              (chosen_log_share - chosen_logprob[row * n_chosen + i] - value.divergence) -
          __expf(log_share) * (value.d_logprob + value.d_entropy * (log_share + value.entropy)) +
          (column == label ? value.d_logprob : 0.0f);
    }
    __syncthreads();
    for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x) {
      Pack<T, N> part = load<T, N>(own, pack);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float log_share = to_float(part.at[e]) - value.log_sum;
        float result = -__expf(log_share) * (value.d_logprob + value.d_entropy * (log_share + value.entropy));
        if (has_label && pack * N + e == label) result += value.d_logprob;
        part.at[e] = from_float<T>(result);
      }
      store<T, N>(own, pack, part);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_chosen; i += blockDim.x) {
      const int64_t column = chosen[row * n_chosen + i] - first_column;
      if (column >= 0 && column < columns) own[column] = from_float<T>(chosen_gradient[i]);
    }
    __syncthreads();  // the next row writes chosen_gradient again
  }
}

}  // namespace

EXPORT paralign_vocab_partials(const void* logits, const void* labels, const void* chosen, const void* chosen_logprob,
                               void* out, int64_t rows, int64_t columns, int64_t first_column, int64_t n_chosen,
                               int64_t type, void* stream) {
  return with_type(type, [&](auto chosen_type) {
    using T = typename decltype(chosen_type)::type;
    return with_width<T>(columns % Type<T>::pack == 0 && aligned(logits), [&](auto width) {
      constexpr int N = decltype(width)::value;
      LAUNCH((partials<T, N>), blocks_for(rows), kThreads, kWarp * sizeof(float), stream, (const T*)logits,
             (const int64_t*)labels, (const int64_t*)chosen, (const float*)chosen_logprob, (float*)out, rows, columns,
             first_column, int(n_chosen));
      return int(cudaGetLastError());
    });
  });
}

EXPORT paralign_vocab_gradient(void* logits, const void* labels, const void* row_values, const void* chosen,
                               const void* chosen_logprob, int64_t rows, int64_t columns, int64_t first_column,
                               int64_t n_chosen, int64_t type, void* stream) {
  return with_type(type, [&](auto chosen_type) {
    using T = typename decltype(chosen_type)::type;
    return with_width<T>(columns % Type<T>::pack == 0 && aligned(logits), [&](auto width) {
      constexpr int N = decltype(width)::value;
      const size_t bytes = n_chosen * sizeof(float);
      const auto kernel = gradient<T, N>;
      const auto refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
      if (refused) return int(refused);
      LAUNCH(kernel, blocks_for(rows), kThreads, bytes, stream, (T*)logits, (const int64_t*)labels,
             (const Row*)row_values, (const int64_t*)chosen, (const float*)chosen_logprob, rows, columns, first_column,
             int(n_chosen));
      return int(cudaGetLastError());
    });
  });
}
