// fastface_trt.h for C++17: handles that release themselves, errors as exceptions. Header only, over
// the function table, so it works with a linked library and with one that was opened by dlopen.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastface_trt.h"

namespace fastface {

// What a call refused or failed with; `status` is one of the FASTFACE_… codes.
class Error : public std::runtime_error {
 public:
  Error(fastface_status status, const char *message)
      : std::runtime_error(message), status(status) {}
  fastface_status status;
};

inline void check(const fastface_api_v1 *api, fastface_status status) {
  if (status != FASTFACE_OK) throw Error(status, api->last_error());
}

// A handle with its release function; move-only.
template <class Handle, void (*fastface_api_v1::*release)(Handle *)>
class Owned {
 public:
  Owned() = default;
  Owned(const fastface_api_v1 *api, Handle *handle) : api_(api), handle_(handle) {}
  Owned(Owned &&other) noexcept
      : api_(other.api_), handle_(std::exchange(other.handle_, nullptr)) {}
  Owned &operator=(Owned &&other) noexcept {
    Owned moved(std::move(other));
    std::swap(api_, moved.api_);
    std::swap(handle_, moved.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_ != nullptr) (api_->*release)(handle_);
  }
  Handle *get() const { return handle_; }
  explicit operator bool() const { return handle_ != nullptr; }

 protected:
  const fastface_api_v1 *api_ = nullptr;
  Handle *handle_ = nullptr;
};

class Face : public Owned<fastface_face, &fastface_api_v1::release_face> {
 public:
  using Owned::Owned;
  fastface_face_info info() const {
    auto found = FASTFACE_INIT(fastface_face_info);
    check(api_, api_->face_info(handle_, &found));
    return found;
  }
};

// A picture that the library keeps: `pixels` is valid as long as this lives and Library runs.
struct Picture : Owned<fastface_picture, &fastface_api_v1::release_picture> {
  using Owned::Owned;
  const uint8_t *pixels = nullptr;
  uint32_t width = 0, height = 0;
};

struct Request {
  std::string prompt;
  std::string negative_prompt;
  std::string preset = "plain";
  uint64_t seed = 0;
  uint32_t width = 0, height = 0, steps = 0;  // 0: the export's
  std::vector<float> latents;                 // empty: the seed's
  std::string parameters_json;                // further fields of GenerationRequest
  uint64_t task = 0;
  // Told (step, steps) after each step; false cancels. What it throws comes out of generate().
  std::function<bool(uint32_t, uint32_t)> on_step;
};

class Session : public Owned<fastface_session, &fastface_api_v1::destroy> {
 public:
  using Owned::Owned;

  fastface_description describe() const {
    auto description = FASTFACE_INIT(fastface_description);
    check(api_, api_->describe(handle_, &description));
    return description;
  }

  Face analyze(const fastface_input_picture &picture, uint32_t index = 0) const {
    fastface_face *face = nullptr;
    check(api_, api_->analyze(handle_, &picture, index, &face));
    return Face(api_, face);
  }

  Face analyze_file(const std::vector<uint8_t> &file, uint32_t index = 0) const {
    auto picture = FASTFACE_INIT(fastface_input_picture);
    picture.file = file.data();
    picture.file_bytes = file.size();
    return analyze(picture, index);
  }

  Face embed(const fastface_embedding &embedding) const {
    fastface_face *face = nullptr;
    check(api_, api_->embed(handle_, &embedding, &face));
    return Face(api_, face);
  }

  // Of the same person in several pictures.
  Face one_person(const std::vector<const fastface_face *> &faces) const {
    fastface_face *face = nullptr;
    check(api_, api_->one_person(handle_, faces.data(), faces.size(), &face));
    return Face(api_, face);
  }

  // Into memory of the caller's: exactly width * height * 3 bytes.
  fastface_result generate(const Request &request, const Face &face, uint8_t *pixels,
                           size_t bytes) const {
    auto given = FASTFACE_INIT(fastface_request);
    given.face = face.get();
    given.pixels = pixels;
    given.pixels_bytes = bytes;
    return run(request, given);
  }

  // Into memory of the library's.
  Picture generate(const Request &request, const Face &face) const {
    auto given = FASTFACE_INIT(fastface_request);
    given.face = face.get();
    const auto result = run(request, given);
    Picture picture(api_, result.picture);
    picture.pixels = result.pixels;
    picture.width = result.width;
    picture.height = result.height;
    return picture;
  }

  void cancel(uint64_t task) const { api_->cancel(handle_, task); }

 private:
  struct Told {
    const std::function<bool(uint32_t, uint32_t)> &on_step;
    std::exception_ptr thrown;
  };

  static int32_t tell(void *user, uint32_t step, uint32_t steps) noexcept {
    auto *told = static_cast<Told *>(user);
    try {
      return told->on_step(step, steps) ? 0 : 1;
    } catch (...) {
      told->thrown = std::current_exception();
      return 1;
    }
  }

  fastface_result run(const Request &request, fastface_request given) const {
    given.prompt = request.prompt.c_str();
    given.negative_prompt = request.negative_prompt.c_str();
    given.preset = request.preset.c_str();
    given.seed = request.seed;
    given.width = request.width;
    given.height = request.height;
    given.steps = request.steps;
    given.task = request.task;
    if (!request.latents.empty()) given.latents = request.latents.data();
    given.latents_count = request.latents.size();
    if (!request.parameters_json.empty()) given.parameters_json = request.parameters_json.c_str();
    Told told{request.on_step, nullptr};
    if (request.on_step) {
      given.on_step = &Session::tell;
      given.user = &told;
    }
    auto result = FASTFACE_INIT(fastface_result);
    const auto status = api_->generate(handle_, &given, &result);
    if (told.thrown) std::rethrow_exception(told.thrown);
    check(api_, status);
    return result;
  }
};

// The interpreter, from construction to destruction; make one, before all else, and end it last.
class Library {
 public:
  explicit Library(const std::string &python_executable = "",
                   const fastface_api_v1 *api = fastface_get_api(FASTFACE_ABI_VERSION))
      : api_(api) {
    if (api_ == nullptr) throw Error(FASTFACE_START_FAILED, "the library has another ABI version");
    auto options = FASTFACE_INIT(fastface_start_options);
    if (!python_executable.empty()) options.python_executable = python_executable.c_str();
    check(api_, api_->start(&options));
  }
  Library(Library &&other) noexcept : api_(std::exchange(other.api_, nullptr)) {}
  Library &operator=(Library &&) = delete;
  ~Library() {
    if (api_ != nullptr) api_->stop();
  }

  // Ends it where the destructor could not say that something is still open.
  void stop() { check(api_, api_->stop()); }

  Session open(const fastface_session_options &options) const {
    fastface_session *session = nullptr;
    check(api_, api_->create(&options, &session));
    return Session(api_, session);
  }

  const fastface_api_v1 *api() const { return api_; }

 private:
  const fastface_api_v1 *api_;
};

}  // namespace fastface
