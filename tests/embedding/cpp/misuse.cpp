// A host that does everything wrong from many threads at once, while some of them make pictures: what
// test_cpp_host.py runs under sanitizers. Arguments: the interpreter, the engine cache, a picture file
// with a face. Whatever the calls are, none crashes, none is an internal error, what is wrong is
// refused, and the picture at the end is the one from the beginning.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fastface_trt.h"

namespace {

const fastface_api_v1 *api = fastface_get_api(1);
constexpr int kThreads = 8;
constexpr int kRounds = 60;
constexpr uint64_t kTask = 5;

template <class Struct>
Struct sized() {
  Struct made{};
  made.struct_size = sizeof(Struct);
  return made;
}

[[noreturn]] void wrong(const char *what, fastface_status status) {
  std::cerr << what << ": " << status << ", " << api->last_error() << std::endl;
  std::_Exit(1);
}

void require(bool holds, const char *what) {
  if (!holds) wrong(what, FASTFACE_OK);
}

// A call that has to be refused, with a sentence of this thread's.
void refused(const char *what, fastface_status status) {
  if (status == FASTFACE_OK || status == FASTFACE_INTERNAL || *api->last_error() == '\0')
    wrong(what, status);
}

template <class Handle>
Handle *handle(uintptr_t number) {
  return reinterpret_cast<Handle *>(number);
}

void together(int threads, const std::function<void(int)> &body) {
  std::atomic<int> ready{0};
  std::vector<std::thread> running;
  for (int number = 0; number < threads; ++number)
    running.emplace_back([&, number] {
      for (++ready; ready < threads;) std::this_thread::yield();
      body(number);
    });
  for (auto &one : running) one.join();
}

struct Host {
  fastface_session *session = nullptr;
  fastface_face *face = nullptr;
  std::vector<uint8_t> file;

  fastface_request request() const {
    auto made = sized<fastface_request>();
    made.prompt = "photo; person in a garden";
    made.preset = "am1+dcg";
    made.face = face;
    return made;
  }
};

fastface_status generate(const Host &host, const fastface_request &request) {
  auto result = sized<fastface_result>();
  const auto status = api->generate(host.session, &request, &result);
  if (status == FASTFACE_OK) {
    require(result.pixels_bytes == size_t{3} * result.width * result.height, "the size is told");
    uint64_t sum = 0;
    for (size_t at = 0; at < result.pixels_bytes; ++at) sum += result.pixels[at];
    require(sum > 0, "the picture can be read");
    // Released twice at once, and under other names.
    together(2, [&](int) { api->release_picture(result.picture); });
    api->release_face(reinterpret_cast<fastface_face *>(result.picture));
  }
  return status;
}

void wrong_handles(const Host &host, uintptr_t number) {
  auto description = sized<fastface_description>();
  auto info = sized<fastface_face_info>();
  // Numbers of handles that live belong to the others: only those that never were, or are of another
  // kind.
  number += 1000000;
  refused("a session that is none", api->describe(handle<fastface_session>(number), &description));
  refused("a face that is none", api->face_info(handle<fastface_face>(number), &info));
  refused("a session that is a face",
          api->describe(reinterpret_cast<fastface_session *>(host.face), &description));
  refused("a face that is a session",
          api->face_info(reinterpret_cast<fastface_face *>(host.session), &info));
  for (uintptr_t one : {uintptr_t{0}, number, UINTPTR_MAX}) {
    api->destroy(handle<fastface_session>(one));
    api->release_face(handle<fastface_face>(one));
    api->release_picture(handle<fastface_picture>(one));
    api->cancel(handle<fastface_session>(one), kTask);
  }
  api->destroy(reinterpret_cast<fastface_session *>(host.face));
  api->release_face(reinterpret_cast<fastface_face *>(host.session));
}

void wrong_structs(const Host &host) {
  fastface_face *face = nullptr;
  auto picture = sized<fastface_input_picture>();
  auto embedding = sized<fastface_embedding>();
  auto result = sized<fastface_result>();
  auto request = host.request();
  fastface_result unset{};
  refused("no description", api->describe(host.session, nullptr));
  refused("no info", api->face_info(host.face, nullptr));
  refused("no picture", api->analyze(host.session, nullptr, 0, &face));
  refused("no pixels", api->analyze(host.session, &picture, 0, &face));
  refused("no embedding", api->embed(host.session, nullptr, &face));
  refused("no values", api->embed(host.session, &embedding, &face));
  refused("no request", api->generate(host.session, nullptr, &result));
  refused("no result", api->generate(host.session, &request, nullptr));
  refused("a result without a size", api->generate(host.session, &request, &unset));
  refused("no options", api->create(nullptr, nullptr));
  picture.file = host.file.data();
  picture.file_bytes = host.file.size();
  refused("no place for the face", api->analyze(host.session, &picture, 0, nullptr));
  picture.rgb = picture.file;
  refused("a file and pixels", api->analyze(host.session, &picture, 0, &face));
  require(face == nullptr, "nothing was put there");
}

void wrong_sizes(const Host &host) {
  const uint8_t pixel[3] = {1, 2, 3};
  const float number = 1;
  fastface_face *face = nullptr;
  auto picture = sized<fastface_input_picture>();
  picture.rgb = pixel;
  const uint32_t most = UINT32_MAX, half = 1U << 31, third = 0xAAAAAAABU;  // 3 * third wraps to 1
  const uint32_t sides[][2] = {{0, 0}, {0, 1}, {1, 0}, {most, most}, {half, half}, {third, most},
                               {half, most}, {0, most}, {1, 1}};
  for (const auto &side : sides) {
    picture.width = side[0];
    picture.height = side[1];
    refused("pixels that are no picture", api->analyze(host.session, &picture, 0, &face));
  }
  picture = sized<fastface_input_picture>();
  picture.file = pixel;
  for (size_t bytes : {size_t{0}, size_t{3}, SIZE_MAX, SIZE_MAX / 2 + 1}) {
    picture.file_bytes = bytes;
    refused("bytes that are no picture", api->analyze(host.session, &picture, 0, &face));
  }
  auto embedding = sized<fastface_embedding>();
  embedding.values = &number;
  // The last three wrap around to 512, 0 and less than nothing when multiplied by four.
  for (size_t count : {size_t{0}, size_t{1}, size_t{511}, size_t{513}, (SIZE_MAX / 4 + 1) + 512,
                       SIZE_MAX / 4 + 1, SIZE_MAX / 2}) {
    embedding.count = count;
    refused("numbers that are no embedding", api->embed(host.session, &embedding, &face));
    auto request = host.request();
    request.latents = &number;
    request.latents_count = count;
    refused("numbers that are no noise", generate(host, request));
    request = host.request();
    request.face = nullptr;
    request.image_tokens = &number;
    request.image_tokens_count = count;
    refused("numbers that are no tokens", generate(host, request));
  }
}

void wrong_requests(const Host &host) {
  uint8_t byte = 7;
  auto request = host.request();
  const auto again = [&](const char *what) {
    refused(what, generate(host, request));
    request = host.request();
  };
  request.prompt = nullptr;
  again("no prompt");
  request.prompt = "\xff\xfe";
  again("a prompt that is not UTF-8");
  request.preset = "am3";
  again("a preset that is none");
  request.face = nullptr;
  again("no face");
  request.face = handle<fastface_face>(UINTPTR_MAX);
  again("a face that is none");
  request.face = reinterpret_cast<fastface_face *>(host.session);
  again("a face that is a session");
  for (uint32_t side : {1U, 7U, 1U << 20, UINT32_MAX}) {
    request.width = request.height = side;
    again("a size that is none");
  }
  request.steps = UINT32_MAX;
  again("steps that are none");
  for (size_t bytes : {size_t{0}, size_t{1}, SIZE_MAX, SIZE_MAX / 2 + 1}) {
    request.pixels = &byte;
    request.pixels_bytes = bytes;
    again("room that is none");
  }
  request.pixels_bytes = 9;
  again("room without an address");
  request.pixels = &byte;
  request.pixels_bytes = 96 * 96 * 3;
  request.pixels_on_gpu = 1;
  again("a GPU that is not there");
  for (const char *json : {"", "[]", "{", "{\"alpha\": {}}", "{\"prompt\": 3}", "\xff"}) {
    request.parameters_json = json;
    again("parameters that are none");
  }
  require(byte == 7, "nothing was written there");
}

// The callback does what it may, and the one thing that it may not.
int32_t busy_callback(void *user, uint32_t, uint32_t) {
  const auto &host = *static_cast<Host *>(user);
  auto description = sized<fastface_description>();
  require(api->describe(host.session, &description) == FASTFACE_OK, "a callback describes");
  refused("a callback stops", api->stop());
  wrong_handles(host, 7);
  return 0;
}

void everything(Host &host, int number) {
  std::mt19937 chance(static_cast<unsigned>(number));
  for (int round = 0; round < kRounds; ++round) {
    switch (chance() % 8) {
      case 0: wrong_handles(host, chance() % 100); break;
      case 1: wrong_structs(host); break;
      case 2: wrong_sizes(host); break;
      case 3: wrong_requests(host); break;
      case 4:
        require(api->start(nullptr) == FASTFACE_OK, "a further start is fine");
        refused("sessions are open", api->stop());
        break;
      case 5: api->cancel(host.session, kTask); break;
      case 6: {
        auto request = host.request();
        request.task = kTask;  // which only one call may have at a time, and the others cancel
        request.on_step = busy_callback;
        request.user = &host;
        const auto status = round % 4 ? FASTFACE_OK : generate(host, request);
        require(status == FASTFACE_OK || status == FASTFACE_CANCELLED ||
                    status == FASTFACE_INVALID_REQUEST, "a picture, cancelled, or the number taken");
        break;
      }
      default: {
        auto options = sized<fastface_session_options>();
        fastface_session *session = nullptr;
        options.export_folder = round % 2 ? "/dev/null" : "/nowhere";
        refused("an export that is none", api->create(&options, &session));
        require(session == nullptr, "no session was made");
      }
    }
  }
}

std::vector<uint8_t> picture(const Host &host) {
  std::vector<uint8_t> pixels(96 * 96 * 3);
  auto request = host.request();
  auto result = sized<fastface_result>();
  request.pixels = pixels.data();
  request.pixels_bytes = pixels.size();
  const auto status = api->generate(host.session, &request, &result);
  if (status != FASTFACE_OK) wrong("a picture", status);
  return pixels;
}

}  // namespace

int main(int, char **arguments) {
  auto start = sized<fastface_start_options>();
  auto description = sized<fastface_description>();
  start.python_executable = arguments[1];
  refused("before the start", api->describe(nullptr, &description));
  together(kThreads, [&](int) { require(api->start(&start) == FASTFACE_OK, "all start it"); });

  Host host;
  std::ifstream opened(arguments[3], std::ios::binary);
  host.file.assign(std::istreambuf_iterator<char>(opened), {});
  auto options = sized<fastface_session_options>();
  options.cache = arguments[2];
  options.threads = 1;
  options.build_missing = 1;
  if (const auto status = api->create(&options, &host.session)) wrong("a session", status);
  auto given = sized<fastface_input_picture>();
  given.file = host.file.data();
  given.file_bytes = host.file.size();
  if (const auto status = api->analyze(host.session, &given, 0, &host.face)) wrong("a face", status);

  const auto before = picture(host);
  together(kThreads, [&](int number) { everything(host, number); });
  require(picture(host) == before, "the picture is as before");

  // Its session goes while it is made, from two threads; it is made to its end all the same.
  auto request = host.request();
  request.user = &host;
  request.on_step = [](void *user, uint32_t, uint32_t) -> int32_t {
    together(2, [&](int) { api->destroy(static_cast<Host *>(user)->session); });
    api->release_face(static_cast<Host *>(user)->face);
    return 0;
  };
  require(generate(host, request) == FASTFACE_OK, "a picture outlives its session's handle");
  refused("a session that is gone", api->describe(host.session, &description));

  std::atomic<int> stopped{0};
  together(kThreads, [&](int) { stopped += api->stop() == FASTFACE_OK; });
  require(stopped > 0, "it was stopped");
  together(kThreads, [&](int) {
    auto mine = sized<fastface_description>();
    require(api->describe(host.session, &mine) == FASTFACE_NOT_RUNNING, "it is over");
    api->release_face(host.face);
    refused("a second start", api->start(&start));
  });
  std::cout << "ended" << std::endl;
}
