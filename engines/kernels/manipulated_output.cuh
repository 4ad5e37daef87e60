// Launch 2: f(A) of Eq. 7 to 9, AdaIN of Eq. 10, the product with V', lambda.
// Legend: `decoupled_attention.cu`.
#pragma once

#include "attention_map.cuh"

constexpr int OUTPUT_WARPS = OUTPUT_THREADS / TILE;

// Minimum and maximum per token over the block, left in shared[0][t][0] and shared[1][t][0]. This
// thread brings one pair, for token threadIdx.x % T.
__device__ inline void block_range(float lowest, float highest, float (&shared)[2][T][OUTPUT_WARPS]) {
#pragma unroll
  for (int mask = T; mask < TILE; mask *= 2) {
    lowest = fminf(lowest, __shfl_xor_sync(ALL, lowest, mask));
    highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, mask));
  }
  const int lane = threadIdx.x % TILE, warp = threadIdx.x / TILE;
  if (lane < T) shared[0][lane][warp] = lowest, shared[1][lane][warp] = highest;
  __syncthreads();
  if (threadIdx.x < T) {
    float *low = shared[0][threadIdx.x], *high = shared[1][threadIdx.x];
    for (int w = 1; w < OUTPUT_WARPS; ++w) {
      low[0] = fminf(low[0], low[w]), high[0] = fmaxf(high[0], high[w]);
    }
  }
  __syncthreads();
}

// S of Eq. 8 and 9 for one (b, h). It lives in shared memory: all threads read the same constants
// once per tile, and 20 registers fewer keep the products below free of spills.
struct Softmask {
  float sharpness, scale, upper_bound;
  float low[T], inverse[T], quantile[T], sigmoid_low[T], sigmoid_inverse[T];
  float first_peak;  // max_N(S) of token 0

  // Rounded the same way at a row's extremes and at every position: a flat map must give exactly 0.
  __device__ float sigmoid(float x, int t, float level) const {
    return 1.0f / (1.0f + expf(-sharpness * __fmaf_rn(x - low[t], inverse[t], -level)));
  }

  __device__ float mask(float x, int t) const {
    const float rise = (sigmoid(x, t, quantile[t]) - sigmoid_low[t]) * sigmoid_inverse[t];
    return fminf(scale * fminf(fmaxf(rise, 0.0f), 1.0f), upper_bound);
  }

  // `statistics` [B, H, 3, T] as floats; [first, first + count) are the (b, h) of the request. All
  // threads of the block call it, on one copy in shared memory.
  __device__ void prepare(const float* row, const float* statistics, int first, int count,
                          int head_row) {
    __shared__ float map_range[2][T][OUTPUT_WARPS], sigmoid_range[2][T][OUTPUT_WARPS];
    const int t = threadIdx.x % T;
    const float* of_request = statistics + (long long)first * 3 * T + t;
    const float* own = statistics + (long long)head_row * 3 * T;
    float lowest = LARGEST, highest = -LARGEST;
    for (int i = threadIdx.x / T; i < count; i += OUTPUT_THREADS / T) {
      lowest = fminf(lowest, of_request[i * 3 * T]);
      highest = fmaxf(highest, of_request[(i * 3 + 1) * T]);
    }
    block_range(lowest, highest, map_range);
    if (threadIdx.x < T) {
      sharpness = row[SHARPNESS], scale = row[SCALE], upper_bound = row[UPPER_BOUND];
      low[t] = map_range[0][t][0], quantile[t] = own[2 * T + t];
      inverse[t] = 1.0f / fmaxf(map_range[1][t][0] - low[t], 1e-12f);
    }
    __syncthreads();

    lowest = LARGEST, highest = -LARGEST;
    for (int i = threadIdx.x / T; i < count; i += OUTPUT_THREADS / T) {
      const float* of_row = of_request + i * 3 * T;
      const float one = sigmoid(of_row[0], t, of_row[2 * T]);
      const float other = sigmoid(of_row[T], t, of_row[2 * T]);
      lowest = fminf(lowest, fminf(one, other)), highest = fmaxf(highest, fmaxf(one, other));
    }
    block_range(lowest, highest, sigmoid_range);
    if (threadIdx.x < T) {
      sigmoid_low[t] = sigmoid_range[0][t][0];
      sigmoid_inverse[t] = 1.0f / fmaxf(sigmoid_range[1][t][0] - sigmoid_low[t], 1e-12f);
      if (t == 0) first_peak = fmaxf(mask(own[0], 0), mask(own[T], 0));
    }
    __syncthreads();
  }
};

// w x + (1 - w) AdaIN(x, a) of Eq. 10 over the T tokens of one position, in place.
__device__ inline void match_tokens(float (&x)[T], const float (&a)[T], float weight) {
  const float mean_x = 0.25f * (x[0] + x[1] + x[2] + x[3]);
  const float mean_a = 0.25f * (a[0] + a[1] + a[2] + a[3]);
  float square_x = 0.0f, square_a = 0.0f;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    square_x += (x[t] - mean_x) * (x[t] - mean_x), square_a += (a[t] - mean_a) * (a[t] - mean_a);
  }
  const float gain = sqrtf(square_a / (T - 1)) / (sqrtf(square_x / (T - 1)) + 1e-6f);
#pragma unroll
  for (int t = 0; t < T; ++t) {
    x[t] = weight * x[t] + (1.0f - weight) * ((x[t] - mean_x) * gain + mean_a);
  }
}

__device__ inline float lanes_sum(float x) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(ALL, x, mask);
  return x;
}

// base + lambda f V' of a tile, whose positions' f (and untouched a) lie in the lanes that own them.
// `v` is centred per token, so that the deviations from the mean over D come out without cancellation.
template <bool MATCHED>
__device__ inline void write_tile(Scalar* out, const Scalar* base, int pitch,
                                  const float (&v)[T][CHUNK], const float (&mean_v)[T],
                                  const float (&f)[T], const float (&a)[T], float weight, float ip_scale,
                                  const Lane& lane, int first, int positions) {
#pragma unroll 2  // more would only cost registers
  for (int step = 0; step < LANES; ++step) {
    const int n = first + step * STRIDE + lane.group, owner = lane.group * LANES + step;
    float x[CHUNK] = {}, untouched[CHUNK] = {}, mean = 0.0f, mean_untouched = 0.0f, gain = 1.0f;
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const float share = __shfl_sync(ALL, f[t], owner);
      mean = fmaf(share, mean_v[t], mean);
      for (int j = 0; j < CHUNK; ++j) x[j] = fmaf(share, v[t][j], x[j]);
      if constexpr (MATCHED) {
        const float before = __shfl_sync(ALL, a[t], owner);
        mean_untouched = fmaf(before, mean_v[t], mean_untouched);
        for (int j = 0; j < CHUNK; ++j) untouched[j] = fmaf(before, v[t][j], untouched[j]);
      }
    }
    if constexpr (MATCHED) {
      float square = 0.0f, square_untouched = 0.0f;
      for (int j = 0; j < CHUNK; ++j) {
        square = fmaf(x[j], x[j], square);
        square_untouched = fmaf(untouched[j], untouched[j], square_untouched);
      }
      const float std = sqrtf(lanes_sum(square) / (D - 1));
      const float std_untouched = sqrtf(lanes_sum(square_untouched) / (D - 1));
      gain = weight + (1.0f - weight) * (std_untouched / (std + 1e-6f));
      mean = weight * mean + (1.0f - weight) * mean_untouched;
    }
    for (int j = 0; j < CHUNK; ++j) x[j] = ip_scale * fmaf(x[j], gain, mean);
    if (lane.holds && n < positions) {
      const int at = n * pitch + lane.chunk * CHUNK;
      if (base) {
        float addend[CHUNK];
        load_chunk(base + at, addend);
        for (int j = 0; j < CHUNK; ++j) x[j] += addend[j];
      }
      store_chunk(out + at, x);
    }
  }
}

// The second launch of [B, N, H * D] tensors may have something to add its result to; null is nothing.
#if HEADS_LAST
#define ADDEND , const Scalar* __restrict__ base
#else
#define ADDEND
#endif

extern "C" __global__ void __launch_bounds__(OUTPUT_THREADS, D > 64 ? 1 : 2)
    decoupled_attention(const Scalar* __restrict__ q, const Scalar* __restrict__ k,
                        const Scalar* __restrict__ v, const float* __restrict__ manipulation,
                        const float* __restrict__ ip_scale, const float4* __restrict__ maps,
                        const float4* __restrict__ statistics, int requests, int rows, int heads,
                        int positions, Scalar* __restrict__ out ADDEND) {
  const int head_row = blockIdx.y;
  const int count = rows / requests * heads, request = head_row / count;
  const float* row = manipulation + request * COLUMNS;
  const float weight = row[ADAIN_WEIGHT];
  const Lane lane;

  float values[T][CHUNK], mean[T], f[T], a[T];
  load_tokens(v + first_element(head_row, heads, T), pitch_of(heads), lane, values);
#pragma unroll
  for (int t = 0; t < T; ++t) {
    float sum = 0.0f;
    for (int j = 0; j < CHUNK; ++j) sum += values[t][j];
    mean[t] = lanes_sum(sum) / D;
    for (int j = 0; j < CHUNK; ++j) values[t][j] = lane.holds ? values[t][j] - mean[t] : 0.0f;
  }
  const long long at = first_element(head_row, heads, positions);
  Scalar* mine = out + at;
#if HEADS_LAST
  const Scalar* addend = base ? base + at : nullptr;
#else
  constexpr Scalar* addend = nullptr;
#endif
  const int start = blockIdx.x * OUTPUT_POSITIONS + threadIdx.x / TILE * TILE;
  const int stop = min((int)(blockIdx.x + 1) * OUTPUT_POSITIONS, positions);

  if (row[KIND] == SOFTMASK_KIND) {
    const bool invert = row[INVERT_FIRST_TOKEN] > 0.5f;
    const float* of_rows = reinterpret_cast<const float*>(statistics);
    __shared__ Softmask softmask;
    softmask.prepare(row, of_rows, request * count, count, head_row);
    const float4* map = maps + (long long)head_row * positions;
    for (int first = start; first < stop; first += OUTPUT_THREADS) {
      const float4 owned = map[min(first + lane.owned(), positions - 1)];
      a[0] = owned.x, a[1] = owned.y, a[2] = owned.z, a[3] = owned.w;
#pragma unroll
      for (int t = 0; t < T; ++t) f[t] = softmask.mask(entering(a[t], t, invert), t);
      if (invert) f[0] = softmask.first_peak - f[0];
      if (weight == 1.0f) {
        write_tile<false>(mine, addend, pitch_of(heads), values, mean, f, a, weight,
                          ip_scale[request], lane, first, positions);
      } else {
        match_tokens(f, a, weight);
        write_tile<true>(mine, addend, pitch_of(heads), values, mean, f, a, weight,
                         ip_scale[request], lane, first, positions);
      }
    }
    return;
  }

  float keys[T][CHUNK];
  load_tokens(k + first_element(head_row, heads, T), pitch_of(heads), lane, keys);
  const Scalar* query = q + first_element(head_row, heads, positions);
  for (int first = start; first < stop; first += OUTPUT_THREADS) {
    attention_map(query, pitch_of(heads), keys, lane, first, positions, a);
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const bool is_power = row[KIND] == SCALE_POWER_KIND;
      f[t] = is_power ? fminf(row[SCALE] * powf(a[t], row[POWER]), row[UPPER_BOUND]) : a[t];
    }
    write_tile<false>(mine, addend, pitch_of(heads), values, mean, f, a, weight,
                      ip_scale[request], lane, first, positions);
  }
}
