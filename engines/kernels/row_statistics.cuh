// Launch 1: the map of a softmask row, and per token its minimum, maximum and quantile.
// Legend: `decoupled_attention.cu`.
#pragma once

#include "attention_map.cuh"

constexpr int STATISTICS_WARPS = STATISTICS_THREADS / TILE;
constexpr int BINS = 1024, BIN_BITS = 10;
constexpr int SCANNERS = STATISTICS_THREADS / T;  // threads that scan one token's histogram
constexpr int BINS_EACH = BINS / SCANNERS;        // 8: two 16-byte loads

// Warp w leaves the minimum of its lanes' x[t] in shared[t][w].
__device__ inline void warp_minimum(const float (&x)[T], float (&shared)[T][STATISTICS_WARPS]) {
#pragma unroll
  for (int t = 0; t < T; ++t) {
    float lowest = x[t];
    for (int mask = TILE / 2; mask > 0; mask /= 2) {
      lowest = fminf(lowest, __shfl_xor_sync(ALL, lowest, mask));
    }
    if (threadIdx.x % TILE == 0) shared[t][threadIdx.x / TILE] = lowest;
  }
}

// The order statistic sought for one token: its bits lie in [low, low + 2^bits), where it is the one
// of 0-based rank `rank` among `count` elements.
struct Bracket {
  unsigned low, rank, count;
  int bits;
};

// Narrow a token's bracket to the histogram bin that holds its rank. Runs in the SCANNERS threads of
// the token; `sums` is one slot per warp. All threads of the block must call it.
__device__ inline void narrow(Bracket& bracket, const unsigned (&histogram)[BINS], int bin_width,
                              unsigned (&sums)[STATISTICS_WARPS]) {
  const int scanner = threadIdx.x % SCANNERS, lane = threadIdx.x % TILE;
  const uint4* mine = reinterpret_cast<const uint4*>(&histogram[scanner * BINS_EACH]);
  const uint4 a = mine[0], b = mine[1];
  const unsigned bins[BINS_EACH] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  unsigned sum = 0;
#pragma unroll
  for (int i = 0; i < BINS_EACH; ++i) sum += bins[i];
  unsigned through = sum;  // inclusive scan over the warp
#pragma unroll
  for (int distance = 1; distance < TILE; distance *= 2) {
    const unsigned below = __shfl_up_sync(ALL, through, distance);
    if (lane >= distance) through += below;
  }
  if (lane == TILE - 1) sums[threadIdx.x / TILE] = through;
  __syncthreads();
  unsigned before = through - sum;
  const int first = threadIdx.x / SCANNERS * (SCANNERS / TILE);
  for (int warp = first; warp < (int)threadIdx.x / TILE; ++warp) before += sums[warp];
  const unsigned rank = bracket.rank;
  __syncthreads();
  if (rank >= before && rank < before + sum) {  // true in exactly one thread of the token
#pragma unroll
    for (int i = 0; i < BINS_EACH; ++i) {
      if (rank >= before && rank < before + bins[i]) {
        bracket.low += (unsigned)(scanner * BINS_EACH + i) << bin_width;
        bracket.rank = rank - before;
        bracket.count = bins[i];
        bracket.bits = bin_width;
      }
      before += bins[i];
    }
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(STATISTICS_THREADS)
    decoupled_attention_statistics(const Scalar* __restrict__ q, const Scalar* __restrict__ k,
                                   const float* __restrict__ manipulation, int requests, int rows,
                                   int heads, int positions, float4* maps, float4* statistics) {
  const int head_row = blockIdx.x;  // b * H + h
  const float* row = manipulation + head_row / heads / (rows / requests) * COLUMNS;
  if (row[KIND] != SOFTMASK_KIND) return;
  const bool invert = row[INVERT_FIRST_TOKEN] > 0.5f;

  __shared__ float lowest[T][STATISTICS_WARPS], highest[T][STATISTICS_WARPS];
  __shared__ __align__(16) unsigned histogram[T][BINS];
  __shared__ unsigned sums[STATISTICS_WARPS];
  __shared__ Bracket brackets[T];

  const Lane lane;
  const int warp = threadIdx.x / TILE, token = threadIdx.x / SCANNERS;
  float4* map = maps + (long long)head_row * positions;
  float minimum[T], negated[T];  // the maximum is kept as the minimum of the negated map
#pragma unroll
  for (int t = 0; t < T; ++t) minimum[t] = negated[t] = LARGEST;
  {
    float chunk[T][CHUNK], a[T];
    load_tokens(k + first_element(head_row, heads, T), pitch_of(heads), lane, chunk);
    const Scalar* query = q + first_element(head_row, heads, positions);
    for (int first = warp * TILE; first < positions; first += STATISTICS_THREADS) {
      attention_map(query, pitch_of(heads), chunk, lane, first, positions, a);
      const int n = first + lane.owned();
      if (n < positions) map[n] = make_float4(a[0], a[1], a[2], a[3]);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const float x = entering(a[t], t, invert);
        minimum[t] = fminf(minimum[t], x), negated[t] = fminf(negated[t], -x);
      }
    }
  }
  warp_minimum(minimum, lowest);
  warp_minimum(negated, highest);
  __syncthreads();
#pragma unroll
  for (int t = 0; t < T; ++t) {
    minimum[t] = lowest[t][0], negated[t] = highest[t][0];
    for (int w = 1; w < STATISTICS_WARPS; ++w) {
      minimum[t] = fminf(minimum[t], lowest[t][w]), negated[t] = fminf(negated[t], highest[t][w]);
    }
  }

  // In float64: 0.65 * 16383 in float32 would move the fraction by 10^-3.
  const double place = (double)row[QUANTILE] * (positions - 1);
  const unsigned rank = min(max((int)place, 0), positions - 1);
  const float fraction = (float)(place - rank);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const unsigned low = __float_as_uint(minimum[t]);
      const unsigned extent = __float_as_uint(-negated[t]) - low;
      brackets[t] = {low, rank, (unsigned)positions, 32 - __clz(extent)};
    }
  }
  for (int pass = 0; pass < 3; ++pass) {
    for (int i = threadIdx.x; i < T * BINS; i += STATISTICS_THREADS) histogram[i / BINS][i % BINS] = 0;
    __syncthreads();
    unsigned low[T];
    int wide[T], slim[T];
#pragma unroll
    for (int t = 0; t < T; ++t) {
      low[t] = brackets[t].low, wide[t] = brackets[t].bits, slim[t] = max(wide[t] - BIN_BITS, 0);
    }
    for (int n = threadIdx.x; n < positions; n += STATISTICS_THREADS) {
      const float4 a = map[n];
      const float x[T] = {entering(a.x, 0, invert), a.y, a.z, a.w};
#pragma unroll
      for (int t = 0; t < T; ++t) {
        // An element under the bracket wraps around to a large offset, so one test serves both ends.
        const unsigned offset = __float_as_uint(x[t]) - low[t];
        if (offset >> wide[t] == 0) atomicAdd(&histogram[t][offset >> slim[t]], 1u);
      }
    }
    __syncthreads();
    narrow(brackets[token], histogram[token], max(brackets[token].bits - BIN_BITS, 0), sums);
  }

  // Linear interpolation needs the next order statistic: the same value, or the least one above it.
  float above[T];
#pragma unroll
  for (int t = 0; t < T; ++t) above[t] = LARGEST;
  for (int n = threadIdx.x; n < positions; n += STATISTICS_THREADS) {
    const float4 a = map[n];
    const float x[T] = {entering(a.x, 0, invert), a.y, a.z, a.w};
#pragma unroll
    for (int t = 0; t < T; ++t) {
      if (x[t] > __uint_as_float(brackets[t].low)) above[t] = fminf(above[t], x[t]);
    }
  }
  warp_minimum(above, lowest);
  __syncthreads();
  if (threadIdx.x == 0) {
    float quantile[T];
    for (int t = 0; t < T; ++t) {
      float next = -negated[t];  // nothing above the maximum
      for (int w = 0; w < STATISTICS_WARPS; ++w) next = fminf(next, lowest[t][w]);
      const float lower = __uint_as_float(brackets[t].low);
      if (brackets[t].rank + 1 < brackets[t].count) next = lower;
      quantile[t] = fmaxf(fmaf(fraction, next - lower, lower), 1e-6f);
    }
    float4* mine = statistics + head_row * 3;
    mine[0] = make_float4(minimum[0], minimum[1], minimum[2], minimum[3]);
    mine[1] = make_float4(-negated[0], -negated[1], -negated[2], -negated[3]);
    mine[2] = make_float4(quantile[0], quantile[1], quantile[2], quantile[3]);
  }
}
