// What operators share: errors that become ONNX Runtime's, tensors, and loops over its threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace onnxsmith {

[[noreturn]] inline void fail(const std::string& where, const std::string& got, const std::string& expected) {
  throw std::invalid_argument("onnxsmith: " + where + ": got " + got + ", expected " + expected);
}

[[noreturn]] inline void fail(const char* kernel, const char* what, const std::string& got,
                              const std::string& expected) {
  fail(std::string(kernel) + ", " + what, got, expected);
}

// The extents of a tensor, of which a kernel makes several in each run: nothing is allocated for them.
class Shape {
 public:
  static constexpr size_t kMost = 8;
  Shape() = default;
  Shape(std::initializer_list<int64_t> extents) {
    for (int64_t extent : extents) push_back(extent);
  }
  void resize(size_t size) {
    if (size > kMost) fail("a tensor", std::to_string(size) + " axes", "at most " + std::to_string(kMost));
    size_ = size;
  }
  void push_back(int64_t extent) {
    resize(size_ + 1);
    back() = extent;
  }
  int64_t* data() { return extents_; }
  int64_t& back() { return extents_[size_ - 1]; }
  int64_t& operator[](size_t axis) { return extents_[axis]; }
  const int64_t* data() const { return extents_; }
  int64_t back() const { return extents_[size_ - 1]; }
  int64_t operator[](size_t axis) const { return extents_[axis]; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  const int64_t* begin() const { return extents_; }
  const int64_t* end() const { return extents_ + size_; }
  bool operator==(const Shape& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }
  bool operator!=(const Shape& other) const { return !(*this == other); }

 private:
  int64_t extents_[kMost] = {};
  size_t size_ = 0;
};

// A tensor of a running kernel. `data` is null for an optional input that is not there.
struct Tensor {
  void* data = nullptr;
  ElementType type = kUndefined;
  Shape shape;

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

std::string text(const Shape& shape);

// An input as it is known when the kernel is made: a constant, one that is not there, or one that each run brings.
// ONNX Runtime takes longer to say what a tensor is than a kernel to read it.
struct Input {
  bool known = false;
  Tensor tensor;
};

// What a node says when its kernel is made.
class Node {
 public:
  Node(Ort ort, const OrtKernelInfo* info);
  int64_t integer(const char* name) const;
  int64_t integer(const char* name, int64_t otherwise) const;
  float number(const char* name, float otherwise) const;
  std::string word(const char* name, const std::string& otherwise) const;
  const std::vector<Input>& inputs() const { return inputs_; }
  // Whether the inputs [first, first + count) are the same in every run.
  bool knows(size_t first, size_t count) const;
  // An input that is known.
  Tensor input(size_t index) const { return index < inputs_.size() ? inputs_[index].tensor : Tensor{}; }

 private:
  Ort ort_;
  const OrtKernelInfo* info_;
  std::vector<Input> inputs_;
};

// One run of a kernel.
class Run {
 public:
  Run(Ort ort, OrtKernelContext* context, const std::vector<Input>& inputs)
      : ort_(ort), context_(context), inputs_(inputs) {}
  Tensor input(size_t index) const;
  Tensor output(size_t index, const Shape& shape, ElementType type) const;

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

  // Calls body(row) for each row in [0, count), in the same way; a thread takes some at a time.
  template <typename Body>
  void for_rows(int64_t count, const Body& body) const {
    constexpr int64_t kAtOnce = 16;
    parallel((count + kAtOnce - 1) / kAtOnce, [&](size_t task) {
      const int64_t end = std::min<int64_t>(count, (task + 1) * kAtOnce);
      for (int64_t row = task * kAtOnce; row < end; ++row) body(row);
    });
  }

 private:
  void check(OrtStatus* status) const;
  Ort ort_;
  OrtKernelContext* context_;
  const std::vector<Input>& inputs_;
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
