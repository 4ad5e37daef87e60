// Just enough CUDA for g++ to run the kernels: every thread of a block is a fibre, blocks run one
// after another. A fibre runs until it reaches a barrier or a shuffle, so a missing barrier shows as
// a result that changes with the order in which fibres are resumed (`reversed`), and lanes that
// disagree on a shuffle show as a deadlock, which `emulate` reports.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define FASTFACE_EMULATED 1
#define __device__
#define __global__
#define __shared__ static  // one block at a time, so one copy is right; its first content is not zero
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Dim3 { unsigned x, y, z; };
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return (*to += value) - value; }

inline float half_value(uint16_t bits) { _Float16 x; memcpy(&x, &bits, 2); return (float)x; }
inline uint16_t half_bits(float x) { _Float16 h = (_Float16)x; uint16_t b; memcpy(&b, &h, 2); return b; }
inline void unpack_half2(unsigned packed, float& low, float& high) {
  low = half_value(packed & 0xffff), high = half_value(packed >> 16);
}
inline unsigned pack_half2(float low, float high) {
  return half_bits(low) | (unsigned)half_bits(high) << 16;
}

namespace emulation {

constexpr int WARP = 32;
constexpr size_t STACK = 64 * 1024;

struct Barrier { int size, waiting = 0; unsigned generation = 0; };

struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  Barrier* at = nullptr;  // the barrier it waits at, and the generation that it waits for to end
  unsigned generation = 0;
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fibre> fibres;
inline std::vector<Barrier> warps;
inline std::vector<uint32_t> slots;
inline Barrier block;
inline int current;
inline std::function<void()> kernel;

inline void wait(Barrier& barrier) {
  Fibre& self = fibres[current];
  self.at = &barrier, self.generation = barrier.generation;
  if (++barrier.waiting == barrier.size) barrier.waiting = 0, ++barrier.generation;
  swapcontext(&self.context, &scheduler);
}

inline void enter() {
  kernel();
  fibres[current].done = true;
  swapcontext(&fibres[current].context, &scheduler);
}

// Run one block; false where no fibre can go on and not all of them are done.
inline bool run_block(bool reversed) {
  const int threads = blockDim.x;
  fibres.resize(threads);
  warps.assign(threads / WARP, {WARP});
  slots.assign(threads, 0);
  block = {threads};
  for (Fibre& fibre : fibres) {
    fibre.stack.resize(STACK), fibre.at = nullptr, fibre.done = false;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = STACK;
    makecontext(&fibre.context, (void (*)())enter, 0);
  }
  for (int left = threads; left > 0;) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      current = reversed ? threads - 1 - i : i;
      Fibre& fibre = fibres[current];
      if (fibre.done || (fibre.at && fibre.at->generation == fibre.generation)) continue;
      threadIdx = {(unsigned)current, 0, 0};
      swapcontext(&scheduler, &fibre.context);
      moved = true, left -= fibre.done;
    }
    if (!moved) return false;
  }
  return true;
}

template <typename... Parameters, typename... Arguments>
bool emulate(void (*entry)(Parameters...), Dim3 grid, unsigned threads, bool reversed,
             Arguments... arguments) {
  gridDim = grid, blockDim = {threads, 1, 1};
  kernel = [=] { entry((Parameters)arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      if (!run_block(reversed)) return false;
    }
  }
  return true;
}

template <typename Value>
Value exchange(Value value, int source) {
  static_assert(sizeof(Value) == 4);
  const int self = current, warp = self / WARP;
  memcpy(&slots[self], &value, 4);
  wait(warps[warp]);
  memcpy(&value, &slots[warp * WARP + source], 4);
  wait(warps[warp]);  // nobody overwrites a slot that another lane has still to read
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block); }
template <typename Value>
Value __shfl_sync(unsigned, Value value, int source) {
  return emulation::exchange(value, source);
}
template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return emulation::exchange(value, (emulation::current % emulation::WARP) ^ mask);
}
template <typename Value>
Value __shfl_up_sync(unsigned, Value value, int distance) {
  const int lane = emulation::current % emulation::WARP;
  return emulation::exchange(value, lane < distance ? lane : lane - distance);
}
