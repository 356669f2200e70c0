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

}  // namespace

std::string text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

int64_t Attributes::integer(const char* name) const {
  int64_t value = 0;
  require(ort_, ort_.attribute(info_, name, &value), std::string("the attribute ") + name);
  return value;
}

int64_t Attributes::integer(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  OrtStatus* status = ort_.attribute(info_, name, &value);
  if (status == nullptr) return value;
  ort_.release(status);
  return otherwise;
}

float Attributes::number(const char* name, float otherwise) const {
  float value = 0;
  OrtStatus* status = ort_.attribute(info_, name, &value);
  if (status == nullptr) return value;
  ort_.release(status);
  return otherwise;
}

std::string Attributes::word(const char* name, const std::string& otherwise) const {
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
  Tensor tensor;
  size_t count = 0;
  check(ort_.input_count(context_, &count));
  if (index >= count) return tensor;
  const OrtValue* value = nullptr;
  check(ort_.input(context_, index, &value));
  if (value == nullptr) return tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(ort_.type_and_shape(value, &info));
  int type = 0;
  size_t rank = 0;
  OrtStatus* status = ort_.element_type(info, &type);
  if (status == nullptr) status = ort_.rank(info, &rank);
  if (status == nullptr) {
    tensor.shape.resize(rank);
    status = ort_.dimensions(info, tensor.shape.data(), rank);
  }
  ort_.release(info);
  check(status);
  tensor.type = static_cast<ElementType>(type);
  check(ort_.data(value, &tensor.data));
  // An empty tensor may have no memory, and is there all the same.
  static char nothing;
  if (tensor.data == nullptr) tensor.data = &nothing;
  return tensor;
}

Tensor Run::output(size_t index, const std::vector<int64_t>& shape, ElementType type) const {
  Tensor tensor{nullptr, type, shape};
  OrtValue* value = nullptr;
  check(ort_.output(context_, index, shape.data(), shape.size(), &value));
  if (value != nullptr) check(ort_.data(value, &tensor.data));
  return tensor;
}

void Run::check(OrtStatus* status) const { require(ort_, status, "a call of its own kernel interface"); }

}  // namespace onnxsmith
