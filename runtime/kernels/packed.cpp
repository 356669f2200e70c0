#include "packed.h"

namespace onnxsmith {

namespace {

constexpr int64_t kMost = 2147483647;  // what sizes are computed from stays far from overflow

void check_shape(const std::string& where, const Tensor& tensor, const std::vector<int64_t>& expected) {
  if (tensor.shape != expected) fail(where, text(tensor.shape), text(expected));
}

bool is_half(const std::string& where, const Tensor& tensor) {
  if (tensor.type != kFloat && tensor.type != kFloat16) {
    fail(where, "element type " + std::to_string(tensor.type), "float32 or float16");
  }
  return tensor.type == kFloat16;
}

}  // namespace

PackedAttributes::PackedAttributes(const Attributes& attributes, const char* name)
    : columns(attributes.integer("K")),
      rows(attributes.integer("N")),
      bits(attributes.integer("bits")),
      block_size(attributes.integer("block_size", 0)),
      activation_block(attributes.integer("activation_block", 32)),
      name_(name) {
  const std::string where(name);
  if (bits != 4 && bits != 8 && bits != 32) fail(where + ", bits", std::to_string(bits), "4, 8 or 32");
  if (rows < 1 || rows > kMost) fail(where + ", N", std::to_string(rows), "at least 1, and less than 2^31");
  if (columns < 1 || columns > kMost) {
    fail(where + ", K", std::to_string(columns), "at least 1, and less than 2^31");
  }
  if (is_float()) return;
  if (block_size < 16 || (block_size != 16 && block_size % 32 != 0)) {
    fail(where + ", block_size", std::to_string(block_size), "16 or a multiple of 32");
  }
  if (activation_block != 16 && activation_block != 32) {
    fail(where + ", activation_block", std::to_string(activation_block), "16 or 32");
  }
  if (columns % block_size != 0 || columns % 32 != 0) {
    fail(where + ", K", std::to_string(columns), "a multiple of 32 and of block_size");
  }
}

Weight PackedAttributes::weight(const Tensor& codes, const Tensor& scales, const Tensor& offsets) const {
  const std::string where(name_);
  Weight weight{};
  weight.bits = static_cast<int>(bits);
  weight.columns = columns;
  weight.block_size = block_size;
  weight.unit = block_size < activation_block ? block_size : activation_block;
  if (codes.type != kUint8) fail(where + ", B", "element type " + std::to_string(codes.type), "uint8");
  check_shape(where + ", B", codes, {tiles(), columns * bits / 32, 64});
  weight.codes = codes.as<uint8_t>();
  const std::vector<int64_t> blocks{tiles(), columns / block_size, kTile};
  if (!scales) fail(where + ", scales", "none", "float32 or float16 for " + std::to_string(bits) + " bits");
  weight.half_scales = is_half(where + ", scales", scales);
  check_shape(where + ", scales", scales, blocks);
  weight.scales = scales.data;
  weight.kind = Offsets::kMiddle;
  if (offsets) {
    check_shape(where + ", offsets", offsets, blocks);
    weight.offsets = offsets.data;
    weight.kind = offsets.type == kUint8 ? Offsets::kZeroPoints : Offsets::kMinimums;
    if (offsets.type != kUint8) weight.half_offsets = is_half(where + ", offsets", offsets);
  }
  return weight;
}

const float* PackedAttributes::floats(const Tensor& given) const {
  const std::string where(name_);
  if (given.type != kFloat) fail(where + ", B", "element type " + std::to_string(given.type), "float32");
  check_shape(where + ", B", given, {tiles(), columns, kTile});
  return given.as<float>();
}

void PackedAttributes::check_rows(const Tensor& operand, const char* what) const {
  if (operand.shape.empty() || operand.shape.back() != columns) {
    fail(std::string(name_) + ", " + what, text(operand.shape), "K = " + std::to_string(columns) + " columns");
  }
}

}  // namespace onnxsmith
