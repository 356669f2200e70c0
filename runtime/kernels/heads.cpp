#include "heads.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attend.h"
#include "tiles.h"

namespace onnxsmith {

namespace {

constexpr const char* kName = "MultiHeadAttention";
constexpr int64_t kRowsOfTask = 128;  // which share the tiles of a head
constexpr int64_t kMost = 1 << 20;    // heads: what is computed from their number stays far from overflow

// Where one of query, key and value begins, and how far its rows are apart.
struct Operand {
  const float* data;
  int64_t rows;  // of one text
  int64_t stride;
  const float* bias;
  const float* row(int64_t b, int64_t s, int64_t at) const { return data + (b * rows + s) * stride + at; }
  const float* bias_at(int64_t at) const { return bias == nullptr ? nullptr : bias + at; }
};

}  // namespace

MultiHeadAttention::MultiHeadAttention(const Node& node)
    : heads_(node.integer("num_heads")), scale_(node.number("scale", 0.0f)) {
  if (heads_ <= 0 || heads_ > kMost) {
    fail(kName, "num_heads", std::to_string(heads_), "at least 1, and at most 2^20");
  }
}

void MultiHeadAttention::compute(const Run& run) const {
  const Tensor q = run.input(0);
  const Tensor k = run.input(1);
  const Tensor v = run.input(2);
  const Tensor bias = run.input(3);
  const Tensor mask = run.input(4);
  if (q.shape.size() != 3) {
    fail(kName, "query", text(q.shape), "[batch, sequence, width]");
  }
  if (bool(k) != bool(v)) {
    fail(kName, "key and value", "one of them", "both or none");
  }
  const int64_t batch = q.shape[0];
  const int64_t rows = q.shape[1];
  const int64_t parts = k ? 1 : 3;
  if (q.shape[2] <= 0 || q.shape[2] % (parts * heads_) != 0) {
    fail(kName, "query", text(q.shape), "a width of " + std::to_string(parts * heads_) + " times the size of a head");
  }
  const int64_t width = q.shape[2] / parts;
  int64_t keys = rows;
  int64_t values_width = width;
  if (k) {
    if (k.shape.size() != 3 || k.shape[0] != batch || k.shape[2] != width) {
      fail(kName, "key", text(k.shape), "[" + std::to_string(batch) + ", keys, " + std::to_string(width) + "]");
    }
    keys = k.shape[1];
    if (v.shape.size() != 3 || v.shape[0] != batch || v.shape[1] != keys || v.shape[2] <= 0 ||
        v.shape[2] % heads_ != 0) {
      fail(kName, "value", text(v.shape),
           "[" + std::to_string(batch) + ", " + std::to_string(keys) + ", a multiple of " + std::to_string(heads_) +
               "]");
    }
    values_width = v.shape[2];
  }
  if (bias && bias.shape != Shape{2 * width + values_width}) {
    fail(kName, "bias", text(bias.shape), text({2 * width + values_width}));
  }
  if (mask) {
    const Shape& shape = mask.shape;
    if (shape.size() != 4 || (shape[0] != 1 && shape[0] != batch) || (shape[1] != 1 && shape[1] != heads_) ||
        (shape[2] != 1 && shape[2] != rows) || shape[3] != keys) {
      fail(kName, "attention_bias", text(shape),
           "[1 or batch, 1 or num_heads, 1 or sequence, keys] for a batch of " + std::to_string(batch) + ", " +
               std::to_string(heads_) + " heads, " + std::to_string(rows) + " rows and " + std::to_string(keys) +
               " keys");
    }
  }
  const Tensor y = run.output(0, {batch, rows, values_width}, kFloat);
  if (batch == 0 || rows == 0) return;
  if (keys == 0) {
    std::fill(y.as<float>(), y.as<float>() + y.size(), 0.0f);
    return;
  }

  const int64_t size = width / heads_;
  const int64_t value_size = values_width / heads_;
  const float* const added = bias ? bias.as<float>() : nullptr;
  const Operand query{q.as<float>(), rows, q.shape[2], added};
  const Operand key{k ? k.as<float>() : q.as<float>() + width, keys, k ? width : q.shape[2],
                    bias ? added + width : nullptr};
  const Operand value{v ? v.as<float>() : q.as<float>() + 2 * width, keys, v ? values_width : q.shape[2],
                      bias ? added + 2 * width : nullptr};
  const float scale = scale_ != 0.0f ? scale_ : 1.0f / std::sqrt(static_cast<float>(size));
  const int64_t tiles = tiles_of(keys);
  const int64_t value_tiles = tiles_of(value_size);
  const int64_t filled = tiles * kTile;
  const int64_t values_filled = value_tiles * kTile;
  const Attend& isa = attend();
  const int64_t blocks = (rows + kRowsOfTask - 1) / kRowsOfTask;

  run.parallel(batch * heads_ * blocks, [&](size_t task) {
    const int64_t block = task % blocks;
    const int64_t h = task / blocks % heads_;
    const int64_t b = task / blocks / heads_;
    struct OfHead;
    const int64_t of_tiles = filled * (size + values_filled);
    const int64_t of_rows = kRowsOfHeads * (size + filled + values_filled);
    float* key_tiles = reinterpret_cast<float*>(scratch<OfHead>(sizeof(float) * (of_tiles + of_rows)));
    float* values = key_tiles + filled * size;
    float* scores = values + filled * values_filled;
    float* out = scores + kRowsOfHeads * filled;
    float* scaled = out + kRowsOfHeads * values_filled;
    for (int64_t t = 0; t < tiles; ++t) {
      isa.transpose(key.row(b, kTile * t, h * size), key.stride, std::min(kTile, keys - kTile * t), size,
                    key.bias_at(h * size), key_tiles + t * kTile * size);
    }
    for (int64_t t = 0; t < value_tiles; ++t) {
      const int64_t at = h * value_size + kTile * t;
      const int64_t present = std::min(kTile, value_size - kTile * t);
      float* const tile = values + t * kTile * filled;
      // What has no value is multiplied all the same.
      std::fill(present == kTile ? tile + kTile * keys : tile, tile + kTile * filled, 0.0f);
      isa.shift(value.row(b, 0, at), value.stride, keys, present, value.bias_at(at), 1.0f, tile, kTile);
    }
    const Heads head{key_tiles, values, keys, size, value_tiles};
    const int64_t end = std::min(rows, (block + 1) * kRowsOfTask);
    for (int64_t first = block * kRowsOfTask; first < end; first += kRowsOfHeads) {
      const int64_t count = std::min(kRowsOfHeads, end - first);
      const float* biases[kRowsOfHeads];
      isa.shift(query.row(b, first, h * size), query.stride, count, size, query.bias_at(h * size), scale, scaled, size);
      for (int64_t r = 0; mask && r < count; ++r) {
        const Shape& shape = mask.shape;
        const int64_t at = ((shape[0] == 1 ? 0 : b) * shape[1] + (shape[1] == 1 ? 0 : h)) * shape[2];
        biases[r] = mask.as<float>() + (at + (shape[2] == 1 ? 0 : first + r)) * keys;
      }
      isa.heads(head, scaled, count, mask ? biases : nullptr, scores, out);
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(y.as<float>() + (b * rows + first + r) * values_width + h * value_size, out + r * values_filled,
                    sizeof(float) * value_size);
      }
    }
  });
}

}  // namespace onnxsmith
