// Both launches for any number T of image tokens, some of which a mask may take away. One thread
// works on a position at a time and loops over the tokens, so that neither registers nor shared
// memory grow with T; f is computed anew where it is used instead of being kept.
//
// Beside what `decoupled_attention.cu` says, maps are [B, H, T, N], written for rows of every kind
// (the first launch cannot be left out), statistics are [B, H, 3, T], and both launches take one
// argument more, the last: token_mask [B, T] float32, added to the logits, or null.
// The quantile is exact: positive floats order like their bit patterns, of which one bit after the
// other is found by counting, with nothing to keep.
#pragma once

#include "attention_map.cuh"

constexpr int PART = D % 32 == 0 ? 32 : D % 16 == 0 ? 16 : 8;  // of a head, whose sums a thread holds

__device__ inline float warp_lowest(float x) {
  for (int mask = TILE / 2; mask > 0; mask /= 2) x = fminf(x, __shfl_xor_sync(ALL, x, mask));
  return x;
}

__device__ inline int warp_sum(int x) {
  for (int mask = TILE / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(ALL, x, mask);
  return x;
}

// Row `b` of the mask; 1 or 0 for a token that is there or not.
__device__ inline const float* mask_of(const float* token_mask, int b) {
  return token_mask ? token_mask + (long long)b * T : nullptr;
}
__device__ inline float is_there(const float* mask, int t) { return mask ? expf(mask[t]) : 1.0f; }

extern "C" __global__ void __launch_bounds__(STATISTICS_THREADS)
    decoupled_attention_statistics(const Scalar* __restrict__ q, const Scalar* __restrict__ k,
                                   const float* __restrict__ manipulation, int requests, int rows,
                                   int heads, int positions, float* maps, float* statistics,
                                   const float* __restrict__ token_mask) {
  const int head_row = blockIdx.x;  // b * H + h
  const float* row = manipulation + head_row / heads / (rows / requests) * COLUMNS;
  const float* mask = mask_of(token_mask, head_row / heads);
  const Scalar* keys = k + first_element(head_row, heads, T);
  const Scalar* query = q + first_element(head_row, heads, positions);
  const int pitch = pitch_of(heads);
  const float scale = rsqrtf((float)D);
  float* map = maps + (long long)head_row * T * positions;

  for (int n = threadIdx.x; n < positions; n += STATISTICS_THREADS) {
    float x[CHUNKS][CHUNK], peak = -LARGEST, total = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) load_chunk(query + (long long)n * pitch + c * CHUNK, x[c]);
    for (int t = 0; t < T; ++t) {
      float sum = 0.0f;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        float key[CHUNK];
        load_chunk(keys + t * pitch + c * CHUNK, key);
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) sum = fmaf(x[c][j], key[j], sum);
      }
      const float logit = sum * scale + (mask ? mask[t] : 0.0f), higher = fmaxf(peak, logit);
      total = total * expf(peak - higher) + expf(logit - higher), peak = higher;
      map[(long long)t * positions + n] = logit;
    }
    for (int t = 0; t < T; ++t) {
      float* a = map + (long long)t * positions + n;
      *a = expf(*a - peak) / total;
    }
  }
  if (row[KIND] != SOFTMASK_KIND) return;
  __syncthreads();

  // In float64: 0.65 * 16383 in float32 would move the fraction by 10^-3.
  const double place = (double)row[QUANTILE] * (positions - 1);
  const int rank = min(max((int)place, 0), positions - 1), lane = threadIdx.x % TILE;
  for (int t = threadIdx.x / TILE; t < T; t += STATISTICS_THREADS / TILE) {  // a warp has a token
    const float* a = map + (long long)t * positions;
    const bool invert = row[INVERT_FIRST_TOKEN] > 0.5f;
    float low = LARGEST, negated = LARGEST;  // the maximum is kept as the minimum of the negated map
    for (int n = lane; n < positions; n += TILE) {
      const float x = entering(a[n], t, invert);
      low = fminf(low, x), negated = fminf(negated, -x);
    }
    low = warp_lowest(low), negated = warp_lowest(negated);
    const int bits = 32 - __clz(__float_as_uint(low) ^ __float_as_uint(-negated));  // 30 at most
    unsigned found = __float_as_uint(low) >> bits << bits;
    for (int bit = bits - 1; bit >= 0; --bit) {
      const unsigned candidate = found | 1u << bit;
      int below = 0;
      for (int n = lane; n < positions; n += TILE) {
        below += __float_as_uint(entering(a[n], t, invert)) < candidate;
      }
      if (warp_sum(below) <= rank) found = candidate;
    }
    // Linear interpolation needs the next order statistic: the same value, or the least one above.
    const float lower = __uint_as_float(found);
    float next = -negated;
    int through = 0;
    for (int n = lane; n < positions; n += TILE) {
      const float x = entering(a[n], t, invert);
      if (x > lower) next = fminf(next, x);
      through += x <= lower;
    }
    next = warp_lowest(next);
    if (warp_sum(through) > rank + 1) next = lower;
    if (lane == 0) {
      float* mine = statistics + (long long)head_row * 3 * T + t;
      mine[0] = low, mine[T] = -negated;
      mine[2 * T] = fmaxf(fmaf((float)(place - rank), next - lower, lower), 1e-6f);
    }
  }
}

// f(A) of Eq. 7 to 9 for one (b, h), before AdaIN. It lives in shared memory.
struct Manipulated {
  float kind, scale, power, sharpness, upper_bound;
  bool invert;
  float low[T], inverse[T], quantile[T], sigmoid_low[T], sigmoid_inverse[T], there[T], mean[T];
  float first_peak;  // max_N(S) of token 0

  // Rounded the same way at a row's extremes and at every position: a flat map must give exactly 0.
  __device__ float sigmoid(float x, int t, float level) const {
    return 1.0f / (1.0f + expf(-sharpness * __fmaf_rn(x - low[t], inverse[t], -level)));
  }

  __device__ float mask(float x, int t) const {
    const float rise = (sigmoid(x, t, quantile[t]) - sigmoid_low[t]) * sigmoid_inverse[t];
    return fminf(scale * fminf(fmaxf(rise, 0.0f), 1.0f), upper_bound);
  }

  __device__ float of(float a, int t) const {
    float f = a;
    if (kind == SCALE_POWER_KIND) {
      f = fminf(scale * powf(a, power), upper_bound);
    } else if (kind == SOFTMASK_KIND) {
      f = mask(entering(a, t, invert), t);
      if (invert && t == 0) f = first_peak - f;
    }
    return f * there[t];
  }

  // `statistics` [B, H, 3, T]; [first, first + count) are the (b, h) of the request. All threads of
  // the block call it, on one copy in shared memory; `values` are the T rows of v.
  __device__ void prepare(const float* row, const float* statistics, const float* token_mask,
                          const Scalar* values, int pitch, int first, int count, int head_row) {
    if (threadIdx.x == 0) {
      kind = row[KIND], scale = row[SCALE], power = row[POWER], sharpness = row[SHARPNESS];
      upper_bound = row[UPPER_BOUND], invert = row[INVERT_FIRST_TOKEN] > 0.5f;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < T; t += OUTPUT_THREADS) {
      there[t] = is_there(token_mask, t);
      float sum = 0.0f;
      for (int c = 0; c < CHUNKS; ++c) {
        float v[CHUNK];
        load_chunk(values + t * pitch + c * CHUNK, v);
        for (int j = 0; j < CHUNK; ++j) sum += v[j];
      }
      mean[t] = sum / D;
      if (kind != SOFTMASK_KIND) continue;
      const float* of_request = statistics + (long long)first * 3 * T + t;
      const float* own = statistics + (long long)head_row * 3 * T + t;
      float lowest = LARGEST, highest = -LARGEST;
      for (int i = 0; i < count; ++i) {
        lowest = fminf(lowest, of_request[i * 3 * T]);
        highest = fmaxf(highest, of_request[(i * 3 + 1) * T]);
      }
      low[t] = lowest, inverse[t] = 1.0f / fmaxf(highest - lowest, 1e-12f), quantile[t] = own[2 * T];
      lowest = LARGEST, highest = -LARGEST;
      for (int i = 0; i < count; ++i) {
        const float* of_row = of_request + i * 3 * T;
        const float one = sigmoid(of_row[0], t, of_row[2 * T]);
        const float other = sigmoid(of_row[T], t, of_row[2 * T]);
        lowest = fminf(lowest, fminf(one, other)), highest = fmaxf(highest, fmaxf(one, other));
      }
      sigmoid_low[t] = lowest, sigmoid_inverse[t] = 1.0f / fmaxf(highest - lowest, 1e-12f);
      if (t == 0) first_peak = fmaxf(mask(own[0], 0), mask(own[T], 0));
    }
    __syncthreads();
  }
};

// w x + (1 - w) AdaIN(x, a) of Eq. 10 over the tokens of one position, as a function of each x.
struct Matched {
  float weight, mean_x = 0.0f, mean_a = 0.0f, gain = 1.0f;

  __device__ Matched(const Manipulated& f, const float* a, int positions, float weight)
      : weight(weight) {
    if (weight == 1.0f) return;
    float count = 0.0f, square_x = 0.0f, square_a = 0.0f;
    for (int t = 0; t < T; ++t) {
      const float share = a[(long long)t * positions];
      count += f.there[t], mean_x += f.of(share, t), mean_a += share;
    }
    mean_x /= count, mean_a /= count;
    for (int t = 0; t < T; ++t) {
      const float share = a[(long long)t * positions], x = f.of(share, t);
      square_x += f.there[t] * (x - mean_x) * (x - mean_x);
      square_a += f.there[t] * (share - mean_a) * (share - mean_a);
    }
    const float freedom = fmaxf(count - 1.0f, 1.0f);
    gain = sqrtf(square_a / freedom) / (sqrtf(square_x / freedom) + 1e-6f);
  }

  __device__ float of(float x, float there) const {
    if (weight == 1.0f) return x;
    return there * (weight * x + (1.0f - weight) * ((x - mean_x) * gain + mean_a));
  }
};

#if HEADS_LAST
#define ADDEND , const Scalar* __restrict__ base
#else
#define ADDEND
#endif

extern "C" __global__ void __launch_bounds__(OUTPUT_THREADS)
    decoupled_attention(const Scalar* __restrict__ q, const Scalar* __restrict__ k,
                        const Scalar* __restrict__ v, const float* __restrict__ manipulation,
                        const float* __restrict__ ip_scale, const float* __restrict__ maps,
                        const float* __restrict__ statistics, int requests, int rows, int heads,
                        int positions, Scalar* __restrict__ out ADDEND,
                        const float* __restrict__ token_mask) {
  const int head_row = blockIdx.y, pitch = pitch_of(heads);
  const int count = rows / requests * heads, request = head_row / count;
  const float* row = manipulation + request * COLUMNS;
  const float weight = row[KIND] == SOFTMASK_KIND ? row[ADAIN_WEIGHT] : 1.0f;
  const Scalar* values = v + first_element(head_row, heads, T);
  const long long at = first_element(head_row, heads, positions);
  __shared__ Manipulated f;
  f.prepare(row, statistics, mask_of(token_mask, head_row / heads), values, pitch, request * count,
            count, head_row);

  const int stop = min((int)(blockIdx.x + 1) * OUTPUT_POSITIONS, positions);
  for (int n = blockIdx.x * OUTPUT_POSITIONS + threadIdx.x; n < stop; n += OUTPUT_THREADS) {
    const float* a = maps + (long long)head_row * T * positions + n;
    const Matched matched(f, a, positions, weight);
    float mean = 0.0f, untouched = 0.0f, square = 0.0f, square_untouched = 0.0f, gain = 1.0f;
    for (int t = 0; t < T; ++t) {
      const float share = a[(long long)t * positions];
      mean = fmaf(matched.of(f.of(share, t), f.there[t]), f.mean[t], mean);
      untouched = fmaf(share, f.mean[t], untouched);
    }
    // With V' centred per token, so that deviations from the mean over D come without cancellation.
    for (int pass = weight == 1.0f; pass < 2; ++pass) {  // deviations, then the result
      for (int first = 0; first < D; first += PART) {
        float x[PART] = {}, before[PART] = {};
        for (int t = 0; t < T; ++t) {
          const float share = a[(long long)t * positions];
          const float manipulated = matched.of(f.of(share, t), f.there[t]);
#pragma unroll
          for (int c = 0; c < PART; c += CHUNK) {
            float value[CHUNK];
            load_chunk(values + t * pitch + first + c, value);
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) {
              x[c + j] = fmaf(manipulated, value[j] - f.mean[t], x[c + j]);
              if (pass == 0) before[c + j] = fmaf(share, value[j] - f.mean[t], before[c + j]);
            }
          }
        }
        if (pass == 0) {
#pragma unroll
          for (int j = 0; j < PART; ++j) {
            square = fmaf(x[j], x[j], square);
            square_untouched = fmaf(before[j], before[j], square_untouched);
          }
          continue;
        }
#pragma unroll
        for (int c = 0; c < PART; c += CHUNK) {
          const long long to = at + (long long)n * pitch + first + c;
          float y[CHUNK];
#pragma unroll
          for (int j = 0; j < CHUNK; ++j) y[j] = ip_scale[request] * fmaf(x[c + j], gain, mean);
#if HEADS_LAST
          if (base) {
            float addend[CHUNK];
            load_chunk(base + to, addend);
            for (int j = 0; j < CHUNK; ++j) y[j] += addend[j];
          }
#endif
          store_chunk(out + to, y);
        }
      }
      if (pass == 0) {
        const float std = sqrtf(square / (D - 1)), wanted = sqrtf(square_untouched / (D - 1));
        gain = weight + (1.0f - weight) * (wanted / (std + 1e-6f));
        mean = weight * mean + (1.0f - weight) * untouched;
      }
    }
  }
}
