// The CUDA version of the operator on a machine without a GPU. ONNX Runtime's CPU provider is told
// that it runs there, streams are what the test says, and the driver is the one below: it runs the
// kernels through emulation.h and is strict about contexts, captures, grids, and memory that is not
// its own. engines/kernels/ort_operator.cpp itself is compiled as it is.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "emulation.h"  // before what it emulates

#include "decoupled_attention.cu"

void* stand_in_symbol(const char* name);
#define dlopen(name, flags) (stand_in_driver ? (void*)name : nullptr)
#define dlsym(library, name) stand_in_symbol(name)
#define RegisterCustomOps register_operator
static bool stand_in_driver = true;
#include "ort_operator.cpp"
#undef dlopen
#undef dlsym
#undef RegisterCustomOps

namespace stand_in {

using Handle = void*;
enum {
  OK = 0,
  INVALID = 1,
  NO_MEMORY = 2,
  INVALID_IMAGE = 200,
  BAD_CONTEXT = 201,
  UNSUPPORTED = 900
};

struct Module {
  Handle context;
  std::string text;
};
struct Function {
  Module* module;
  bool statistics;
};
struct Launch {
  uint64_t context, stream, grid_x, grid_y, scratch;
};

std::mutex guard, running;
Handle stream, stream_context, first_context;  // of the next call; what new threads find
thread_local Handle current = (Handle)-1;
thread_local int mode = 0;
int minor_version = 0, pause = 0;
bool full = false, capturing = false;
std::map<uint64_t, std::vector<char>> memory;
std::set<Module*> modules;
std::vector<Launch> launches;
std::string images;

Handle context() { return current == (Handle)-1 ? first_context : current; }
bool apart() { return mode == 2; }

int get_current(Handle* to) { return *to = context(), OK; }
int set_current(Handle to) { return current = to, OK; }
thread_local std::vector<Handle> stack;
int push(Handle to) { return stack.push_back(context()), current = to, OK; }
int pop(Handle* from) { return *from = current, current = stack.back(), stack.pop_back(), OK; }
int device(int* to) { return context() ? (*to = 0, OK) : BAD_CONTEXT; }
int attribute(int* to, int which, int) {
  return which == 75 ? (*to = 9, OK) : which == 76 ? (*to = minor_version, OK) : INVALID;
}
int error_name(int code, const char** to) {
  *to = code == NO_MEMORY       ? "CUDA_ERROR_OUT_OF_MEMORY"
        : code == INVALID_IMAGE ? "CUDA_ERROR_INVALID_IMAGE"
                                : "CUDA_ERROR_OTHER";
  return OK;
}
int stream_owner(Handle, Handle* to) { return *to = stream_context, OK; }
int is_capturing(Handle, int* to) { return *to = capturing, OK; }
int exchange(int* with) { return std::swap(mode, *with), OK; }

int load(Handle* to, const void* image) {
  const std::string text = static_cast<const char*>(image);
  if (!context() || capturing || !apart()) return UNSUPPORTED;
  if (text.compare(0, 4, "code")) return INVALID_IMAGE;
  images += text + "\n";
  Module* made = new Module{context(), text};
  return *to = made, modules.insert(made), OK;
}
int function(Handle* to, Handle module, const char* name) {
  const bool statistics = !strcmp(name, "decoupled_attention_statistics");
  if (!statistics && strcmp(name, "decoupled_attention")) return INVALID;
  return *to = new Function{(Module*)module, statistics}, OK;
}
int unload(Handle module) {
  Module* one = (Module*)module;
  if (one->context != context() || !apart()) return BAD_CONTEXT;
  return modules.erase(one) ? OK : INVALID;
}
int allocate(unsigned long long* to, size_t bytes) {
  const std::lock_guard<std::mutex> lock(guard);
  if (!context() || capturing || !apart()) return UNSUPPORTED;
  if (full) return NO_MEMORY;
  std::vector<char> block(bytes + 256, '\xff');  // NaN, if somebody relies on it
  const uint64_t at = ((uint64_t)block.data() + 255) / 256 * 256;
  return memory[at] = std::move(block), *to = at, OK;
}
int release(unsigned long long at) {
  const std::lock_guard<std::mutex> lock(guard);
  return memory.erase(at) ? OK : INVALID;
}
bool holds(uint64_t maps, uint64_t statistics, uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = memory.find(maps);
  return found != memory.end() && statistics + bytes <= maps + found->second.size() - 256;
}

int launch(Handle handle, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty,
           unsigned tz, unsigned shared, Handle on, void** p, void** extra) {
  const Function& f = *(Function*)handle;
  if (f.module->context != context() || !modules.count(f.module)) return BAD_CONTEXT;
  if (z != 1 || ty != 1 || tz != 1 || shared || extra) return INVALID;
  const auto count = [&](int i) { return *(int*)p[i]; };
  const auto in = [&](int i) { return *(const Scalar**)p[i]; };
  const auto single = [&](int i) { return *(const float**)p[i]; };
#if TOKENS == 4
  const auto scratch = [&](int i) { return *(float4**)p[i]; };
#define MASK(i)
#else
  const auto scratch = [&](int i) { return *(float**)p[i]; };
#define MASK(i) , single(i)
#endif
  std::unique_lock<std::mutex> lock(running);
  const int at = f.statistics ? 7 : 5, sizes = f.statistics ? 3 : 7;
  const uint64_t rows = (uint64_t)count(sizes + 1) * count(sizes + 2);
  if (!holds((uint64_t)scratch(at), (uint64_t)scratch(at + 1), rows * 3 * T * 4)) return INVALID;
  launches.push_back({(uint64_t)context(), (uint64_t)on, x, y, (uint64_t)scratch(at)});
  if (f.statistics) {
    if (x != rows || y != 1 || threads != STATISTICS_THREADS) return INVALID;
    const bool done = emulation::emulate(decoupled_attention_statistics, {x, y, z}, threads, false,
                                         in(0), in(1), single(2), count(3), count(4), count(5),
                                         count(6), scratch(7), scratch(8) MASK(9));
    lock.unlock();
    usleep(pause);  // so that another thread's launch would come in between
    return done ? OK : INVALID;
  }
  if (y != rows || x != unsigned(count(10) + OUTPUT_POSITIONS - 1) / OUTPUT_POSITIONS ||
      threads != OUTPUT_THREADS)
    return INVALID;
  return emulation::emulate(decoupled_attention, {x, y, z}, threads, false, in(0), in(1), in(2),
                            single(3), single(4), scratch(5), scratch(6), count(7), count(8),
                            count(9), count(10), *(Scalar**)p[11], in(12) MASK(13))
             ? OK
             : INVALID;
}

namespace ort = fastface_operator;
void* table[271];
void* const* (*real_api)(uint32_t) noexcept;
std::list<ort::Operator> posing;

ort::Status* add(ort::Domain* domain, const ort::CustomOp* op) {
  if (strcmp(op->GetExecutionProviderType(op), "CUDAExecutionProvider")) return nullptr;
  posing.push_back(*static_cast<const ort::Operator*>(op));
  posing.back().GetExecutionProviderType = [](const ort::CustomOp*) {
    return "CPUExecutionProvider";
  };
  return ort::Api(real_api(18)).CustomOpDomain_Add(domain, &posing.back());
}
ort::Status* compute_stream(const ort::Context* context, void** to) {
  ort::Status* status = ort::Api(real_api(18)).KernelContext_GetGPUComputeStream(context, to);
  const std::lock_guard<std::mutex> lock(guard);
  return *to = stream, status;
}
void* const* patched_api(uint32_t version) noexcept {
  void* const* real = real_api(version);
  std::copy(real, real + 271, table);
  table[27] = (void*)add, table[193] = (void*)compute_stream;
  return table;
}

}  // namespace stand_in

void* stand_in_symbol(const char* name) {
  using namespace stand_in;
  static const std::map<std::string, void*> symbols = {
      {"cuCtxGetCurrent", (void*)get_current},
      {"cuCtxSetCurrent", (void*)set_current},
      {"cuCtxPushCurrent_v2", (void*)push},
      {"cuCtxPopCurrent_v2", (void*)pop},
      {"cuCtxGetDevice", (void*)device},
      {"cuDeviceGetAttribute", (void*)attribute},
      {"cuGetErrorName", (void*)error_name},
      {"cuStreamGetCtx", (void*)stream_owner},
      {"cuStreamIsCapturing", (void*)is_capturing},
      {"cuThreadExchangeStreamCaptureMode", (void*)exchange},
      {"cuModuleLoadData", (void*)load},
      {"cuModuleGetFunction", (void*)function},
      {"cuModuleUnload", (void*)unload},
      {"cuMemAlloc_v2", (void*)allocate},
      {"cuMemFree_v2", (void*)release},
      {"cuLaunchKernel", (void*)launch}};
  const auto found = symbols.find(name);
  return found == symbols.end() ? nullptr : found->second;
}

extern "C" fastface_operator::Status* RegisterCustomOps(fastface_operator::Options* options,
                                                        const fastface_operator::ApiBase* runtime) {
  stand_in::real_api = runtime->GetApi;
  const fastface_operator::ApiBase patched{stand_in::patched_api, runtime->GetVersionString};
  return register_operator(options, &patched);
}

extern "C" void on(uint64_t context, uint64_t stream, uint64_t stream_context) {
  const std::lock_guard<std::mutex> lock(stand_in::guard);
  stand_in::first_context = (void*)context, stand_in::stream = (void*)stream;
  stand_in::stream_context = (void*)stream_context;
  stand_in::current = (void*)-1;
}
extern "C" void set(int capturing, int full, int pause, int minor_version, int driver) {
  stand_in::capturing = capturing, stand_in::full = full, stand_in::pause = pause;
  stand_in::minor_version = minor_version, stand_in_driver = driver;
}
extern "C" size_t blocks() { return stand_in::memory.size(); }
extern "C" size_t modules() { return stand_in::modules.size(); }
extern "C" size_t launches(stand_in::Launch* to, size_t limit) {
  const size_t count = std::min(limit, stand_in::launches.size());
  std::copy_n(stand_in::launches.begin(), count, to);
  return stand_in::launches.clear(), count;
}
extern "C" const char* images() { return stand_in::images.c_str(); }
