// The two launches of engines/kernels/decoupled_attention.cu, run by g++ through emulation.h.
#include "emulation.h"

#include "decoupled_attention.cu"

#if TOKENS == 4
using MapsOf = float4;
#define MASK
#else
using MapsOf = float;
#define MASK , token_mask
#endif

// 0 when both launches ran, 1 or 2 for the launch whose threads waited for each other for ever.
extern "C" int run(const Scalar* q, const Scalar* k, const Scalar* v, const float* manipulation,
                   const float* ip_scale, int requests, int rows, int heads, int positions,
                   MapsOf* maps, MapsOf* statistics, Scalar* out, const Scalar* base,
                   const float* token_mask, int reversed) {
  (void)base, (void)token_mask;  // where heads come last, and where there are not four tokens
  const unsigned head_rows = rows * heads;
  const unsigned blocks = (positions + OUTPUT_POSITIONS - 1) / OUTPUT_POSITIONS;
  if (!emulation::emulate(decoupled_attention_statistics, {head_rows, 1, 1}, STATISTICS_THREADS,
                          reversed, q, k, manipulation, requests, rows, heads, positions, maps,
                          statistics MASK)) {
    return 1;
  }
  return emulation::emulate(decoupled_attention, {blocks, head_rows, 1}, OUTPUT_THREADS, reversed, q,
                            k, v, manipulation, ip_scale, maps, statistics, requests, rows, heads,
#if HEADS_LAST
                            positions, out, base MASK)
#else
                            positions, out MASK)
#endif
             ? 0
             : 2;
}
