#include "kernel.h"

namespace onnxsmith {

namespace {

// Turns a status of ONNX Runtime into an exception.
void require(Ort ort, OrtStatus* status, const std::string& what) {
  if (status == nullptr) return;
  const std::string said = ort.message(status);
  ort.release(status);
  throw std::runtime_error("onnxsmith: ONNX Runtime refuses " + what + ": " + said);
}

// What a value is. `Check` is called with the status of each call.
template <typename Check>
Tensor tensor_of(Ort ort, const OrtValue* value, const Check& check) {
  Tensor tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(ort.type_and_shape(value, &info));
  int type = 0;
  size_t rank = 0;
  OrtStatus* status = ort.element_type(info, &type);
  if (status == nullptr) status = ort.rank(info, &rank);
  const bool fits = rank <= Shape::kMost;
  if (status == nullptr && fits) {
    tensor.shape.resize(rank);
    status = ort.dimensions(info, tensor.shape.data(), rank);
  }
  ort.release(info);
  check(status);
  if (!fits) tensor.shape.resize(rank);  // throws
  tensor.type = static_cast<ElementType>(type);
  check(ort.data(value, &tensor.data));
  // An empty tensor may have no memory, and is there all the same.
  static char nothing;
  if (tensor.data == nullptr) tensor.data = &nothing;
  return tensor;
}

}  // namespace

std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

Node::Node(Ort ort, const OrtKernelInfo* info) : ort_(ort), info_(info) {
  const auto check = [&](OrtStatus* status) { require(ort_, status, "what it knows of a node"); };
  size_t count = 0;
  check(ort_.input_count(info_, &count));
  inputs_.resize(count);
  for (size_t i = 0; i < count; ++i) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(ort_.constant_input(info_, i, &is_constant, &value));
    if (is_constant != 0 && value != nullptr) {
      inputs_[i] = {true, tensor_of(ort_, value, check)};
      continue;
    }
    // What is not there has no name. The size counts the terminating zero.
    size_t size = 0;
    check(ort_.input_name(info_, i, nullptr, &size));
    inputs_[i].known = size <= 1;
  }
}

bool Node::knows(size_t first, size_t count) const {
  for (size_t i = first; i < std::min(first + count, inputs_.size()); ++i) {
    if (!inputs_[i].known) return false;
  }
  return true;
}

int64_t Node::integer(const char* name) const {
  int64_t value = 0;
  require(ort_, ort_.attribute(info_, name, &value), std::string("the attribute ") + name);
  return value;
}

int64_t Node::integer(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  OrtStatus* status = ort_.attribute(info_, name, &value);
  if (status == nullptr) return value;
  ort_.release(status);
  return otherwise;
}

float Node::number(const char* name, float otherwise) const {
  float value = 0;
  OrtStatus* status = ort_.attribute(info_, name, &value);
  if (status == nullptr) return value;
  ort_.release(status);
  return otherwise;
}

std::string Node::word(const char* name, const std::string& otherwise) const {
  // The size counts the terminating zero.
  size_t size = 0;
  OrtStatus* status = ort_.attribute(info_, name, nullptr, &size);
  if (status != nullptr) {
    ort_.release(status);
    return otherwise;
  }
  std::string value(size, '\0');
  require(ort_, ort_.attribute(info_, name, &value[0], &size), std::string("the attribute ") + name);
  value.resize(size ? size - 1 : 0);
  return value;
}

Tensor Run::input(size_t index) const {
  if (index >= inputs_.size()) return {};
  if (inputs_[index].known) return inputs_[index].tensor;
  const OrtValue* value = nullptr;
  check(ort_.input(context_, index, &value));
  if (value == nullptr) return {};
  return tensor_of(ort_, value, [this](OrtStatus* status) { check(status); });
}

Tensor Run::output(size_t index, const Shape& shape, ElementType type) const {
  Tensor tensor{nullptr, type, shape};
  OrtValue* value = nullptr;
  check(ort_.output(context_, index, shape.data(), shape.size(), &value));
  if (value != nullptr) check(ort_.data(value, &tensor.data));
  return tensor;
}

void Run::check(OrtStatus* status) const { require(ort_, status, "a call of its own kernel interface"); }

}  // namespace onnxsmith
