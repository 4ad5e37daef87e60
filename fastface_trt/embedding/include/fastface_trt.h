/* FastFace-TRT for C and C++: one function table, opaque handles, no C++ in the interface.
 *
 *     const fastface_api_v1 *ff = fastface_get_api(1);      // or dlsym(library, "fastface_get_api")
 *     ff->start(NULL); ff->create(&options, &session); ff->generate(session, &request, &result); ...
 *
 * Rules for all of it:
 * - Every function may be called on any thread, and several at once. Pictures run side by side: the
 *   interpreter's lock is released while engines run and while your callbacks do.
 * - Every struct begins with `struct_size`, which you set to sizeof(the struct), and is zeroed
 *   otherwise: `fastface_request r = FASTFACE_INIT(fastface_request);`. Fields are only ever added
 *   at the end, and zero means their default, so older hosts run with newer libraries.
 * - What you pass in is read during the call and belongs to you, but for `dlpack`, see there.
 * - Handles are numbers: one that was released, or of another kind, is refused, not followed.
 * - A function that returns a status other than FASTFACE_OK has done nothing, and last_error() of
 *   the same thread says why.
 */
#ifndef FASTFACE_TRT_H
#define FASTFACE_TRT_H

#include <stddef.h>
#include <stdint.h>

#define FASTFACE_ABI_VERSION 1

#if defined(__GNUC__)
#define FASTFACE_EXPORT __attribute__((visibility("default")))
#else
#define FASTFACE_EXPORT
#endif

#ifdef __cplusplus
template <class Struct>
inline Struct fastface_init() {
  Struct made{};
  made.struct_size = sizeof(Struct);
  return made;
}
#define FASTFACE_INIT(type) fastface_init<type>()
extern "C" {
#else
#define FASTFACE_INIT(type) {.struct_size = sizeof(type)}
#endif

/* The codes of fastface_trt.errors, and those of this library from 100 on. */
typedef int32_t fastface_status;
enum {
  FASTFACE_OK = 0,
  FASTFACE_ERROR = 1,
  FASTFACE_INVALID_REQUEST = 2,
  FASTFACE_UNKNOWN_NAME = 3,
  FASTFACE_BAD_PICTURE = 4,
  FASTFACE_NO_FACE_FOUND = 5,
  FASTFACE_FACE_INDEX_OUT_OF_RANGE = 6,
  FASTFACE_WEIGHTS = 7,
  FASTFACE_EXPORT_INCOMPLETE = 8,
  FASTFACE_MANIFEST = 9,
  FASTFACE_ENGINE_MISMATCH = 10,
  FASTFACE_BACKEND_UNAVAILABLE = 11,
  FASTFACE_BUILD_FAILED = 12,
  FASTFACE_ENGINE_FAILED = 13,
  FASTFACE_OUT_OF_MEMORY = 14,
  FASTFACE_STORAGE = 15,
  FASTFACE_MISSING_DEPENDENCY = 16,
  FASTFACE_LICENCE_NOT_ACKNOWLEDGED = 17,
  FASTFACE_CANCELLED = 18,
  FASTFACE_DEADLINE_PASSED = 19,
  FASTFACE_BUSY = 20,
  FASTFACE_UNAVAILABLE = 21,
  FASTFACE_REFUSED = 22,
  FASTFACE_NOT_RUNNING = 100,   /* before start, after stop */
  FASTFACE_START_FAILED = 101,  /* no interpreter, or it does not find the package */
  FASTFACE_INTERNAL = 102       /* an error that should not happen; please report it */
};

typedef struct fastface_session fastface_session;
typedef struct fastface_face fastface_face;
typedef struct fastface_picture fastface_picture;

typedef struct {
  size_t struct_size;
  /* The environment that fastface-trt is installed in: its bin/python. NULL: $VIRTUAL_ENV, then
   * the interpreter that this library was built with. Ignored where Python runs already. */
  const char *python_executable;
} fastface_start_options;

typedef struct {
  size_t struct_size;
  const char *export_folder;      /* NULL: the small model of the package */
  const char *backend;            /* NULL: onnxruntime */
  const char *cache;              /* folder of built engines; NULL: the user's */
  int32_t threads;                /* CPU threads per module; 0: measured */
  int32_t licence_acknowledged;   /* you accept the licence of downloaded face models */
  int32_t build_missing;          /* build engines that are not in the cache, for minutes */
} fastface_session_options;

typedef struct {
  size_t struct_size;
  uint32_t width, height;         /* pixels of a picture unless the request says otherwise */
  uint32_t steps;
  uint32_t token_count, token_width; /* of all pictures of a person that the export takes */
} fastface_description;

/* Pixels in your memory, or the bytes of a PNG, JPEG, WebP, BMP or TIFF file. One of both. */
typedef struct {
  size_t struct_size;
  const uint8_t *rgb;             /* height rows of width * 3 bytes */
  uint32_t width, height;
  const uint8_t *file;
  size_t file_bytes;
} fastface_input_picture;

/* A face that you analysed yourself. One of `values` and `dlpack`. */
typedef struct {
  size_t struct_size;
  const float *values;            /* the embedding, of any length but zero */
  size_t count;                   /* 512 */
  /* A DLManagedTensorVersioned (DLPack 1.x). It is the library's as soon as it is passed, whatever
   * the call returns: its deleter is called once, on any thread, at the latest by stop(). */
  void *dlpack;
  const uint8_t *crop_bgr;        /* the aligned face, 224 rows of 224 * 3 bytes; see docs/embedding.md */
  const uint8_t *portrait_bgr;    /* 512 rows of 512 * 3 bytes; PuLID only */
} fastface_embedding;

typedef struct {
  size_t struct_size;
  float left, top, right, bottom, score;
  uint32_t index, count;
} fastface_face_info;

/* Called after every step, on the thread that called generate and without the interpreter's lock;
 * other than 0 cancels. It may call every function of the table but stop(). */
typedef int32_t (*fastface_on_step)(void *user, uint32_t step, uint32_t steps);

typedef struct {
  size_t struct_size;
  const char *prompt;             /* UTF-8 */
  const char *negative_prompt;    /* NULL: none */
  const char *preset;             /* NULL: plain */
  uint64_t seed;
  uint32_t width, height, steps;  /* 0: the description's */
  const fastface_face *face;      /* this, image_tokens, or image_tokens_dlpack */
  const float *image_tokens;      /* token_count rows of token_width */
  size_t image_tokens_count;      /* token_count * token_width */
  const float *latents;           /* standard normal noise to start from; NULL: the seed's */
  size_t latents_count;
  /* Where the picture goes: exactly width * height * 3 bytes of RGB, rows from the top. It is
   * checked before anything runs and written only when the call succeeds, without a copy between.
   * NULL: the picture stays in the library, see fastface_result. */
  uint8_t *pixels;
  size_t pixels_bytes;
  fastface_on_step on_step;       /* may be NULL */
  void *user;
  uint64_t task;                  /* your number for cancel(); 0: cannot be cancelled by number */
  /* Further fields of GenerationRequest as a JSON object, written as everywhere: {"alpha":
   * "cosine:high=3", "guidance_rescale": 0.7}. They override the fields above. NULL: none. */
  const char *parameters_json;
  /* Image tokens as a DLManagedTensorVersioned, on the host or on the engines' GPU; owned as
   * fastface_embedding.dlpack is. Order what writes them by `stream` or `event`. */
  void *image_tokens_dlpack;
  /* CUDA stream and event (cudaStream_t, cudaEvent_t) that the work waits for; the stream then waits
   * for the work, and `done` is recorded behind it. NULL: none. Without effect on the host. */
  void *stream, *event, *done;
  int32_t pixels_on_gpu;          /* `pixels` is a pointer to memory of the engines' GPU */
} fastface_request;

typedef struct {
  size_t struct_size;
  uint32_t width, height;
  const uint8_t *pixels;          /* request.pixels, or a view of `picture` */
  size_t pixels_bytes;
  fastface_picture *picture;      /* where request.pixels was NULL: `pixels` lives until you
                                   * release_picture it, or until stop(), and is not for writing */
} fastface_result;

typedef struct fastface_api_v1 {
  size_t struct_size;
  uint32_t abi_version;

  /* Start the interpreter, once in the life of a process; a further call while it runs is fine.
   * Where the host runs Python itself, that one is used and left running. */
  fastface_status (*start)(const fastface_start_options *options);
  /* End it, and with it all faces and pictures. Refused while sessions are open or calls run. */
  fastface_status (*stop)(void);

  fastface_status (*create)(const fastface_session_options *options, fastface_session **session);
  /* Its calls that are running go on to their end. Here and below, unknown handles are ignored. */
  void (*destroy)(fastface_session *session);
  fastface_status (*describe)(fastface_session *session, fastface_description *description);

  /* Find a face: `index` 0 is the largest. Release it when no further call needs it. */
  fastface_status (*analyze)(fastface_session *session, const fastface_input_picture *picture,
                             uint32_t index, fastface_face **face);
  fastface_status (*embed)(fastface_session *session, const fastface_embedding *embedding,
                           fastface_face **face);
  fastface_status (*face_info)(const fastface_face *face, fastface_face_info *info);
  void (*release_face)(fastface_face *face);

  fastface_status (*generate)(fastface_session *session, const fastface_request *request,
                              fastface_result *result);
  void (*release_picture)(fastface_picture *picture);
  /* End the running call with this number before its next step; unknown numbers are ignored. */
  void (*cancel)(fastface_session *session, uint64_t task);

  /* What the last failed call of this thread says, UTF-8; valid until this thread's next call. */
  const char *(*last_error)(void);

  /* One face of `count` that are of the same person in several pictures, for an export that takes
   * several (FaceID-Portrait). The others may be released. Check struct_size before calling it. */
  fastface_status (*one_person)(fastface_session *session, const fastface_face *const *faces,
                                size_t count, fastface_face **face);
} fastface_api_v1;

/* The table of an ABI version, NULL where this library has none. The table lives for ever. */
FASTFACE_EXPORT const fastface_api_v1 *fastface_get_api(uint32_t version);

#ifdef __cplusplus
}
#endif
#endif
