// Handles that a host may hold: numbers in the guise of pointers. They are never followed and never
// given out twice, so one that was released, or of another kind, is refused instead of read.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>

#include "interpreter.hpp"

namespace fastface_host {

inline std::uintptr_t next_handle() {
  static std::atomic<std::uintptr_t> last{0};
  return ++last;
}

template <class Handle, class Value>
class Handles {
 public:
  explicit Handles(const char *kind) : kind_(kind) {}

  Handle *add(std::shared_ptr<Value> value) {
    std::lock_guard<std::mutex> lock(mutex_);
    const std::uintptr_t number = next_handle();
    values_.emplace(number, std::move(value));
    return reinterpret_cast<Handle *>(number);
  }

  std::shared_ptr<Value> get(const Handle *handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = values_.find(reinterpret_cast<std::uintptr_t>(handle));
    if (found == values_.end())
      throw Failure(FASTFACE_INVALID_REQUEST,
                    std::string("The ") + kind_ + " handle is unknown, or was released.");
    return found->second;
  }

  // What it stood for, to be dropped by the caller; null for an unknown one.
  std::shared_ptr<Value> remove(Handle *handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = values_.find(reinterpret_cast<std::uintptr_t>(handle));
    if (found == values_.end()) return nullptr;
    auto value = std::move(found->second);
    values_.erase(found);
    return value;
  }

  size_t size() {
    std::lock_guard<std::mutex> lock(mutex_);
    return values_.size();
  }

  void clear() {
    std::unordered_map<std::uintptr_t, std::shared_ptr<Value>> gone;
    std::lock_guard<std::mutex> lock(mutex_);
    gone.swap(values_);
  }

 private:
  const char *kind_;
  std::mutex mutex_;
  std::unordered_map<std::uintptr_t, std::shared_ptr<Value>> values_;
};

// A Python object that may be dropped on any thread.
struct Held {
  explicit Held(py::object value) : object(std::move(value)) {}
  ~Held() {
    py::gil_scoped_acquire gil;
    object = py::object();
  }
  Held(const Held &) = delete;
  Held &operator=(const Held &) = delete;
  py::object object;
};

// A host's struct as this library knows it: what the host's version lacks is zero.
template <class Struct>
Struct read(const Struct *given, const char *name) {
  if (given == nullptr || given->struct_size < sizeof(size_t))
    throw Failure(FASTFACE_INVALID_REQUEST,
                  std::string(name) + " is missing, or its struct_size is not set.");
  Struct known{};
  std::memcpy(&known, given, std::min(given->struct_size, sizeof(Struct)));
  known.struct_size = std::min(given->struct_size, sizeof(Struct));
  return known;
}

// Fill a host's struct as far as the host's version goes.
template <class Struct>
void write(Struct *target, Struct values) {
  const size_t size = std::min(target->struct_size, sizeof(Struct));
  values.struct_size = target->struct_size;
  std::memcpy(target, &values, size);
}

}  // namespace fastface_host
