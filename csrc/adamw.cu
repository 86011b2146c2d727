// AdamW over flat buffers with the clip factor and the cast to the model's precision in the same pass; and the
// sum of squares that the factor comes from. Defined by kernels/adamw.py. Bytes per parameter: 30, and 4.
#include "common/numeric.cuh"
#include "common/reduce.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kPack = 4;  // floats

struct Settings {
  float lr, beta1, beta2, eps, decay, correction1, correction2;
};

__global__ void __launch_bounds__(kThreads) squared_sum(const float* x, float* partial, int64_t count, int64_t packs) {
  SHARED_MEMORY(float, scratch);
  float total = 0.0f;
  const int64_t start = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t pack = start; pack < packs; pack += stride) {
    const Pack<float, kPack> part = load<float, kPack>(x, pack);
#pragma unroll
    for (int e = 0; e < kPack; ++e) total += part.at[e] * part.at[e];
  }
  for (int64_t i = packs * kPack + start; i < count; i += stride) total += x[i] * x[i];
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__device__ __forceinline__ float update(float p, float g, float& m, float& v, const Settings& s) {
  m = s.beta1 * m + (1.0f - s.beta1) * g;
  v = s.beta2 * v + (1.0f - s.beta2) * g * g;
  return p * (1.0f - s.lr * s.decay) - s.lr / s.correction1 * m / (sqrtf(v / s.correction2) + s.eps);
}

template <typename L>
__global__ void __launch_bounds__(kThreads) adamw(
    float* param, const float* grad, float* exp_avg, float* exp_avg_sq, L* low, const float* scale, int64_t count,
    int64_t packs, Settings settings) {
  const int64_t start = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, stride = int64_t(gridDim.x) * blockDim.x;
  const float factor = *scale;
  for (int64_t pack = start; pack < packs; pack += stride) {
    auto p = load<float, kPack>(param, pack), m = load<float, kPack>(exp_avg, pack);
    auto v = load<float, kPack>(exp_avg_sq, pack);
    const auto g = load<float, kPack>(grad, pack);
    Pack<L, kPack> rounded;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      p.at[e] = update(p.at[e], g.at[e] * factor, m.at[e], v.at[e], settings);
      rounded.at[e] = from_float<L>(p.at[e]);
    }
    store<float, kPack>(param, pack, p);
    store<float, kPack>(exp_avg, pack, m);
    store<float, kPack>(exp_avg_sq, pack, v);
    if (low) store<L, kPack>(low, pack, rounded);
  }
  for (int64_t i = packs * kPack + start; i < count; i += stride) {
    param[i] = update(param[i], grad[i] * factor, exp_avg[i], exp_avg_sq[i], settings);
    if (low) low[i] = from_float<L>(param[i]);
  }
}

unsigned grid_for(int64_t count) {
  const int64_t blocks = (count + kThreads * kPack - 1) / (kThreads * kPack);
  return static_cast<unsigned>(blocks < (1 << 20) ? blocks : (1 << 20));
}

}  // namespace

EXPORT paralign_squared_sum(const void* x, void* partial, int64_t count, int64_t blocks, void* stream) {
  LAUNCH(squared_sum, unsigned(blocks), kThreads, kWarp * sizeof(float), stream, (const float*)x, (float*)partial,
         count, aligned(x) ? count / kPack : 0);
  return int(cudaGetLastError());
}

EXPORT paralign_adamw(void* param, const void* grad, void* exp_avg, void* exp_avg_sq, void* low, const void* scale,
                      int64_t count, double lr, double beta1, double beta2, double eps, double decay,
                      double correction1, double correction2, int64_t low_type, void* stream) {
  const Settings settings = {float(lr),    float(beta1),       float(beta2),      float(eps),
                             float(decay), float(correction1), float(correction2)};
  const int64_t packs = aligned(param, grad, exp_avg, exp_avg_sq, low) ? count / kPack : 0;
  return with_type(low_type, [&](auto chosen) {
    using L = typename decltype(chosen)::type;
    LAUNCH((adamw<L>), grid_for(count), kThreads, 0, stream, (float*)param, (const float*)grad, (float*)exp_avg,
           (float*)exp_avg_sq, (L*)low, (const float*)scale, count, packs, settings);
    return int(cudaGetLastError());
  });
}
