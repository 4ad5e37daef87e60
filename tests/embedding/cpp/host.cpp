// A service in C++ with FastFace inside: what test_cpp_host.py runs. Arguments: the interpreter, the
// engine cache, a folder with inputs and room for pictures. Prints a line per thing that held.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <future>
#include <iostream>
#include <iterator>
#include <thread>

#include "fastface.hpp"

namespace {

std::string folder;

void require(bool holds, const char *what) {
  if (!holds) {
    std::cerr << "does not hold: " << what << std::endl;
    std::exit(1);
  }
  std::cout << what << std::endl;
}

template <class Body>
void refused(fastface_status status, const char *what, Body body) {
  try {
    body();
  } catch (const fastface::Error &error) {
    if (error.status != status) std::cerr << error.status << ": " << error.what() << std::endl;
    require(error.status == status && *error.what() != '\0', what);
    return;
  }
  require(false, what);
}

template <class Item>
std::vector<Item> load(const std::string &name) {
  std::ifstream file(folder + "/" + name, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<Item> items(bytes.size() / sizeof(Item));
  std::memcpy(items.data(), bytes.data(), items.size() * sizeof(Item));
  return items;
}

void save(const std::string &name, const uint8_t *pixels, size_t bytes) {
  std::ofstream(folder + "/" + name, std::ios::binary)
      .write(reinterpret_cast<const char *>(pixels), static_cast<std::streamsize>(bytes));
}

fastface::Request request(uint64_t seed) {
  fastface::Request made;
  made.prompt = "photo; person in a garden";
  made.preset = "am1+dcg";
  made.seed = seed;
  return made;
}

void threads(const fastface::Session &session, const fastface::Face &face, size_t bytes) {
  std::atomic<int> in_place{0}, steps{0};
  std::vector<std::thread> workers;
  for (uint64_t worker = 0; worker < 3; ++worker)
    workers.emplace_back([&, worker] {
      for (uint64_t seed = worker; seed < 6; seed += 3) {
        std::vector<uint8_t> pixels(bytes);
        auto asked = request(seed);
        asked.on_step = [&](uint32_t, uint32_t) { return ++steps, true; };
        const auto result = session.generate(asked, face, pixels.data(), pixels.size());
        in_place += result.pixels == pixels.data() && result.picture == nullptr;
        save("seed" + std::to_string(seed) + ".rgb", pixels.data(), bytes);
      }
    });
  for (auto &worker : workers) worker.join();
  require(in_place == 6, "pictures of three threads lie in the callers' buffers");
  require(steps == 6 * 4, "every step was told");
}

void endings(const fastface::Session &session, const fastface::Face &face, size_t bytes) {
  std::vector<uint8_t> pixels(bytes, 0xAB);
  const auto untouched = pixels;
  auto asked = request(1);
  asked.on_step = [](uint32_t step, uint32_t) { return step < 2; };
  refused(FASTFACE_CANCELLED, "a callback cancels",
          [&] { session.generate(asked, face, pixels.data(), bytes); });

  std::promise<void> running, cancelled;
  asked.task = 77;
  asked.on_step = [&](uint32_t step, uint32_t) {
    if (step == 1) {
      running.set_value();
      cancelled.get_future().wait();
    }
    return true;
  };
  std::thread other([&] {
    running.get_future().wait();
    session.describe();  // which needs the lock that a waiting callback must not hold
    session.cancel(78);
    session.cancel(77);
    cancelled.set_value();
  });
  refused(FASTFACE_CANCELLED, "another thread cancels",
          [&] { session.generate(asked, face, pixels.data(), bytes); });
  other.join();

  asked.on_step = [](uint32_t, uint32_t) -> bool { throw std::out_of_range("the host's own"); };
  try {
    session.generate(asked, face, pixels.data(), bytes);
    require(false, "an exception of the callback comes back");
  } catch (const std::out_of_range &) {
    require(true, "an exception of the callback comes back");
  }
  asked.on_step = nullptr;
  std::vector<uint8_t> small(bytes - 1, 0xAB);
  refused(FASTFACE_INVALID_REQUEST, "a buffer that is a byte too small is refused",
          [&] { session.generate(asked, face, small.data(), small.size()); });
  refused(FASTFACE_INVALID_REQUEST, "a buffer that is a byte too large is refused",
          [&] { session.generate(asked, face, pixels.data(), bytes + 1); });
  asked.preset = "am3";
  refused(FASTFACE_UNKNOWN_NAME, "an unknown preset is refused",
          [&] { session.generate(asked, face, pixels.data(), bytes); });
  asked.preset = "plain";
  asked.prompt = "\xff\xfe";
  refused(FASTFACE_INVALID_REQUEST, "a prompt that is not UTF-8 is refused",
          [&] { session.generate(asked, face, pixels.data(), bytes); });
  asked = request(0);
  asked.parameters_json = "{\"alpha\": ";
  refused(FASTFACE_INVALID_REQUEST, "parameters that are not JSON are refused",
          [&] { session.generate(asked, face, pixels.data(), bytes); });
  asked.parameters_json = "";
  asked.latents.assign(7, 0.0F);
  refused(FASTFACE_INVALID_REQUEST, "latents of another size are refused",
          [&] { session.generate(asked, face, pixels.data(), bytes); });
  require(pixels == untouched, "calls that failed wrote nothing");
}

void analysis(const fastface::Session &session) {
  refused(FASTFACE_NO_FACE_FOUND, "a picture without a face is an exception",
          [&] { session.analyze_file(load<uint8_t>("nobody.png")); });
  refused(FASTFACE_BAD_PICTURE, "a broken picture is an exception",
          [&] { session.analyze_file({1, 2, 3}); });
  refused(FASTFACE_FACE_INDEX_OUT_OF_RANGE, "a face too many is an exception",
          [&] { session.analyze_file(load<uint8_t>("face.png"), 5); });
  auto picture = FASTFACE_INIT(fastface_input_picture);
  const auto rgb = load<uint8_t>("face.rgb");
  picture.rgb = rgb.data();
  picture.width = picture.height = 96 * 4;
  require(session.analyze(picture).info().count == 1, "pixels are analysed");
}

// dlpack.h of DLPack 1.0
struct DLTensor {
  void *data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Managed {
  uint32_t major, minor;
  void *context;
  void (*deleter)(Managed *);
  uint64_t flags;
  DLTensor tensor;
};

void count_deletion(Managed *gone) {
  ++*static_cast<std::atomic<int> *>(gone->context);
  delete gone;
}

void embeddings(const fastface::Session &session, size_t bytes) {
  auto values = load<float>("embedding.f32");
  const auto crop = load<uint8_t>("crop.bgr");
  auto embedding = FASTFACE_INIT(fastface_embedding);
  embedding.values = values.data();
  embedding.count = values.size();
  refused(FASTFACE_INVALID_REQUEST, "an embedding without the aligned face is refused",
          [&] { session.embed(embedding); });
  embedding.crop_bgr = crop.data();
  std::vector<uint8_t> pixels(bytes);
  session.generate(request(3), session.embed(embedding), pixels.data(), bytes);
  save("embedding.rgb", pixels.data(), bytes);

  std::atomic<int> deleted{0};
  int64_t shape[] = {static_cast<int64_t>(values.size())}, strides[] = {1};
  auto lend = [&](int32_t device_type) {
    return new Managed{1, 0, &deleted, count_deletion, 0,
                       {values.data(), device_type, 0, 1, 2, 32, 1, shape, strides, 0}};
  };
  embedding.values = nullptr;
  embedding.dlpack = lend(1);
  session.generate(request(3), session.embed(embedding), pixels.data(), bytes);
  save("dlpack.rgb", pixels.data(), bytes);
  require(deleted == 1, "a DLPack tensor is deleted once");
  embedding.dlpack = lend(2);
  refused(FASTFACE_INVALID_REQUEST, "a tensor on a GPU is refused by engines on the host",
          [&] { session.embed(embedding); });
  require(deleted == 2, "a DLPack tensor that is refused is deleted once");
  embedding.values = values.data();
  embedding.dlpack = lend(1);
  refused(FASTFACE_INVALID_REQUEST, "two embeddings are refused",
          [&] { session.embed(embedding); });
  require(deleted == 3, "a DLPack tensor that nobody looked at is deleted once");
}

void tokens(const fastface::Session &session, const fastface_api_v1 *api, size_t bytes) {
  auto values = load<float>("tokens.f32");
  std::vector<uint8_t> pixels(bytes);
  auto request = FASTFACE_INIT(fastface_request);
  auto result = FASTFACE_INIT(fastface_result);
  request.prompt = "photo; person in a garden";
  request.preset = "am1+dcg";
  request.seed = 3;
  request.image_tokens = values.data();
  request.image_tokens_count = values.size();
  request.pixels = pixels.data();
  request.pixels_bytes = bytes;
  fastface::check(api, api->generate(session.get(), &request, &result));
  save("tokens.rgb", pixels.data(), bytes);
  request.image_tokens_count -= 1;
  require(api->generate(session.get(), &request, &result) == FASTFACE_INVALID_REQUEST,
          "a token's number too few is refused");
  request.image_tokens = nullptr;
  std::atomic<int> deleted{0};
  const auto description = session.describe();
  int64_t shape[] = {description.token_count, description.token_width}, strides[] = {shape[1], 1};
  for (const int32_t device_type : {1, 2}) {
    request.image_tokens_dlpack =
        new Managed{1, 0, &deleted, count_deletion, 0,
                    {values.data(), device_type, 0, 2, 2, 32, 1, shape, strides, 0}};
    const auto status = api->generate(session.get(), &request, &result);
    require(status == (device_type == 1 ? FASTFACE_OK : FASTFACE_INVALID_REQUEST) &&
                deleted == device_type,
            "tokens by DLPack are taken on the engines' device, and deleted once");
  }
  save("tokens_dlpack.rgb", pixels.data(), bytes);
}

// A session that is destroyed in a callback of its own call, which goes on to its end.
void destroyed_while_it_runs(const fastface::Library &library, fastface::Session session,
                             const fastface::Face &face, size_t bytes) {
  std::vector<uint8_t> pixels(bytes);
  const auto *api = library.api();
  auto asked = request(4);
  asked.on_step = [&, handle = session.get()](uint32_t step, uint32_t) {
    if (step == 1) {
      api->destroy(handle);
      require(api->stop() == FASTFACE_INVALID_REQUEST, "it does not end under a running call");
    }
    return true;
  };
  session.generate(asked, face, pixels.data(), bytes);
  save("destroyed.rgb", pixels.data(), bytes);
}

void service(const std::string &python, const std::string &cache) {
  const auto *api = fastface_get_api(FASTFACE_ABI_VERSION);
  require(api->describe(nullptr, nullptr) == FASTFACE_NOT_RUNNING, "before start nothing runs");
  refused(FASTFACE_START_FAILED, "a wrong interpreter is refused",
          [] { fastface::Library("/nowhere/bin/python"); });
  fastface::Library library(python);
  auto options = FASTFACE_INIT(fastface_session_options);
  options.cache = cache.c_str();
  options.build_missing = 1;
  options.export_folder = "/nowhere";
  refused(FASTFACE_EXPORT_INCOMPLETE, "an export that is not there is an exception",
          [&] { library.open(options); });
  options.export_folder = nullptr;
  auto session = library.open(options);
  const auto description = session.describe();
  const size_t bytes = size_t{3} * description.width * description.height;
  require(bytes == 96 * 96 * 3 && description.steps == 4, "the session describes itself");
  {
    const auto face = session.analyze_file(load<uint8_t>("face.png"));
    require(face.info().count == 1 && face.info().score > 0.5, "a face is found");
    threads(session, face, bytes);
    endings(session, face, bytes);
    analysis(session);
    embeddings(session, bytes);
    tokens(session, api, bytes);
    const auto kept = session.generate(request(2), face);
    save("kept.rgb", kept.pixels, bytes);
    refused(FASTFACE_INVALID_REQUEST, "it does not end under an open session",
            [&] { library.stop(); });
    auto *gone = session.get();
    session = fastface::Session();
    auto empty = FASTFACE_INIT(fastface_description);
    require(api->describe(gone, &empty) == FASTFACE_INVALID_REQUEST,
            "a destroyed session is refused");
    destroyed_while_it_runs(library, library.open(options), face, bytes);
  }
  std::thread([&] { library.stop(); }).join();
  require(api->describe(nullptr, nullptr) == FASTFACE_NOT_RUNNING, "after stop nothing runs");
  refused(FASTFACE_START_FAILED, "it does not start twice", [&] { fastface::Library again(python); });
}

}  // namespace

int main(int count, char **arguments) {
  if (count == 2 && std::strcmp(arguments[1], "overflow") == 0) {
    std::vector<uint8_t> pixels(96 * 96 * 3);
    volatile size_t beyond = pixels.size();
    pixels.data()[beyond] = 1;  // AddressSanitizer must end the program here
    return 0;
  }
  if (count == 2 && std::strcmp(arguments[1], "leak") == 0) {
    std::vector<uint8_t> *volatile lost = new std::vector<uint8_t>(1000);
    lost = nullptr;  // LeakSanitizer must say so at the end
    return lost != nullptr;
  }
  if (count == 4 && std::strcmp(arguments[1], "abandon") == 0) {
    auto *library = new fastface::Library(arguments[2]);
    auto options = FASTFACE_INIT(fastface_session_options);
    options.cache = arguments[3];
    options.build_missing = 1;
    new fastface::Session(library->open(options));
    std::cout << "left" << std::endl;
    std::exit(0);
  }
  if (count != 4) return 2;
  folder = arguments[3];
  service(arguments[1], arguments[2]);
  std::cout << "ended" << std::endl;
}
