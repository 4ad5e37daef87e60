// A = softmax(Q K'^T / sqrt(D)) of 32 positions by one warp, and the loads and stores around it.
// Legend: `decoupled_attention.cu`.
#pragma once

#ifndef HEAD_SIZE
#define HEAD_SIZE 64
#endif
#ifndef FLOAT32
#define FLOAT32 0
#endif
#ifndef TOKENS
#define TOKENS 4
#endif
#ifndef HEADS_LAST
#define HEADS_LAST 0
#endif

constexpr int T = TOKENS;
constexpr int D = HEAD_SIZE;
constexpr int CHUNK = 8;  // elements of a head that one lane holds
constexpr int CHUNKS = D / CHUNK;
constexpr int LANES = CHUNKS <= 1 ? 1 : CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : 16;
constexpr int TILE = 32;  // positions that a warp works on at a time: one per lane
constexpr int STRIDE = TILE / LANES;  // positions that a warp loads at a time
static_assert(D % CHUNK == 0 && D >= 8 && D <= 128, "head size: a multiple of 8 from 8 to 128");

constexpr int STATISTICS_THREADS = 512;
constexpr int OUTPUT_THREADS = 256;
constexpr int OUTPUT_POSITIONS = 512;  // per block of launch 2
constexpr unsigned ALL = 0xffffffffu;  // every lane of a warp takes part in every shuffle
constexpr float LARGEST = 3.4028235e38f;

// Columns of `manipulation`.
constexpr int KIND = 0, SCALE = 1, POWER = 2, QUANTILE = 3, SHARPNESS = 4, ADAIN_WEIGHT = 5;
constexpr int INVERT_FIRST_TOKEN = 6, UPPER_BOUND = 7, COLUMNS = 8;
constexpr float SCALE_POWER_KIND = 1.0f, SOFTMASK_KIND = 2.0f;

#if FLOAT32
using Scalar = float;

__device__ inline void load_chunk(const Scalar* from, float (&x)[CHUNK]) {
  const float4 a = reinterpret_cast<const float4*>(from)[0];
  const float4 b = reinterpret_cast<const float4*>(from)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ inline void store_chunk(Scalar* to, const float (&x)[CHUNK]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
#else
using Scalar = unsigned short;  // the bits of an fp16 number: cuda_fp16.h would need a toolkit

#ifndef FASTFACE_EMULATED
__device__ inline void unpack_half2(unsigned packed, float& low, float& high) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(low), "=f"(high)
      : "r"(packed));
}

__device__ inline unsigned pack_half2(float low, float high) {
  unsigned packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
#endif

__device__ inline void load_chunk(const Scalar* from, float (&x)[CHUNK]) {
  const uint4 packed = *reinterpret_cast<const uint4*>(from);
  unpack_half2(packed.x, x[0], x[1]);
  unpack_half2(packed.y, x[2], x[3]);
  unpack_half2(packed.z, x[4], x[5]);
  unpack_half2(packed.w, x[6], x[7]);
}

__device__ inline void store_chunk(Scalar* to, const float (&x)[CHUNK]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(pack_half2(x[0], x[1]), pack_half2(x[2], x[3]),
                                             pack_half2(x[4], x[5]), pack_half2(x[6], x[7]));
}
#endif

// Where a lane stands in its warp: which chunk of a head it holds and which position it owns.
struct Lane {
  int index, chunk, group;
  bool holds;  // false beyond the end of a head whose chunks are no power of two
  __device__ Lane()
      : index(threadIdx.x % TILE), chunk(index % LANES), group(index / LANES), holds(chunk < CHUNKS) {}
  __device__ int owned() const { return chunk * STRIDE + group; }
};

// Where one (b, h) lies in a tensor of `count` positions or tokens: its first element, and how many
// elements there are from one position to the next.
__device__ inline long long first_element(int head_row, int heads, int count) {
  if (!HEADS_LAST) return (long long)head_row * count * D;
  return ((long long)(head_row / heads) * count * heads + head_row % heads) * D;
}

__device__ inline int pitch_of(int heads) { return HEADS_LAST ? heads * D : D; }

#if TOKENS == 4
// This lane's chunk of the T rows of one (b, h) of k or v.
__device__ inline void load_tokens(const Scalar* tokens, int pitch, const Lane& lane,
                                   float (&x)[T][CHUNK]) {
#pragma unroll
  for (int t = 0; t < T; ++t) {
    if (lane.holds) {
      load_chunk(tokens + t * pitch + lane.chunk * CHUNK, x[t]);
    } else {
      for (int j = 0; j < CHUNK; ++j) x[t][j] = 0.0f;
    }
  }
}

// One round of the butterfly: of 2 * HALF rows of partial sums each lane keeps HALF, added to those
// of the lane that differs in this bit of its chunk.
template <int HALF>
__device__ inline void reduce_scatter(float (&partial)[LANES][T], int chunk) {
  const bool upper = chunk & HALF;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const float kept = upper ? partial[i + HALF][t] : partial[i][t];
      const float given = upper ? partial[i][t] : partial[i + HALF][t];
      partial[i][t] = kept + __shfl_xor_sync(ALL, given, HALF);
    }
  }
  if constexpr (HALF > 1) reduce_scatter<HALF / 2>(partial, chunk);
}

// Softmax over tokens of the position that this lane owns in the tile that starts at `first`.
// Positions beyond the last repeat it: every lane of the warp takes part in the shuffles.
__device__ inline void attention_map(const Scalar* q, int pitch, const float (&k)[T][CHUNK],
                                     const Lane& lane, int first, int positions, float (&a)[T]) {
  float partial[LANES][T];
#pragma unroll
  for (int step = 0; step < LANES; ++step) {
    const int n = min(first + step * STRIDE + lane.group, positions - 1);
    float x[CHUNK] = {};
    if (lane.holds) load_chunk(q + n * pitch + lane.chunk * CHUNK, x);
#pragma unroll
    for (int t = 0; t < T; ++t) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < CHUNK; ++j) sum = fmaf(x[j], k[t][j], sum);
      partial[step][t] = sum;
    }
  }
  if constexpr (LANES > 1) reduce_scatter<LANES / 2>(partial, lane.chunk);

  const float scale = rsqrtf((float)D);
  const float peak = fmaxf(fmaxf(partial[0][0], partial[0][1]), fmaxf(partial[0][2], partial[0][3]));
  float total = 0.0f;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    a[t] = expf((partial[0][t] - peak) * scale);
    total += a[t];
  }
#pragma unroll
  for (int t = 0; t < T; ++t) a[t] /= total;
}

#endif

// Token 0 enters inverted where the request asks for it (appendix E).
__device__ inline float entering(float a, int token, bool invert) {
  return invert && token == 0 ? 1.0f - a : a;
}
