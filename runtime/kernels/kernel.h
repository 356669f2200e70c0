// What operators share: errors that become ONNX Runtime's, tensors, and loops over its threads.
#pragma once

#include <atomic>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace onnxsmith {

// A tensor of a running kernel. `data` is null for an optional input that is not there.
struct Tensor {
  void* data = nullptr;
  ElementType type = kUndefined;
  std::vector<int64_t> shape;

  explicit operator bool() const { return data != nullptr; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t size() const {
    int64_t count = 1;
    for (int64_t extent : shape) count *= extent;
    return count;
  }
};

[[noreturn]] inline void fail(const std::string& where, const std::string& got, const std::string& expected) {
  throw std::invalid_argument("onnxsmith: " + where + ": got " + got + ", expected " + expected);
}

std::string text(const std::vector<int64_t>& shape);

// The attributes of a node, read when its kernel is made.
class Attributes {
 public:
  Attributes(Ort ort, const OrtKernelInfo* info) : ort_(ort), info_(info) {}
  int64_t integer(const char* name) const;
  int64_t integer(const char* name, int64_t otherwise) const;
  float number(const char* name, float otherwise) const;
  std::string word(const char* name, const std::string& otherwise) const;

 private:
  Ort ort_;
  const OrtKernelInfo* info_;
};

// One run of a kernel.
class Run {
 public:
  Run(Ort ort, OrtKernelContext* context) : ort_(ort), context_(context) {}
  Tensor input(size_t index) const;
  Tensor output(size_t index, const std::vector<int64_t>& shape, ElementType type) const;

  // Calls body(i) for each i in [0, count); which thread does which is not fixed, so body must not depend
  // on it: results are the same for any number of threads.
  template <typename Body>
  void parallel(size_t count, const Body& body) const {
    if (count == 1) {
      body(0);
      return;
    }
    // An exception may not pass through ONNX Runtime: the first is kept, and thrown here.
    struct Shared {
      const Body& body;
      std::atomic_flag failed;
      std::exception_ptr error;
    };
    Shared shared{body, ATOMIC_FLAG_INIT, nullptr};
    check(ort_.parallel_for(
        context_,
        [](void* data, size_t i) {
          Shared& shared = *static_cast<Shared*>(data);
          try {
            shared.body(i);
          } catch (...) {
            if (!shared.failed.test_and_set()) shared.error = std::current_exception();
          }
        },
        count, 0, &shared));
    if (shared.error) std::rethrow_exception(shared.error);
  }

 private:
  void check(OrtStatus* status) const;
  Ort ort_;
  OrtKernelContext* context_;
};

class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(const Run& run) const = 0;
};

// Memory of the calling thread that lives from run to run; one use at a time for each `Tag`.
template <typename Tag>
inline char* scratch(size_t bytes) {
  struct Buffer {
    char* data = nullptr;
    size_t size = 0;
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < bytes) {
    ::operator delete(buffer.data, std::align_val_t(64));
    buffer.data = nullptr;
    buffer.size = 0;
    buffer.data = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
    buffer.size = bytes;
  }
  return buffer.data;
}

}  // namespace onnxsmith
