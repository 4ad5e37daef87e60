// The interpreter of the process, owned by a thread of its own: CPython wants to be ended by the
// thread that started it, and a host may call start() and stop() on any.
#pragma once

#include <pybind11/embed.h>

#include <condition_variable>
#include <future>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "fastface_trt.h"

namespace fastface_host {

namespace py = pybind11;

struct Failure : std::runtime_error {
  Failure(fastface_status status, const std::string &message)
      : std::runtime_error(message), status(status) {}
  fastface_status status;
};

class Interpreter {
 public:
  // Start with the environment of `python` (an executable, may be empty), or take the interpreter
  // that runs. Throws Failure.
  void start(const std::string &python);

  // End it; `release` drops what is held of Python, with its lock. Throws Failure while calls run
  // or `open_sessions` says that there are some.
  template <class OpenSessions, class Release>
  void stop(OpenSessions open_sessions, Release release);

  // The Python module `fastface_trt.embedding.host`; only with the interpreter's lock.
  py::handle module() const { return module_; }

  // A call that is running: as long as it lives, the interpreter does.
  class Call {
   public:
    explicit Call(Interpreter &interpreter);
    ~Call();
    Call(const Call &) = delete;
    Call &operator=(const Call &) = delete;

   private:
    Interpreter &interpreter_;
  };

 private:
  enum class State { kNever, kStarting, kRunning, kEnded };

  // These return what went wrong, empty if nothing did.
  std::string start_own(const std::string &python);
  std::string import_host();
  void own(const std::string &python, std::promise<std::string> &started);
  void end_thread();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::thread thread_;
  py::handle module_;
  State state_ = State::kNever;
  bool stopping_ = false;
  size_t calls_ = 0;
};

template <class OpenSessions, class Release>
void Interpreter::stop(OpenSessions open_sessions, Release release) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (state_ != State::kRunning) return;
  if (size_t open = open_sessions())
    throw Failure(FASTFACE_INVALID_REQUEST,
                  std::to_string(open) + " sessions are open; destroy them before stop().");
  if (calls_ != 0)
    throw Failure(FASTFACE_INVALID_REQUEST,
                  std::to_string(calls_) + " calls are running; wait for them before stop().");
  state_ = State::kEnded;  // from here on no call begins
  lock.unlock();
  {
    py::gil_scoped_acquire gil;
    release();
    module_.dec_ref();
    module_ = py::handle();
  }
  end_thread();
}

}  // namespace fastface_host
