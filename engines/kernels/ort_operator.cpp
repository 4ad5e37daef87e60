// fastface.kernels::DecoupledAttention for ONNX Runtime: base + lambda f(A) V' of Eq. 1 and 6
// to 10.
//
//   q, base, output [B, N, H * D]   k, v [B, T, H * D]   all float16 or all float32
//   manipulation [R, 8]   ip_scale [R]   token_mask [B, T]   all float32; attribute num_heads = H
// base and token_mask are optional; four tokens take no mask, for whose kernels it is not made.
// Legend: `decoupled_attention.cu`, whose two kernels are the version for the CUDA provider: they
// go onto the provider's stream, and nothing is allocated or waited for while the stream is
// captured. The version for the CPU provider evaluates the equations in double and rounds once.
//
// Neither ONNX Runtime's header nor CUDA's is needed. What is used of their interfaces is declared
// here; the driver is opened at the first call, so the library loads on machines without one.
// Kernel code lies in files beside the library, so that an engine carries only what its GPU takes.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef FASTFACE_SOURCES
#define FASTFACE_SOURCES "unknown"
#endif

extern "C" __attribute__((visibility("default"), used)) const char fastface_kernels_sources[] =
    "fastface kernels " FASTFACE_SOURCES;

namespace fastface_operator {

// ---- ONNX Runtime's C interface
// ------------------------------------------------------------------ OrtApi is a table of pointers
// that only ever grows. The indices were read from the headers of API versions 16 to 29 (ONNX
// Runtime 1.16 to 1.29), which agree; the layout of OrtCustomOp from 1.29's.

struct Status;        // OrtStatus
struct Value;         // OrtValue
struct TypeAndShape;  // OrtTensorTypeAndShapeInfo
struct KernelInfo;    // OrtKernelInfo
struct Context;       // OrtKernelContext
struct ShapeContext;  // OrtShapeInferContext
struct Domain;        // OrtCustomOpDomain
struct Options;       // OrtSessionOptions
struct CustomOp;

constexpr uint32_t API_VERSION = 18;
constexpr int FLOAT = 1, FLOAT16 = 10;         // ONNXTensorElementDataType
constexpr int REQUIRED = 0, OPTIONAL = 1;      // OrtCustomOpInputOutputCharacteristic
constexpr int FAIL = 1, INVALID_ARGUMENT = 2;  // OrtErrorCode

struct ApiBase {  // OrtApiBase
  void* const* (*GetApi)(uint32_t version) noexcept;
  const char* (*GetVersionString)() noexcept;
};

struct Api {
  Status* (*CreateStatus)(int code, const char* message);
  const char* (*GetErrorMessage)(const Status*);
  Status* (*CreateCustomOpDomain)(const char* name, Domain**);
  Status* (*CustomOpDomain_Add)(Domain*, const CustomOp*);
  Status* (*AddCustomOpDomain)(Options*, Domain*);
  Status* (*GetTensorMutableData)(Value*, void**);
  Status* (*GetDimensionsCount)(const TypeAndShape*, size_t*);
  Status* (*GetDimensions)(const TypeAndShape*, int64_t*, size_t);
  Status* (*GetSymbolicDimensions)(const TypeAndShape*, const char**, size_t);
  Status* (*GetTensorTypeAndShape)(const Value*, TypeAndShape**);
  Status* (*KernelInfoGetAttribute_int64)(const KernelInfo*, const char*, int64_t*);
  Status* (*KernelContext_GetInputCount)(const Context*, size_t*);
  Status* (*KernelContext_GetInput)(const Context*, size_t, const Value**);
  Status* (*KernelContext_GetOutput)(Context*, size_t, const int64_t*, size_t, Value**);
  void (*ReleaseStatus)(Status*);
  void (*ReleaseTensorTypeAndShapeInfo)(TypeAndShape*);
  Status* (*KernelContext_GetGPUComputeStream)(const Context*, void**);
  Status* (*ShapeInferContext_GetInputTypeShape)(const ShapeContext*, size_t, TypeAndShape**);
  Status* (*ShapeInferContext_SetOutputTypeShape)(const ShapeContext*, size_t, const TypeAndShape*);

  explicit Api(void* const* table) {
    const auto read = [&](auto& function, int index) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(table[index]);
    };
    read(CreateStatus, 0), read(GetErrorMessage, 2);
    read(CreateCustomOpDomain, 26), read(CustomOpDomain_Add, 27), read(AddCustomOpDomain, 28);
    read(GetTensorMutableData, 51), read(GetDimensionsCount, 61), read(GetDimensions, 62);
    read(GetSymbolicDimensions, 63), read(GetTensorTypeAndShape, 65);
    read(KernelInfoGetAttribute_int64, 86), read(KernelContext_GetInputCount, 88);
    read(KernelContext_GetInput, 90), read(KernelContext_GetOutput, 91), read(ReleaseStatus, 93);
    read(ReleaseTensorTypeAndShapeInfo, 99), read(KernelContext_GetGPUComputeStream, 193);
    read(ShapeInferContext_GetInputTypeShape, 268), read(ShapeInferContext_SetOutputTypeShape, 270);
  }
};

struct CustomOp {  // OrtCustomOp of API version 18; callbacks that are left null are not used
  uint32_t version = API_VERSION;
  void* CreateKernel = nullptr;
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void* KernelCompute = nullptr;
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, Context*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  void *GetMayInplace = nullptr, *ReleaseMayInplace = nullptr;
  void *GetAliasMap = nullptr, *ReleaseAliasMap = nullptr;
};
static_assert(sizeof(CustomOp) == 26 * sizeof(void*), "OrtCustomOp has 26 words");

const Api* api = nullptr;  // the process's one, set when the first session registers the library

struct Failure {
  std::string text;
  int code = FAIL;
};

void ask(Status* status) {  // of ONNX Runtime
  if (!status) return;
  Failure failure{api->GetErrorMessage(status)};
  api->ReleaseStatus(status);
  throw failure;
}

template <typename Body>
Status* guarded(Body body) noexcept {  // no exception crosses into ONNX Runtime
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return api->CreateStatus(failure.code, ("DecoupledAttention: " + failure.text).c_str());
  } catch (const std::exception& error) {
    return api->CreateStatus(FAIL, error.what());
  }
}

// ---- One call
// --------------------------------------------------------------------------------------

constexpr int USUAL_TOKENS = 4, MOST_TOKENS = 256, COLUMNS = 8;
constexpr int STATISTICS_THREADS = 512, OUTPUT_THREADS = 256, OUTPUT_POSITIONS = 512;
constexpr int STATISTICS_PER_HEAD = 3;

using Shape = std::vector<int64_t>;

struct Tensor {
  Shape shape;
  void* data = nullptr;  // null for an input that is left out
};

struct Call {
  Tensor q, k, v, manipulation, ip_scale, base, mask;
  int64_t requests, rows, heads, positions, head_size, tokens;
  void* out;
};

std::string text(const Shape& shape) {
  std::string listed;
  for (int64_t size : shape) listed += (listed.empty() ? "" : ", ") + std::to_string(size);
  return "[" + listed + "]";
}

Tensor input(const Context* context, size_t index) {
  Tensor tensor;
  size_t count, rank;
  ask(api->KernelContext_GetInputCount(context, &count));
  const Value* value = nullptr;
  if (index < count) ask(api->KernelContext_GetInput(context, index, &value));
  if (!value) return tensor;
  TypeAndShape* info;
  ask(api->GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<TypeAndShape, void (*)(TypeAndShape*)> owner(
      info, api->ReleaseTensorTypeAndShapeInfo);
  ask(api->GetDimensionsCount(info, &rank));
  tensor.shape.resize(rank);
  ask(api->GetDimensions(info, tensor.shape.data(), rank));
  ask(api->GetTensorMutableData(const_cast<Value*>(value), &tensor.data));
  return tensor;
}

void expect(const char* name, const Tensor& tensor, const Shape& shape) {
  if (tensor.shape == shape) return;
  throw Failure{std::string(name) + " is " + text(tensor.shape) + " and has to be " + text(shape) +
                    ", as many image tokens everywhere and one parameter row per request.",
                INVALID_ARGUMENT};
}

// The inputs of a call, checked; false where there is nothing to compute.
bool read(Context* context, int64_t heads, Call& call) {
  Tensor* const inputs[] = {&call.q,        &call.k,   &call.v, &call.manipulation,
                            &call.ip_scale, &call.base, &call.mask};
  for (size_t i = 0; i < 7; ++i) *inputs[i] = input(context, i);
  const Shape& q = call.q.shape;
  if (q.size() != 3 || q[2] % heads) {
    throw Failure{"q is " + text(q) +
                      " and has to be [B, N, H * D] with H = " + std::to_string(heads) + " heads.",
                  INVALID_ARGUMENT};
  }
  const int64_t requests = call.ip_scale.shape.empty() ? 0 : call.ip_scale.shape[0];
  if (requests < 1 || q[0] % requests) {
    throw Failure{std::to_string(q[0]) + " rows do not divide into " + std::to_string(requests) +
                      " requests.",
                  INVALID_ARGUMENT};
  }
  call.requests = requests, call.rows = q[0], call.positions = q[1];
  call.heads = heads, call.head_size = q[2] / heads;
  call.tokens = call.k.shape.size() == 3 ? call.k.shape[1] : USUAL_TOKENS;
  if (call.tokens < 2 || call.tokens > MOST_TOKENS) {
    throw Failure{"k is " + text(call.k.shape) + "; 2 to " + std::to_string(MOST_TOKENS) +
                      " image tokens are taken.",
                  INVALID_ARGUMENT};
  }
  expect("k", call.k, {q[0], call.tokens, q[2]}), expect("v", call.v, {q[0], call.tokens, q[2]});
  expect("manipulation", call.manipulation, {requests, COLUMNS});
  expect("ip_scale", call.ip_scale, {requests});
  if (call.base.data || !call.base.shape.empty()) expect("base", call.base, q);
  if (call.mask.data || !call.mask.shape.empty()) {
    expect("token_mask", call.mask, {q[0], call.tokens});
    if (call.tokens == USUAL_TOKENS) {
      throw Failure{"four image tokens take no mask.", INVALID_ARGUMENT};
    }
  }
  Value* output;
  ask(api->KernelContext_GetOutput(context, 0, q.data(), q.size(), &output));
  ask(api->GetTensorMutableData(output, &call.out));
  return q[0] && q[1] && q[2];
}

// ---- CPU
// ---------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};

double value(float x) { return x; }
double value(Half half) {
  // An fp16 exponent, moved into a float's place, is 112 too small: also for subnormal numbers.
  uint32_t bits = (half.bits & 0x7fffu) << 13;
  if (bits >= 0x1fu << 23) bits |= 0x7fu << 24;  // infinity, NaN
  float x;
  std::memcpy(&x, &bits, 4);
  if (bits < 0x1fu << 23) x *= 5.192296858534828e33f;  // 2^112
  return half.bits & 0x8000u ? -x : x;
}

void put(float& to, double x) { to = (float)x; }
void put(Half& to, double x) {
  const double size = std::fabs(x);
  uint16_t bits;
  if (std::isnan(x)) {
    bits = 0x7e00;
  } else if (size >= 65520) {
    bits = 0x7c00;
  } else if (size < 1.0 / 16384) {  // subnormal: a multiple of 2^-24
    bits = (uint16_t)std::nearbyint(size * 16777216);
  } else {
    int exponent;  // size = fraction * 2^exponent, 1/2 <= fraction < 1
    const double fraction = std::frexp(size, &exponent);
    // A fraction that rounds up to 2048 carries into the exponent, as it should.
    bits = (uint16_t)(((exponent + 13) << 10) + (int)std::nearbyint(fraction * 2048));
  }
  to.bits = bits | (std::signbit(x) ? 0x8000 : 0);
}

// w x + (1 - w) AdaIN(x, a) of Eq. 10 over `count` numbers, in place.
void match(double* x, const double* a, int64_t count, double weight) {
  double mean_x = 0, mean_a = 0, square_x = 0, square_a = 0;
  for (int64_t i = 0; i < count; ++i) mean_x += x[i] / count, mean_a += a[i] / count;
  for (int64_t i = 0; i < count; ++i) {
    square_x += (x[i] - mean_x) * (x[i] - mean_x), square_a += (a[i] - mean_a) * (a[i] - mean_a);
  }
  const double gain =
      std::sqrt(square_a / (count - 1)) / (std::sqrt(square_x / (count - 1)) + 1e-6);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = weight * x[i] + (1 - weight) * ((x[i] - mean_x) * gain + mean_a);
  }
}

// x to the place in [low, high] where it lies; 0 where there is no extent.
double share(double x, double low, double high) {
  return high > low ? (x - low) / (high - low) : 0;
}

// The quantile of Eq. 8, interpolated as numpy does; `x` is left in another order.
double quantile(std::vector<double>& x, double level) {
  const double place = level * (x.size() - 1);
  const size_t rank = std::min((size_t)std::max(place, 0.0), x.size() - 1);
  std::nth_element(x.begin(), x.begin() + rank, x.end());
  const double lower = x[rank];
  if (rank + 1 == x.size()) return lower;
  return lower + (place - rank) * (*std::min_element(x.begin() + rank + 1, x.end()) - lower);
}

// S of Eq. 8 and 9 of one request: `a` and `f` are [G * H, N, T].
void softmask(const double* a, double* f, int64_t head_rows, int64_t positions, int64_t T,
              const float* row) {
  constexpr double INFINITE = HUGE_VAL;
  std::vector<double> entering(head_rows * positions), own(positions);
  for (int t = 0; t < T; ++t) {
    const bool invert = t == 0 && row[6] > 0.5f;
    double low = INFINITE, high = -INFINITE;
    for (size_t i = 0; i < entering.size(); ++i) {
      const double x = entering[i] = invert ? 1 - a[i * T] : a[i * T + t];
      low = std::min(low, x), high = std::max(high, x);
    }
    double sigmoid_low = INFINITE, sigmoid_high = -INFINITE;
    for (int64_t first = 0; first < (int64_t)entering.size(); first += positions) {
      own.assign(entering.begin() + first, entering.begin() + first + positions);
      const double level = std::max(quantile(own, row[3]), 1e-6);
      for (int64_t i = first; i < first + positions; ++i) {
        const double s = 1 / (1 + std::exp(-row[4] * (share(entering[i], low, high) - level)));
        entering[i] = s;
        sigmoid_low = std::min(sigmoid_low, s), sigmoid_high = std::max(sigmoid_high, s);
      }
    }
    for (int64_t first = 0; first < (int64_t)entering.size(); first += positions) {
      double peak = 0;
      for (int64_t i = first; i < first + positions; ++i) {
        const double s = row[1] * share(entering[i], sigmoid_low, sigmoid_high);
        peak = std::max(peak, f[i * T + t] = std::min(s, (double)row[7]));
      }
      for (int64_t i = first; invert && i < first + positions; ++i) {
        f[i * T] = peak - f[i * T];
      }
    }
  }
}

template <typename Scalar>
void on_host(const Call& call) {
  const int64_t N = call.positions, H = call.heads, D = call.head_size, C = H * D;
  const int64_t T = call.tokens;
  const int64_t branches = call.rows / call.requests, head_rows = branches * H;
  const auto at = [](const Tensor& tensor) { return static_cast<const Scalar*>(tensor.data); };
  const auto single = [](const Tensor& tensor) { return static_cast<const float*>(tensor.data); };
  std::vector<double> a(head_rows * N * T), f(a.size());
  std::vector<double> tokens(T * D), x(D), untouched(D), sums(T), of(T), was(T);
  const auto masked = [&](int64_t b, int64_t t) {
    return call.mask.data ? (double)single(call.mask)[b * T + t] : 0;
  };
  const auto load = [&](const Tensor& from, int64_t b, int64_t h) {
    for (int64_t i = 0; i < T * D; ++i) {
      tokens[i] = value(at(from)[(b * T + i / D) * C + h * D + i % D]);
    }
  };
  for (int64_t request = 0; request < call.requests; ++request) {
    const float* row = single(call.manipulation) + request * COLUMNS;
    const bool is_power = row[0] == 1.0f, is_softmask = row[0] == 2.0f;
    for (int64_t i = 0; i < head_rows; ++i) {
      const int64_t b = request * branches + i / H, h = i % H;
      load(call.k, b, h);
      for (int64_t n = 0; n < N; ++n) {
        double* map = &a[(i * N + n) * T];
        double total = 0;
        std::fill(sums.begin(), sums.end(), 0);
        for (int64_t j = 0; j < D; ++j) {
          const double element = value(at(call.q)[(b * N + n) * C + h * D + j]);
          for (int t = 0; t < T; ++t) sums[t] += element * tokens[t * D + j];
        }
        for (int t = 0; t < T; ++t) sums[t] = sums[t] / std::sqrt(D) + masked(b, t);
        const double peak = *std::max_element(sums.begin(), sums.end());
        for (int t = 0; t < T; ++t) total += map[t] = std::exp(sums[t] - peak);
        for (int t = 0; t < T; ++t) map[t] /= total;
      }
    }
    if (is_softmask) softmask(a.data(), f.data(), head_rows, N, T, row);
    for (size_t i = 0; i < f.size() && !is_softmask; ++i) {
      f[i] = is_power ? std::min((double)row[1] * std::pow(a[i], (double)row[2]), (double)row[7])
                      : a[i];
    }
    const bool matched = is_softmask && row[5] != 1.0f;
    for (int64_t i = 0; i < head_rows; ++i) {
      const int64_t b = request * branches + i / H, h = i % H;
      load(call.v, b, h);
      for (int64_t n = 0; n < N; ++n) {
        double *map = &a[(i * N + n) * T], *mask = &f[(i * N + n) * T];
        int64_t count = 0;  // of the tokens that are there
        for (int t = 0; t < T; ++t) {
          if (std::exp(masked(b, t)) > 0) of[count] = mask[t], was[count++] = map[t];
        }
        if (matched) match(of.data(), was.data(), count, row[5]);
        for (int t = 0, next = 0; t < T; ++t) {
          mask[t] = std::exp(masked(b, t)) > 0 ? of[next++] : 0;
        }
        for (int64_t j = 0; j < D; ++j) {
          x[j] = untouched[j] = 0;
          for (int t = 0; t < T; ++t) {
            x[j] += mask[t] * tokens[t * D + j], untouched[j] += map[t] * tokens[t * D + j];
          }
        }
        if (matched) match(x.data(), untouched.data(), D, row[5]);
        const int64_t first = (b * N + n) * C + h * D;
        for (int64_t j = 0; j < D; ++j) {
          const double addend = call.base.data ? value(at(call.base)[first + j]) : 0;
          const double scaled = (double)single(call.ip_scale)[request] * x[j];
          put(static_cast<Scalar*>(call.out)[first + j], addend + scaled);
        }
      }
    }
  }
}

// ---- CUDA
// ----------------------------------------------------------------------------------------------

using Address = unsigned long long;  // CUdeviceptr
using Handle = void*;                // CUcontext, CUstream, CUmodule, CUfunction

constexpr int CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76;  // CUdevice_attribute
constexpr int CAPTURE_RELAXED = 2;                           // CUstreamCaptureMode
constexpr size_t BLOCK = 1 << 21;

struct Driver {
  int (*cuCtxGetCurrent)(Handle*);
  int (*cuCtxSetCurrent)(Handle);
  int (*cuCtxPushCurrent)(Handle);
  int (*cuCtxPopCurrent)(Handle*);
  int (*cuCtxGetDevice)(int*);
  int (*cuDeviceGetAttribute)(int*, int attribute, int device);
  int (*cuGetErrorName)(int, const char**);
  int (*cuStreamGetCtx)(Handle stream, Handle* context);
  int (*cuStreamIsCapturing)(Handle stream, int*);
  int (*cuThreadExchangeStreamCaptureMode)(int*);
  int (*cuModuleLoadData)(Handle*, const void*);
  int (*cuModuleGetFunction)(Handle*, Handle module, const char*);
  int (*cuModuleUnload)(Handle);
  int (*cuMemAlloc)(Address*, size_t);
  int (*cuMemFree)(Address);
  int (*cuLaunchKernel)(Handle function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned shared, Handle stream, void** arguments, void** extra);
  std::string problem;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      problem = "there is no CUDA driver on this machine (libcuda.so.1).";
      return;
    }
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      if (!function) problem = std::string("this CUDA driver has no ") + name + "; update it.";
    };
    find(cuCtxGetCurrent, "cuCtxGetCurrent"), find(cuCtxSetCurrent, "cuCtxSetCurrent");
    find(cuCtxPushCurrent, "cuCtxPushCurrent_v2"), find(cuCtxPopCurrent, "cuCtxPopCurrent_v2");
    find(cuCtxGetDevice, "cuCtxGetDevice"), find(cuDeviceGetAttribute, "cuDeviceGetAttribute");
    find(cuGetErrorName, "cuGetErrorName"), find(cuStreamGetCtx, "cuStreamGetCtx");
    find(cuStreamIsCapturing, "cuStreamIsCapturing");
    find(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode");
    find(cuModuleLoadData, "cuModuleLoadData"), find(cuModuleGetFunction, "cuModuleGetFunction");
    find(cuModuleUnload, "cuModuleUnload");
    find(cuMemAlloc, "cuMemAlloc_v2"), find(cuMemFree, "cuMemFree_v2");
    find(cuLaunchKernel, "cuLaunchKernel");
  }
};

const Driver& driver() {
  static const Driver loaded;
  if (!loaded.problem.empty()) throw Failure{loaded.problem};
  return loaded;
}

std::string error_name(int result) {
  const char* name = nullptr;
  driver().cuGetErrorName(result, &name);
  return name ? name : "error " + std::to_string(result);
}

void check(int result, const char* what) {
  if (result) throw Failure{std::string(what) + " failed with " + error_name(result) + "."};
}

// Allocating and loading are calls that would spoil a capture of another thread, unless this thread
// says that it has nothing to do with it.
class Apart {
 public:
  Apart() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  ~Apart() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }

 private:
  int mode_ = CAPTURE_RELAXED;
};

// Something of a context, given back in it whatever the thread.
struct Owned {
  Handle context;
  template <typename Release>
  void release(Release release) {
    const Apart apart;
    Handle popped;
    if (driver().cuCtxPushCurrent(context)) return;  // the context is gone, and with it all in it
    release(driver());
    driver().cuCtxPopCurrent(&popped);
  }
};

// Scratch memory of the calls on one stream. Both launches of a call are put onto the stream before
// another thread's, because the second reads what the first left here.
struct Scratch : Owned {
  Address address = 0;
  size_t bytes = 0;
  std::mutex turn;
  ~Scratch() {
    if (address) release([&](const Driver& driver) { driver.cuMemFree(address); });
  }
};

struct Code : Owned {  // both kernels
  Handle module = nullptr, statistics = nullptr, output = nullptr;
  ~Code() {
    if (module) release([&](const Driver& driver) { driver.cuModuleUnload(module); });
  }
};

// What nodes and sessions share. Nodes own it: it is given back when the last session that used it
// is closed. A block that became too small stays as long, because captured graphs hold its address.
struct Shared {
  std::mutex guard;
  std::map<std::pair<Handle, Handle>, std::weak_ptr<Scratch>> scratch;   // context, stream
  std::map<std::tuple<Handle, int, int64_t, int64_t>, std::weak_ptr<Code>> code;  // …, type, D, T
};

Shared& shared() {
  static Shared* const one = new Shared;  // outlives every session, also while the process ends
  return *one;
}

struct Node {
  int64_t heads;
  const struct Operator* op;
  std::vector<std::shared_ptr<void>> owned;
  void own(const std::shared_ptr<void>& what) {
    if (std::find(owned.begin(), owned.end(), what) == owned.end()) owned.push_back(what);
  }
};

std::string folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&folder), &info) || !info.dli_fname) return ".";
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

std::vector<char> content(const std::string& path) {
  std::vector<char> bytes;
  FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) return bytes;
  char part[1 << 16];
  for (size_t count; (count = std::fread(part, 1, sizeof part, file)) > 0;) {
    bytes.insert(bytes.end(), part, part + count);
  }
  std::fclose(file);
  bytes.push_back('\0');  // ends PTX
  return bytes;
}

// Code for the device of the current context: its own, that of an earlier minor version of its
// architecture, or PTX, which the driver compiles.
std::shared_ptr<Code> load(Handle context, int type, int64_t head_size, int64_t tokens) {
  const Driver& cuda = driver();
  int device, major, minor;
  check(cuda.cuCtxGetDevice(&device), "cuCtxGetDevice");
  check(cuda.cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, device), "cuDeviceGetAttribute");
  check(cuda.cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, device), "cuDeviceGetAttribute");
  const std::string variant =
      std::to_string(head_size) + (type == FLOAT16 ? "-float16" : "-float32") +
      (tokens == USUAL_TOKENS ? "" : "-" + std::to_string(tokens) + "tokens");
  const std::string stem = folder() + "/decoupled_attention-" + variant;
  std::vector<std::string> names;
  for (int older = minor; older >= 0; --older) {
    names.push_back(stem + "-sm_" + std::to_string(major) + std::to_string(older) + ".cubin");
  }
  names.push_back(stem + ".ptx");
  std::string refused;
  for (const std::string& name : names) {
    const std::vector<char> image = content(name);
    if (image.empty()) continue;
    auto code = std::make_shared<Code>();
    code->context = context;
    const Apart apart;
    int result = cuda.cuModuleLoadData(&code->module, image.data());
    if (result) code->module = nullptr;
    if (!result) {
      result = cuda.cuModuleGetFunction(&code->statistics, code->module,
                                        "decoupled_attention_statistics");
    }
    if (!result)
      result = cuda.cuModuleGetFunction(&code->output, code->module, "decoupled_attention");
    if (!result) return code;
    refused += " " + name + " is refused with " + error_name(result) + ".";
  }
  throw Failure{"no code for heads of " + variant + " on compute capability " +
                std::to_string(major) + "." + std::to_string(minor) + " in " + folder() + "." +
                refused + " Build the engine again on this machine."};
}

void on_device(Node& node, int type, const Call& call, Handle stream) {
  const Driver& cuda = driver();
  const int64_t head_rows = call.rows * call.heads;
  if (head_rows > 65535 || call.positions * call.heads * call.head_size > INT32_MAX) {
    throw Failure{text(call.q.shape) + " is more than one launch takes; send fewer rows.",
                  INVALID_ARGUMENT};
  }
  for (const void* data :
       {call.q.data, call.k.data, call.v.data, call.base.data, (void*)call.out}) {
    if (reinterpret_cast<uintptr_t>(data) % 16) {
      throw Failure{
          "a tensor lies at an address that is no multiple of 16; bind whole allocations.",
          INVALID_ARGUMENT};
    }
  }
  Handle context = nullptr;
  check(cuda.cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  if (!context && stream) {  // a thread that has done nothing with CUDA so far
    check(cuda.cuStreamGetCtx(stream, &context), "cuStreamGetCtx");
    check(cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent");
  }
  if (!context) throw Failure{"no CUDA context is current in this thread."};

  const size_t needed = (size_t)head_rows * (call.positions + STATISTICS_PER_HEAD) *
                        call.tokens * 4;
  std::shared_ptr<Code> code;
  std::shared_ptr<Scratch> scratch;
  {
    Shared& all = shared();
    const std::lock_guard<std::mutex> lock(all.guard);
    int capturing = 0;
    check(cuda.cuStreamIsCapturing(stream, &capturing), "cuStreamIsCapturing");
    const auto allowed = [&] {
      if (capturing)
        throw Failure{"a capture wants a run of the same size on its stream before it."};
    };
    auto& loaded = all.code[{context, type, call.head_size, call.tokens}];
    if (!(code = loaded.lock())) {
      allowed();
      loaded = code = load(context, type, call.head_size, call.tokens);
    }
    auto& block = all.scratch[{context, stream}];
    scratch = block.lock();
    if (!scratch || scratch->bytes < needed) {
      allowed();
      const size_t least = std::max(needed, scratch ? 2 * scratch->bytes : BLOCK);
      scratch = std::make_shared<Scratch>();
      scratch->context = context;
      const Apart apart;
      check(cuda.cuMemAlloc(&scratch->address, least), "allocating scratch memory");
      scratch->bytes = least, block = scratch;
    }
    node.own(code), node.own(scratch);
  }
  Address maps = scratch->address,
          statistics = maps + (Address)head_rows * call.positions * call.tokens * 4;
  int requests = (int)call.requests, rows = (int)call.rows, heads = (int)call.heads;
  int positions = (int)call.positions;
  const void *q = call.q.data, *k = call.k.data, *v = call.v.data, *base = call.base.data;
  const void *manipulation = call.manipulation.data, *ip_scale = call.ip_scale.data;
  void* out = call.out;
  const void* mask = call.mask.data;  // which the kernels for four tokens do not look at
  void* first[] = {&q,     &k,         &manipulation, &requests,   &rows,
                   &heads, &positions, &maps,         &statistics, &mask};
  void* second[] = {&q,        &k,    &v,     &manipulation, &ip_scale, &maps, &statistics,
                    &requests, &rows, &heads, &positions,    &out,      &base, &mask};
  const unsigned blocks = (positions + OUTPUT_POSITIONS - 1) / OUTPUT_POSITIONS;
  const std::lock_guard<std::mutex> turn(scratch->turn);
  check(cuda.cuLaunchKernel(code->statistics, (unsigned)head_rows, 1, 1, STATISTICS_THREADS, 1, 1,
                            0, stream, first, nullptr),
        "launching decoupled_attention_statistics");
  check(cuda.cuLaunchKernel(code->output, blocks, (unsigned)head_rows, 1, OUTPUT_THREADS, 1, 1, 0,
                            stream, second, nullptr),
        "launching decoupled_attention");
}

// ---- The operator
// ----------------------------------------------------------------------------------------

struct Operator : CustomOp {
  bool cuda;
  int type;
  Operator(bool cuda, int type);
};

void compute(Node& node, Context* context) {
  Call call;
  if (!read(context, node.heads, call)) return;
  if (node.op->cuda) {
    Handle stream = nullptr;
    ask(api->KernelContext_GetGPUComputeStream(context, &stream));
    on_device(node, node.op->type, call, stream);
  } else if (node.op->type == FLOAT16) {
    on_host<Half>(call);
  } else {
    on_host<float>(call);
  }
}

// The output has q's shape. A size without a name would come out as the number -1, so it is left
// open.
void infer(ShapeContext* context) {
  TypeAndShape* q;
  ask(api->ShapeInferContext_GetInputTypeShape(context, 0, &q));
  size_t rank;
  ask(api->GetDimensionsCount(q, &rank));
  if (rank != 3) return;
  int64_t sizes[3];
  const char* names[3] = {};
  ask(api->GetDimensions(q, sizes, 3)), ask(api->GetSymbolicDimensions(q, names, 3));
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] < 0 && !(names[i] && *names[i])) return;
  }
  ask(api->ShapeInferContext_SetOutputTypeShape(context, 0, q));
}

Operator::Operator(bool cuda, int type) : cuda(cuda), type(type) {
  GetName = [](const CustomOp*) { return "DecoupledAttention"; };
  GetExecutionProviderType = [](const CustomOp* op) {
    return static_cast<const Operator*>(op)->cuda ? "CUDAExecutionProvider"
                                                  : "CPUExecutionProvider";
  };
  GetInputTypeCount = [](const CustomOp*) -> size_t { return 7; };
  GetInputType = [](const CustomOp* op, size_t index) {
    return index == 3 || index == 4 || index == 6 ? FLOAT : static_cast<const Operator*>(op)->type;
  };
  GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  GetOutputType = [](const CustomOp* op, size_t) { return static_cast<const Operator*>(op)->type; };
  GetInputCharacteristic = [](const CustomOp*, size_t index) {
    return index == 5 || index == 6 ? OPTIONAL : REQUIRED;
  };
  GetOutputCharacteristic = [](const CustomOp*, size_t) { return REQUIRED; };
  GetInputMemoryType = [](const CustomOp*, size_t) {
    return 0;
  };  // where the provider's tensors lie
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
  GetStartVersion = GetEndVersion = [](const CustomOp*) { return 1; };
  CreateKernelV2 = [](const CustomOp* op, const void*, const KernelInfo* info, void** kernel) {
    return guarded([&] {
      int64_t heads = 0;
      Status* missing = api->KernelInfoGetAttribute_int64(info, "num_heads", &heads);
      if (missing) api->ReleaseStatus(missing);
      if (heads < 1)
        throw Failure{"attribute num_heads is missing or not positive.", INVALID_ARGUMENT};
      *kernel = new Node{heads, static_cast<const Operator*>(op), {}};
    });
  };
  KernelComputeV2 = [](void* kernel, Context* context) {
    return guarded([&] { compute(*static_cast<Node*>(kernel), context); });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  InferOutputShapeFn = [](const CustomOp*, ShapeContext* context) {
    return guarded([&] { infer(context); });
  };
}

}  // namespace fastface_operator

// What ONNX Runtime calls for every session whose options name this library.
extern "C" __attribute__((visibility("default"))) fastface_operator::Status* RegisterCustomOps(
    fastface_operator::Options* options, const fastface_operator::ApiBase* runtime) {
  using namespace fastface_operator;
  void* const* table = runtime->GetApi(API_VERSION);
  if (!table) {
    const std::string sentence =
        std::string("fastface.kernels needs ONNX Runtime 1.18 or later, this is ") +
        runtime->GetVersionString() + ".";
    return Api(runtime->GetApi(1)).CreateStatus(FAIL, sentence.c_str());
  }
  static const Api loaded(table);
  api = &loaded;
  static const Operator operators[] = {
      {true, FLOAT16}, {true, FLOAT}, {false, FLOAT16}, {false, FLOAT}};
  static Domain* domain = nullptr;  // one for the process: options refer to it and do not own it
  static std::mutex guard;
  return guarded([&] {
    const std::lock_guard<std::mutex> lock(guard);
    if (!domain) {
      Domain* made;
      ask(api->CreateCustomOpDomain("fastface.kernels", &made));
      for (const Operator& one : operators) ask(api->CustomOpDomain_Add(made, &one));
      domain = made;
    }
    ask(api->AddCustomOpDomain(options, domain));
  });
}
