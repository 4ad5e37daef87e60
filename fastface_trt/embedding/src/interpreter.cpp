#include "interpreter.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>

#ifndef FASTFACE_BUILT_WITH
#define FASTFACE_BUILT_WITH ""
#endif

namespace fastface_host {

namespace {

std::string chosen_python(const std::string &python) {
  std::string chosen = python;
  if (chosen.empty()) {
    const char *environment = std::getenv("VIRTUAL_ENV");
    chosen = environment && *environment ? std::string(environment) + "/bin/python"
                                         : std::string(FASTFACE_BUILT_WITH);
  }
  if (!chosen.empty() && access(chosen.c_str(), X_OK) != 0)
    throw Failure(FASTFACE_START_FAILED,
                  "There is no interpreter at " + chosen +
                      ". Set python_executable to bin/python of the environment that fastface-trt "
                      "is installed in.");
  return chosen;
}

// Extension modules such as numpy's look up Python's symbols in the whole process, and a library
// that was opened with RTLD_LOCAL, as dlopen does by itself, keeps its libpython out of sight.
void show_libpython_to_extensions() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void *>(&Py_IsInitialized), &info) && info.dli_fname)
    dlopen(info.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
}

}  // namespace

void Interpreter::start(const std::string &python) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return state_ != State::kStarting; });
  if (state_ == State::kRunning) return;
  if (state_ == State::kEnded)
    throw Failure(FASTFACE_START_FAILED,
                  "The interpreter was ended and numpy cannot be started twice in a process. "
                  "Start it once, and stop it last.");
  state_ = State::kStarting;
  // Nobody may wait for Python's lock while holding ours.
  lock.unlock();
  std::string problem;
  try {
    problem = Py_IsInitialized() ? import_host() : start_own(chosen_python(python));
  } catch (const std::exception &error) {
    problem = error.what();
  }
  lock.lock();
  const bool own_ended = !problem.empty() && thread_.joinable();
  state_ = problem.empty() ? State::kRunning : own_ended ? State::kEnded : State::kNever;
  changed_.notify_all();
  lock.unlock();
  if (own_ended) thread_.join();
  if (!problem.empty()) throw Failure(FASTFACE_START_FAILED, problem);
}

std::string Interpreter::start_own(const std::string &python) {
  show_libpython_to_extensions();
  std::promise<std::string> started;
  auto problem = started.get_future();
  thread_ = std::thread([this, &started, &python] { own(python, started); });
  return problem.get();
}

void Interpreter::own(const std::string &python, std::promise<std::string> &started) {
  try {
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    config.parse_argv = 0;
    config.install_signal_handlers = 0;  // signals are the host's
    if (!python.empty())  // Python finds its environment, a venv's too, from where this lies
      PyConfig_SetBytesString(&config, &config.program_name, python.c_str());
    py::initialize_interpreter(&config, 0, nullptr, false);
  } catch (const std::exception &error) {
    started.set_value(std::string("Python did not start: ") + error.what());
    return;
  }
  const std::string problem = import_host();
  if (problem.empty()) {
    PyThreadState *idle = PyEval_SaveThread();
    started.set_value("");
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return stopping_; });
    lock.unlock();
    PyEval_RestoreThread(idle);
    py::finalize_interpreter();
  } else {
    py::finalize_interpreter();
    started.set_value(problem);
  }
}

std::string Interpreter::import_host() {
  py::gil_scoped_acquire gil;
  try {
    module_ = py::module_::import("fastface_trt.embedding.host").release();
    return "";
  } catch (py::error_already_set &error) {
    const auto prefix = py::module_::import("sys").attr("prefix").cast<std::string>();
    return "fastface-trt cannot be imported from " + prefix + ": " +
           py::str(error.value()).cast<std::string>() +
           ". Set python_executable to bin/python of the environment that it is installed in.";
  }
}

void Interpreter::end_thread() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

Interpreter::Call::Call(Interpreter &interpreter) : interpreter_(interpreter) {
  std::lock_guard<std::mutex> lock(interpreter_.mutex_);
  if (interpreter_.state_ != State::kRunning)
    throw Failure(FASTFACE_NOT_RUNNING, interpreter_.state_ == State::kEnded
                                            ? "The library was stopped."
                                            : "Call start() first.");
  ++interpreter_.calls_;
}

Interpreter::Call::~Call() {
  std::lock_guard<std::mutex> lock(interpreter_.mutex_);
  --interpreter_.calls_;
}

}  // namespace fastface_host
