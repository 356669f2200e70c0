#include "packed.h"

namespace onnxsmith {

namespace {

constexpr int64_t kMost = 2147483647;  // what sizes are computed from stays far from overflow

void check_shape(const std::string& where, const Tensor& tensor, const Shape& expected) {
  if (tensor.shape != expected) fail(where, text(tensor.shape), text(expected));
}

bool is_half(const std::string& where, const Tensor& tensor) {
  if (tensor.type != kFloat && tensor.type != kFloat16) {
    fail(where, "element type " + std::to_string(tensor.type), "float32 or float16");
  }
  return tensor.type == kFloat16;
}

}  // namespace

PackedAttributes::PackedAttributes(const Node& node, const char* name, size_t first_input)
    : columns(node.integer("K")),
      rows(node.integer("N")),
      bits(node.integer("bits")),
      block_size(node.integer("block_size", 0)),
      activation_block(node.integer("activation_block", 32)),
      name_(name),
      first_input_(first_input) {
  const std::string where(name);
  if (bits != 4 && bits != 8 && bits != 32) fail(where + ", bits", std::to_string(bits), "4, 8 or 32");
  if (rows < 1 || rows > kMost) fail(where + ", N", std::to_string(rows), "at least 1, and less than 2^31");
  if (columns < 1 || columns > kMost) {
    fail(where + ", K", std::to_string(columns), "at least 1, and less than 2^31");
  }
  if (!is_float()) check_blocks();
  if (!node.knows(first_input, is_float() ? 1 : 3)) return;
  try {
    if (is_float()) {
      floats_ = checked(node.input(first_input));
    } else {
      weight_ = checked(node.input(first_input), node.input(first_input + 1), node.input(first_input + 2));
    }
    kept_ = true;
  } catch (const std::invalid_argument&) {
    // Said when the node is run, as of weights that a run brings.
  }
}

void PackedAttributes::check_blocks() const {
  const std::string where(name_);
  if (block_size < 16 || (block_size != 16 && block_size % 32 != 0)) {
    fail(where + ", block_size", std::to_string(block_size), "16 or a multiple of 32");
  }
  if (activation_block != 16 && activation_block != 32 && activation_block != 64 && activation_block != 128) {
    fail(where + ", activation_block", std::to_string(activation_block), "16, 32, 64 or 128");
  }
  if (block_size > activation_block && block_size % activation_block != 0) {
    fail(where + ", block_size", std::to_string(block_size),
         "a multiple of the activation_block " + std::to_string(activation_block) + ", or less");
  }
  if (block_size < activation_block && block_size != 16 && block_size != 32 && block_size != 64) {
    fail(where + ", block_size", std::to_string(block_size), "16, 32, 64, or a multiple of the activation_block");
  }
  if (columns % block_size != 0 || columns % 32 != 0) {
    fail(where + ", K", std::to_string(columns), "a multiple of 32 and of block_size");
  }
}

Weight PackedAttributes::weight(const Run& run) const {
  if (kept_) return weight_;
  return checked(run.input(first_input_), run.input(first_input_ + 1), run.input(first_input_ + 2));
}

const float* PackedAttributes::floats(const Run& run) const {
  return kept_ ? floats_ : checked(run.input(first_input_));
}

Weight PackedAttributes::checked(const Tensor& codes, const Tensor& scales, const Tensor& offsets) const {
  const std::string where(name_);
  Weight weight{};
  weight.bits = static_cast<int>(bits);
  weight.columns = columns;
  weight.block_size = block_size;
  weight.unit = block_size < activation_block ? block_size : activation_block;
  if (codes.type != kUint8) fail(where + ", B", "element type " + std::to_string(codes.type), "uint8");
  check_shape(where + ", B", codes, {tiles(), columns * bits / 32, 64});
  weight.codes = codes.as<uint8_t>();
  const Shape blocks{tiles(), columns / block_size, kTile};
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

const float* PackedAttributes::checked(const Tensor& given) const {
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
