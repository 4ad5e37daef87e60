/* Plain C with dlopen and the function table. Arguments: the library, the interpreter, the engine
 * cache, a picture, a file for the pixels. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fastface_trt.h"

static const fastface_api_v1 *ff;

static void must(fastface_status status, const char *what) {
  if (status != FASTFACE_OK) {
    fprintf(stderr, "%s: %d: %s\n", what, (int)status, ff->last_error());
    exit(1);
  }
}

static void expect(int holds, const char *what) {
  if (!holds) {
    fprintf(stderr, "does not hold: %s\n", what);
    exit(1);
  }
}

static void *start(void *python) {
  fastface_start_options options = FASTFACE_INIT(fastface_start_options);
  options.python_executable = python;
  must(ff->start(&options), "start");
  return NULL;
}

static unsigned char *load(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  expect(file != NULL, path);
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  unsigned char *bytes = malloc(*size);
  expect(fread(bytes, 1, *size, file) == *size, path);
  fclose(file);
  return bytes;
}

int main(int count, char **arguments) {
  if (count != 6) return 2;
  void *library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const fastface_api_v1 *(*get_api)(uint32_t);
  *(void **)&get_api = dlsym(library, "fastface_get_api");
  expect(get_api(2) == NULL, "there is no version 2");
  ff = get_api(FASTFACE_ABI_VERSION);
  expect(ff->struct_size == sizeof(fastface_api_v1), "the table has the header's size");

  pthread_t starter; /* which is gone when the rest runs, and when it stops */
  pthread_create(&starter, NULL, start, arguments[2]);
  pthread_join(starter, NULL);
  must(ff->start(NULL), "start again");

  fastface_session_options options = FASTFACE_INIT(fastface_session_options);
  options.cache = arguments[3];
  options.build_missing = 1;
  fastface_session *session;
  must(ff->create(&options, &session), "create");

  fastface_input_picture picture = FASTFACE_INIT(fastface_input_picture);
  unsigned char *file = load(arguments[4], &picture.file_bytes);
  picture.file = file;
  fastface_face *face;
  must(ff->analyze(session, &picture, 0, &face), "analyze");
  free(file);

  fastface_description description = FASTFACE_INIT(fastface_description);
  must(ff->describe(session, &description), "describe");
  fastface_request request = FASTFACE_INIT(fastface_request);
  fastface_result result = FASTFACE_INIT(fastface_result);
  expect(ff->generate(session, &request, &result) == FASTFACE_INVALID_REQUEST, "no face");
  expect(strstr(ff->last_error(), "Give one of face") != NULL, "the error says what is missing");
  request.prompt = "photo; person in a garden";
  request.preset = "am1+dcg";
  request.seed = 5;
  request.face = face;
  request.pixels_bytes = (size_t)description.width * description.height * 3;
  request.pixels = malloc(request.pixels_bytes);
  request.parameters_json = "{\"rescale\": 0.5}";
  must(ff->generate(session, &request, &result), "generate");
  expect(result.pixels == request.pixels, "the pixels lie in the caller's memory");
  FILE *out = fopen(arguments[5], "wb");
  expect(fwrite(result.pixels, 1, result.pixels_bytes, out) == request.pixels_bytes, "written");
  fclose(out);

  /* A host that was built when the struct ended before `on_step`: what lies there is not read. */
  request.struct_size = offsetof(fastface_request, on_step);
  memset((char *)&request + request.struct_size, 0xFF, sizeof request - request.struct_size);
  must(ff->generate(session, &request, &result), "an older host");
  request.struct_size = 0;
  expect(ff->generate(session, &request, &result) == FASTFACE_INVALID_REQUEST, "no struct_size");
  free(request.pixels);

  expect(ff->generate((fastface_session *)face, &request, &result) == FASTFACE_INVALID_REQUEST,
         "a handle of another kind is refused");
  ff->release_face(face);
  ff->release_face(face);
  expect(ff->stop() == FASTFACE_INVALID_REQUEST, "no stop under a session");
  ff->destroy(session);
  ff->destroy(session);
  must(ff->stop(), "stop");
  must(ff->stop(), "stop again");
  puts("ended");
  return 0;
}
