// The function table of fastface_trt.h over the Python package; what it promises stands there.
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "handles.hpp"

namespace fastface_host {
namespace {

struct Session {
  explicit Session(py::object host) : host(std::move(host)) {}
  ~Session() {
    py::gil_scoped_acquire gil;
    try {
      host.attr("close")();
    } catch (py::error_already_set &error) {
      error.discard_as_unraisable("fastface_session");
    }
    host = py::object();
  }
  py::object host;
  std::mutex mutex;
  std::map<uint64_t, std::shared_ptr<std::atomic<bool>>> tasks;
};

// All that lives as long as the process; never destroyed, since threads of the host may outlive main.
struct Library {
  Interpreter interpreter;
  Handles<fastface_session, Session> sessions{"session"};
  Handles<fastface_face, Held> faces{"face"};
  Handles<fastface_picture, Held> pictures{"picture"};
};

Library &library() {
  static Library *only = new Library;
  return *only;
}

std::string &message() {
  thread_local std::string text;
  return text;
}

[[noreturn]] void refuse(const std::string &why) { throw Failure(FASTFACE_INVALID_REQUEST, why); }

fastface_status status_of(const std::string &code) {
  static const auto *known = new std::map<std::string, fastface_status>{
      {"error", FASTFACE_ERROR},
      {"invalid_request", FASTFACE_INVALID_REQUEST},
      {"unknown_name", FASTFACE_UNKNOWN_NAME},
      {"bad_picture", FASTFACE_BAD_PICTURE},
      {"no_face_found", FASTFACE_NO_FACE_FOUND},
      {"face_index_out_of_range", FASTFACE_FACE_INDEX_OUT_OF_RANGE},
      {"weights", FASTFACE_WEIGHTS},
      {"export_incomplete", FASTFACE_EXPORT_INCOMPLETE},
      {"manifest", FASTFACE_MANIFEST},
      {"engine_mismatch", FASTFACE_ENGINE_MISMATCH},
      {"backend_unavailable", FASTFACE_BACKEND_UNAVAILABLE},
      {"build_failed", FASTFACE_BUILD_FAILED},
      {"engine_failed", FASTFACE_ENGINE_FAILED},
      {"out_of_memory", FASTFACE_OUT_OF_MEMORY},
      {"storage", FASTFACE_STORAGE},
      {"missing_dependency", FASTFACE_MISSING_DEPENDENCY},
      {"licence_not_acknowledged", FASTFACE_LICENCE_NOT_ACKNOWLEDGED},
      {"cancelled", FASTFACE_CANCELLED},
      {"deadline_passed", FASTFACE_DEADLINE_PASSED},
      {"busy", FASTFACE_BUSY},
      {"unavailable", FASTFACE_UNAVAILABLE},
      {"refused", FASTFACE_REFUSED},
  };
  auto found = known->find(code);
  return found == known->end() ? FASTFACE_INTERNAL : found->second;
}

// Run with the interpreter's lock; a Python error becomes a Failure.
template <class Body>
auto python(Body &&body) {
  py::gil_scoped_acquire gil;
  try {
    return body(library().interpreter.module());
  } catch (py::error_already_set &error) {
    auto described = library().interpreter.module().attr("describe_error")(error.value());
    auto [code, text] = described.cast<std::pair<std::string, std::string>>();
    throw Failure(status_of(code), text);
  }
}

// A call of the host: no exception leaves it.
template <class Body>
fastface_status answer(Body &&body) noexcept {
  try {
    try {
      body();
      return FASTFACE_OK;
    } catch (const Failure &failure) {
      message() = failure.what();
      return failure.status;
    } catch (const std::bad_alloc &) {
      message() = "The host is out of memory.";
      return FASTFACE_OUT_OF_MEMORY;
    } catch (const std::exception &error) {
      message() = error.what();
    } catch (...) {
      message() = "An exception that is no std::exception.";
    }
  } catch (...) {  // no memory for the message
  }
  return FASTFACE_INTERNAL;
}

template <class Body>
fastface_status running(Body &&body) noexcept {
  return answer([&] {
    Interpreter::Call call(library().interpreter);
    body();
  });
}

py::object text(const char *utf8, const char *name) {
  PyObject *decoded = PyUnicode_DecodeUTF8(utf8, static_cast<Py_ssize_t>(strlen(utf8)), nullptr);
  if (decoded == nullptr) {
    PyErr_Clear();
    refuse(std::string(name) + " is not UTF-8.");
  }
  return py::reinterpret_steal<py::object>(decoded);
}

// `count` things of `size` bytes; refused where the product is no size of memory.
size_t times(size_t count, size_t size, const char *name) {
  if (size != 0 && count > static_cast<size_t>(PTRDIFF_MAX) / size)
    refuse(std::string(name) + " is larger than memory can be.");
  return count * size;
}

py::object memory(const void *data, size_t bytes) {
  if (data == nullptr) return py::none();
  return py::memoryview::from_memory(data, static_cast<py::ssize_t>(bytes));
}

// A host's DLPack tensor: its deleter is called by whoever takes it out of the capsule, or here.
struct DLManagedTensorVersioned {
  uint32_t major, minor;
  void *context;
  void (*deleter)(DLManagedTensorVersioned *);
};
constexpr const char *kUntaken = "dltensor_versioned";

void delete_tensor(void *tensor) {
  auto *managed = static_cast<DLManagedTensorVersioned *>(tensor);
  if (managed != nullptr && managed->deleter != nullptr) managed->deleter(managed);
}

using OwnedTensor = std::unique_ptr<void, void (*)(void *)>;

py::object capsule(OwnedTensor tensor) {
  if (tensor == nullptr) return py::none();
  PyObject *made = PyCapsule_New(tensor.get(), kUntaken, [](PyObject *gone) {
    if (PyCapsule_IsValid(gone, kUntaken)) delete_tensor(PyCapsule_GetPointer(gone, kUntaken));
  });
  if (made == nullptr) throw py::error_already_set();
  tensor.release();
  return py::reinterpret_steal<py::object>(made);
}

// A number by which a running call can be cancelled.
class Task {
 public:
  Task(Session &session, uint64_t number) : session_(session), number_(number) {
    if (number_ == 0) return;
    std::lock_guard<std::mutex> lock(session_.mutex);
    if (!session_.tasks.emplace(number_, cancelled).second)
      refuse("Task " + std::to_string(number_) + " is running; choose another number.");
  }
  ~Task() {
    if (number_ == 0) return;
    std::lock_guard<std::mutex> lock(session_.mutex);
    session_.tasks.erase(number_);
  }
  Task(const Task &) = delete;
  Task &operator=(const Task &) = delete;
  std::shared_ptr<std::atomic<bool>> cancelled = std::make_shared<std::atomic<bool>>(false);

 private:
  Session &session_;
  uint64_t number_;
};

py::dict request_fields(const fastface_request &request) {
  py::dict fields;
  if (request.prompt == nullptr) refuse("The request has no prompt.");
  fields["prompt"] = text(request.prompt, "The prompt");
  if (request.negative_prompt)
    fields["negative_prompt"] = text(request.negative_prompt, "The negative prompt");
  if (request.preset) fields["preset"] = text(request.preset, "The preset");
  fields["seed"] = request.seed;
  if (request.width) fields["width"] = request.width;
  if (request.height) fields["height"] = request.height;
  if (request.steps) fields["steps"] = request.steps;
  return fields;
}

py::object number(const void *address) {
  if (address == nullptr) return py::none();
  return py::int_(reinterpret_cast<std::uintptr_t>(address));
}

// Where the picture goes, for Python: host memory, (address, bytes) on a GPU, or None.
py::object target(const fastface_request &request) {
  if (request.pixels == nullptr) return py::none();
  if (request.pixels_on_gpu)
    return py::make_tuple(number(request.pixels), request.pixels_bytes);
  const size_t bytes = times(request.pixels_bytes, 1, "pixels_bytes");
  return py::memoryview::from_memory(static_cast<void *>(request.pixels),
                                     static_cast<py::ssize_t>(bytes));
}

void generate(fastface_session *handle, const fastface_request *given, fastface_result *result) {
  const auto request = read(given, "The request");
  OwnedTensor tensor(request.image_tokens_dlpack, delete_tensor);
  Interpreter::Call call(library().interpreter);
  auto session = library().sessions.get(handle);
  read(result, "The result");
  if ((request.face != nullptr) + (request.image_tokens != nullptr) + (tensor != nullptr) != 1)
    refuse("Give one of face, image_tokens and image_tokens_dlpack.");
  if (request.pixels == nullptr && request.pixels_bytes != 0)
    refuse("pixels_bytes is set and pixels is NULL.");
  std::shared_ptr<Held> face = request.face ? library().faces.get(request.face) : nullptr;
  Task task(*session, request.task);
  python([&](py::handle) {
    auto on_progress = [&](uint32_t step, uint32_t steps) {
      py::gil_scoped_release released;
      if (request.on_step && request.on_step(request.user, step, steps) != 0) return false;
      return !task.cancelled->load();
    };
    py::object out = target(request);
    py::tuple made = session->host.attr("generate")(
        request_fields(request),
        request.parameters_json ? text(request.parameters_json, "parameters_json") : py::none(),
        face ? face->object : py::none(),
        memory(request.image_tokens,
               times(request.image_tokens_count, sizeof(float), "image_tokens_count")),
        capsule(std::move(tensor)),
        memory(request.latents, times(request.latents_count, sizeof(float), "latents_count")),
        out,
        py::make_tuple(number(request.stream), number(request.event), number(request.done)),
        py::cpp_function(on_progress));
    fastface_result values{};
    values.pixels = reinterpret_cast<const uint8_t *>(made[1].cast<std::uintptr_t>());
    values.height = made[2].cast<uint32_t>();
    values.width = made[3].cast<uint32_t>();
    values.pixels_bytes = size_t{3} * values.width * values.height;
    if (request.pixels == nullptr) {
      values.picture = library().pictures.add(std::make_shared<Held>(made[0]));
    } else if (!request.pixels_on_gpu) {
      made = py::tuple();
      out.attr("release")();  // raises if anything in Python still held the host's memory
    }
    write(result, values);
  });
}

void create(const fastface_session_options *given, fastface_session **session) {
  const auto options = read(given, "The session's options");
  if (session == nullptr) refuse("There is no place for the session.");
  *session = library().sessions.add(python([&](py::handle module) {
    py::dict named;
    named["build"] = options.build_missing != 0;
    named["licence_acknowledged"] = options.licence_acknowledged != 0;
    if (options.export_folder) named["export"] = text(options.export_folder, "export_folder");
    if (options.backend) named["backend"] = text(options.backend, "The backend");
    if (options.cache) named["cache"] = text(options.cache, "The cache");
    if (options.threads) named["threads"] = options.threads;
    return std::make_shared<Session>(module.attr("Host")(named));
  }));
}

void describe(fastface_session *handle, fastface_description *description) {
  auto session = library().sessions.get(handle);
  read(description, "The description");
  python([&](py::handle) {
    auto found = session->host.attr("describe")().cast<std::array<uint32_t, 5>>();
    write(description,
          fastface_description{0, found[0], found[1], found[2], found[3], found[4]});
  });
}

fastface_face *add_face(py::object face) {
  return library().faces.add(std::make_shared<Held>(std::move(face)));
}

void analyze(fastface_session *handle, const fastface_input_picture *given, uint32_t index,
             fastface_face **face) {
  auto session = library().sessions.get(handle);
  const auto picture = read(given, "The picture");
  if (face == nullptr) refuse("There is no place for the face.");
  if ((picture.rgb == nullptr) == (picture.file == nullptr))
    refuse("Give pixels or a file, one of both.");
  *face = python([&](py::handle) {
    py::object file = py::none();
    if (picture.file)
      file = py::bytes(reinterpret_cast<const char *>(picture.file),
                       times(picture.file_bytes, 1, "file_bytes"));
    const size_t bytes = times(size_t{3} * picture.width, picture.height, "The picture");
    return add_face(session->host.attr("analyze")(
        file, memory(picture.rgb, bytes), py::make_tuple(picture.height, picture.width), index));
  });
}

void embed(fastface_session *handle, const fastface_embedding *given, fastface_face **face) {
  const auto embedding = read(given, "The embedding");
  OwnedTensor tensor(embedding.dlpack, delete_tensor);
  Interpreter::Call call(library().interpreter);
  auto session = library().sessions.get(handle);
  if (face == nullptr) refuse("There is no place for the face.");
  if ((embedding.values == nullptr) == (embedding.dlpack == nullptr))
    refuse("Give values or dlpack, one of both.");
  *face = python([&](py::handle) {
    return add_face(session->host.attr("embed")(
        memory(embedding.values, times(embedding.count, sizeof(float), "The embedding's count")),
        capsule(std::move(tensor)),
        memory(embedding.crop_bgr, size_t{3} * 224 * 224),
        memory(embedding.portrait_bgr, size_t{3} * 512 * 512)));
  });
}

void one_person(fastface_session *handle, const fastface_face *const *faces, size_t count,
                fastface_face **face) {
  auto session = library().sessions.get(handle);
  if (face == nullptr) refuse("There is no place for the face.");
  if (faces == nullptr && count != 0) refuse("There are no faces.");
  std::vector<std::shared_ptr<Held>> held;
  for (size_t i = 0; i < count; ++i) held.push_back(library().faces.get(faces[i]));
  *face = python([&](py::handle) {
    py::list all;
    for (const auto &one : held) all.append(one->object);
    return add_face(session->host.attr("one_person")(all));
  });
}

void face_info(const fastface_face *handle, fastface_face_info *info) {
  auto face = library().faces.get(handle);
  read(info, "The face's info");
  python([&](py::handle) {
    auto box = face->object.attr("box").cast<std::array<float, 4>>();
    write(info, fastface_face_info{0, box[0], box[1], box[2], box[3],
                                   face->object.attr("score").cast<float>(),
                                   face->object.attr("index").cast<uint32_t>(),
                                   face->object.attr("count").cast<uint32_t>()});
  });
}

void cancel(fastface_session *handle, uint64_t number) {
  auto session = library().sessions.get(handle);
  std::lock_guard<std::mutex> lock(session->mutex);
  auto task = session->tasks.find(number);
  if (task != session->tasks.end()) task->second->store(true);
}

const fastface_api_v1 kTable = {
    sizeof(fastface_api_v1),
    1,
    [](const fastface_start_options *options) {
      return answer([&] {
        std::string python;
        if (options != nullptr) {
          const auto known = read(options, "The start options");
          if (known.python_executable) python = known.python_executable;
        }
        library().interpreter.start(python);
      });
    },
    [] {
      return answer([&] {
        library().interpreter.stop([] { return library().sessions.size(); },
                                   [] {
                                     library().faces.clear();
                                     library().pictures.clear();
                                   });
      });
    },
    [](const fastface_session_options *options, fastface_session **session) {
      return running([&] { create(options, session); });
    },
    [](fastface_session *session) { running([&] { library().sessions.remove(session); }); },
    [](fastface_session *session, fastface_description *description) {
      return running([&] { describe(session, description); });
    },
    [](fastface_session *session, const fastface_input_picture *picture, uint32_t index,
       fastface_face **face) { return running([&] { analyze(session, picture, index, face); }); },
    [](fastface_session *session, const fastface_embedding *embedding, fastface_face **face) {
      return answer([&] { embed(session, embedding, face); });
    },
    [](const fastface_face *face, fastface_face_info *info) {
      return running([&] { face_info(face, info); });
    },
    [](fastface_face *face) { running([&] { library().faces.remove(face); }); },
    [](fastface_session *session, const fastface_request *request, fastface_result *result) {
      return answer([&] { generate(session, request, result); });
    },
    [](fastface_picture *picture) { running([&] { library().pictures.remove(picture); }); },
    [](fastface_session *session, uint64_t task) { running([&] { cancel(session, task); }); },
    [] { return message().c_str(); },
    [](fastface_session *session, const fastface_face *const *faces, size_t count,
       fastface_face **face) {
      return running([&] { one_person(session, faces, count, face); });
    },
};

}  // namespace
}  // namespace fastface_host

extern "C" const fastface_api_v1 *fastface_get_api(uint32_t version) {
  return version == FASTFACE_ABI_VERSION ? &fastface_host::kTable : nullptr;
}
