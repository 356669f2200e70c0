#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "attend.h"

namespace onnxsmith {

namespace {

// Enough pieces that threads which start late do not hold up the others, and few enough to cost nothing.
constexpr int64_t kPieces = 32;
constexpr int64_t kLeastBytes = 16 << 10;  // of codes, for one piece
constexpr int64_t kRowsAtOnce = 64;
constexpr int64_t kFloatTiles = 4;   // of a weight in float32

Gate gate_of(const std::string& word) {
  if (word == "none") return Gate::kNone;
  if (word == "silu") return Gate::kSilu;
  if (word == "gelu") return Gate::kGelu;
  if (word == "gelu_tanh") return Gate::kGeluTanh;
  fail("MatMulPacked, activation", "'" + word + "'", "none, silu, gelu or gelu_tanh");
}

// Whether a shape without its leading ones is the end of another.
bool repeats(const Shape& shape, const Shape& whole) {
  const auto begin = std::find_if(shape.begin(), shape.end(), [](int64_t extent) { return extent != 1; });
  return shape.size() <= whole.size() && std::equal(begin, shape.end(), whole.end() - (shape.end() - begin));
}

// One row of a tile, all of it or its first `present` numbers. What is whole has a size that compilers know.
inline void write_row(const float* from, int64_t present, float* to) {
  if (present == kTile) {
    std::memcpy(to, from, kTile * sizeof(float));
  } else {
    for (int64_t c = 0; c < present; ++c) to[c] = from[c];
  }
}

inline void add_row(const float* more, int64_t present, float* to) {
  for (int64_t c = 0; c < present; ++c) to[c] += more[c];
}

struct Rounded;

// Memory for `rows` rounded rows, of this thread until its next product.
Activations rounded_rows(int64_t rows, int64_t columns, int64_t unit) {
  const int64_t units = rows * (columns / unit);
  char* memory = scratch<Rounded>(rows * columns + 12 * units);
  Activations out;
  out.codes = reinterpret_cast<int8_t*>(memory);
  out.scales = reinterpret_cast<float*>(memory + rows * columns);
  out.sums = reinterpret_cast<int32_t*>(out.scales + units);
  out.scaled_sums = reinterpret_cast<float*>(out.sums + units);
  return out;
}

Activations row_of(const Activations& rows, int64_t row, int64_t columns, int64_t unit) {
  return {rows.codes + row * columns, rows.scales + row * (columns / unit),
          rows.sums + row * (columns / unit), rows.scaled_sums + row * (columns / unit)};
}

}  // namespace

// Where a product and what belongs to it are.
struct MatMulPacked::Place {
  int64_t tile;  // of [tile, tile + number)
  int64_t number;
  int64_t first;  // of rows [first, first + count)
  int64_t count;
};

struct MatMulPacked::Results {
  const Tensor& y;
  const Tensor& residual;
  const Tensor& bias;
  int64_t width;

  float* at(const Tensor& tensor, const Place& place) const {
    return tensor.as<float>() + place.first * width + place.tile * kTile;
  }
  // Where each tile's product is to be written: what is not multiplied with something else belongs to the result
  // itself, which the answer tells; all else goes into memory of its own.
  template <size_t COUNT>
  bool place(const Place& place, bool plain, float (&memory)[COUNT][kRowsAtOnce * kTile], float* (&to)[COUNT]) const {
    float* const result = at(y, place);
    const bool straight = plain && (place.tile + place.number) * kTile <= width;
    for (size_t t = 0; t < COUNT; ++t) to[t] = straight ? result + t * kTile : memory[t];
    // Where results go is asked for while they are computed, and what is added to them.
    const float* const more = residual ? at(residual, place) : nullptr;
    for (int64_t r = 0; r < place.count; ++r) {
      for (int64_t t = 0; t < place.number; ++t) {
        __builtin_prefetch(result + r * width + t * kTile, 1);
        if (more != nullptr) __builtin_prefetch(more + r * width + t * kTile);
      }
    }
    return straight;
  }
};

MatMulPacked::MatMulPacked(const Node& node, const char* name, size_t first_input, size_t residual)
    : name_(name), packed_(node, name, first_input), bias_(first_input + 3), residual_(residual),
      gate_(gate_of(node.word("activation", "none"))), gated_(node.integer("gated", 1) != 0) {
  if (halves() && packed_.rows % (2 * kTile) != 0) {
    fail(std::string(name) + ", N with an activation that is gated", std::to_string(packed_.rows),
         "a multiple of 32");
  }
}

template <typename Prepare>
void MatMulPacked::multiply(const Run& run, const Tensor& a, const Prepare& prepare) const {
  const Weight weight = packed_.weight(run);
  const Tensor bias = checked_bias(run);
  const bool gated = halves();
  const int64_t columns = packed_.columns;
  const int64_t rows = a.size() / columns;
  const int64_t width = this->width();
  Shape shape = a.shape;
  shape.back() = width;
  const Tensor residual = checked_residual(run, shape);
  const Tensor y = run.output(0, shape, kFloat);
  if (rows == 0) return;

  const Tiles& isa = tiles();
  const int64_t unit = weight.unit;
  const Activations rounded = rounded_rows(rows, columns, unit);
  run.for_rows(rows, [&](int64_t r) {
    struct Row;
    float* memory = reinterpret_cast<float*>(scratch<Row>(sizeof(float) * columns));
    isa.round(prepare(r, memory), columns, unit, row_of(rounded, r, columns, unit));
  });

  const int64_t outputs = tiles_of(width);
  // Tiles of a step: a gate and its values, or of several rows two that lie side by side.
  const int64_t together = !gated && rows > 1 ? 2 : 1;
  const int64_t steps = (outputs + together - 1) / together;
  const int64_t bytes = weight.code_bytes() * (gated ? 2 : together);
  const int64_t work = bytes * std::min<int64_t>(rows, 8);
  const int64_t pieces = std::max<int64_t>(1, std::min(std::min(kPieces, steps), steps * work / kLeastBytes));
  const Results results{y, residual, bias, width};
  run.parallel(pieces, [&](size_t piece) {
    alignas(64) float sums[2][kRowsAtOnce * kTile];
    for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, rows - first);
      const Activations some = row_of(rounded, first, columns, unit);
      for (int64_t s = steps * piece / pieces; s < steps * int64_t(piece + 1) / pieces; ++s) {
        const Place place{s * together, std::min(together, outputs - s * together), first, count};
        float* to[2];
        const bool straight = results.place(place, gate_ == Gate::kNone, sums, to);
        const int64_t stride = straight ? width : kTile;
        if (gated || place.number == 2) {
          // With a gate N / 2 is a multiple of the tile's rows.
          isa.products(weight, place.tile, gated ? place.tile + outputs : place.tile + 1, some, count, to[0], to[1],
                       stride);
        } else {
          isa.product(weight, place.tile, some, count, to[0], stride);
        }
        finish(results, place, to, straight, true);
      }
    }
  });
}

void MatMulPacked::multiply_floats(const Run& run, const Shape& shape_of_rows, const float* rows) const {
  const float* tiles_of_weight = packed_.floats(run);
  const Tensor bias = checked_bias(run);
  const int64_t columns = packed_.columns;
  const int64_t width = this->width();
  Shape shape = shape_of_rows;
  shape.back() = width;
  const Tensor residual = checked_residual(run, shape);
  const Tensor y = run.output(0, shape, kFloat);
  const int64_t count_of_rows = y.size() / width;
  if (count_of_rows == 0) return;

  const Attend& floats = attend();
  float last_of_bias[kTile] = {};
  if (bias) {
    const int64_t begin = packed_.rows / kTile * kTile;
    std::copy(bias.as<float>() + begin, bias.as<float>() + packed_.rows, last_of_bias);
  }
  const int64_t outputs = tiles_of(width);
  // Tiles of a step: for one row as many as there are streams from memory, for several what fits the nearest cache.
  const int64_t together = count_of_rows == 1 ? kFloatTiles : kFloatTiles / 2;
  const int64_t steps = (outputs + together - 1) / together;
  const int64_t row_blocks = (count_of_rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t work = together * kTile * columns * sizeof(float) * std::min<int64_t>(count_of_rows, 8);
  // Rows are shared out first: what a thread does next is then behind the tiles that it has, and was asked for.
  const int64_t groups = std::min(row_blocks, kPieces);
  const int64_t most = std::max<int64_t>(1, kPieces / groups);
  const int64_t pieces = std::max<int64_t>(1, std::min(std::min(most, steps), steps * work / kLeastBytes));
  const Results results{y, residual, bias, width};
  run.parallel(pieces * groups, [&](size_t task) {
    const int64_t piece = task % pieces;
    const int64_t group = task / pieces;
    alignas(64) float sums[2 * kFloatTiles][kRowsAtOnce * kTile];
    for (int64_t block = row_blocks * group / groups; block < row_blocks * (group + 1) / groups; ++block) {
      const int64_t first = block * kRowsAtOnce;
      const int64_t count = std::min(kRowsAtOnce, count_of_rows - first);
      for (int64_t s = steps * piece / pieces; s < steps * (piece + 1) / pieces; ++s) {
        const Place place{s * together, std::min(together, outputs - s * together), first, count};
        const int64_t all = halves() ? 2 * place.number : place.number;
        const float* from[2 * kFloatTiles];
        const float* starts[2 * kFloatTiles];
        float* to[2 * kFloatTiles];
        const bool straight = results.place(place, !halves(), sums, to);
        for (int64_t t = 0; t < all; ++t) {
          const int64_t which = place.tile + t % place.number + t / place.number * outputs;
          from[t] = tiles_of_weight + which * columns * kTile;
          if (bias) {
            // Only the last of all tiles may have fewer rows.
            const bool whole = (which + 1) * kTile <= packed_.rows;
            starts[t] = whole ? bias.as<float>() + which * kTile : last_of_bias;
          }
        }
        floats.products(from, bias ? starts : nullptr, static_cast<int>(all), columns, rows + first * columns, count,
                        to, straight ? width : kTile);
        finish(results, place, to, straight, false);
      }
    }
  });
}

void MatMulPacked::finish(const Results& results, const Place& place, float* const* to, bool straight,
                          bool add_bias) const {
  const Tiles& isa = tiles();
  const int64_t width = results.width;
  const float* const bias = add_bias && results.bias ? results.bias.as<float>() : nullptr;
  const float* const residual = results.residual ? results.at(results.residual, place) : nullptr;
  if (straight) {
    const int64_t columns = place.number * kTile;
    for (int64_t r = 0; r < place.count; ++r) {
      float* const row = to[0] + r * width;
      if (bias != nullptr) add_row(bias + place.tile * kTile, columns, row);
      if (gate_ != Gate::kNone) isa.gate(gate_, row, nullptr, columns);
      if (residual != nullptr) add_row(residual + r * width, columns, row);
    }
    return;
  }
  const auto with_bias = [&](float* sums, int64_t tile) {
    const int64_t present = std::min(kTile, packed_.rows - tile * kTile);
    for (int64_t r = 0; bias != nullptr && r < place.count; ++r) {
      add_row(bias + tile * kTile, present, sums + r * kTile);
    }
  };
  float* const result = results.at(results.y, place);
  for (int64_t t = 0; t < place.number; ++t) {
    with_bias(to[t], place.tile + t);
    if (halves()) with_bias(to[t + place.number], place.tile + t + width / kTile);
    if (gate_ != Gate::kNone) isa.gate(gate_, to[t], halves() ? to[t + place.number] : nullptr, place.count * kTile);
    const int64_t present = std::min(kTile, width - (place.tile + t) * kTile);
    for (int64_t r = 0; r < place.count; ++r) {
      if (residual != nullptr) add_row(residual + r * width + t * kTile, present, to[t] + r * kTile);
      write_row(to[t] + r * kTile, present, result + r * width + t * kTile);
    }
  }
}

Tensor MatMulPacked::checked_bias(const Run& run) const {
  const Tensor bias = run.input(bias_);
  if (bias && bias.shape != Shape{packed_.rows}) {
    fail(std::string(name_) + ", bias", text(bias.shape), text({packed_.rows}));
  }
  return bias;
}

Tensor MatMulPacked::checked_residual(const Run& run, const Shape& shape) const {
  const Tensor residual = residual_ != 0 ? run.input(residual_) : Tensor{};
  if (residual && residual.shape != shape) {
    fail(std::string(name_) + ", residual", text(residual.shape), text(shape) + ", as the result");
  }
  return residual;
}

void MatMulPacked::compute(const Run& run) const {
  const Tensor a = run.input(0);
  packed_.check_rows(a, "A");
  if (packed_.is_float()) {
    multiply_floats(run, a.shape, a.as<float>());
    return;
  }
  multiply(run, a, [&](int64_t r, float*) { return a.as<float>() + r * packed_.columns; });
}

NormMatMulPacked::NormMatMulPacked(const Node& node)
    : MatMulPacked(node, "NormMatMulPacked", 3, 0), epsilon_(node.number("epsilon", 1e-5f)) {
  if (packed_.columns % kTile != 0) {
    fail(std::string(name_) + ", K", std::to_string(packed_.columns), "a multiple of 16");
  }
}

void NormMatMulPacked::compute(const Run& run) const {
  const Tensor a = run.input(0);
  const Tensor skip = run.input(1);
  const Tensor norm = run.input(2);
  const int64_t columns = packed_.columns;
  packed_.check_rows(a, "A");
  if (norm.size() != columns) fail(std::string(name_) + ", norm", text(norm.shape), text({columns}));
  if (skip && !repeats(skip.shape, a.shape)) {
    fail(std::string(name_) + ", skip", text(skip.shape), text(a.shape) + ", or its last axes");
  }
  const int64_t skip_rows = skip ? std::max<int64_t>(1, skip.size() / columns) : 1;
  const Tensor sum = run.output(1, a.shape, kFloat);
  if (!skip && a.size() != 0) std::copy(a.as<float>(), a.as<float>() + a.size(), sum.as<float>());
  const Tiles& isa = tiles();
  const auto normalize = [&](int64_t r, float* memory) {
    isa.normalize(a.as<float>() + r * columns, skip ? skip.as<float>() + r % skip_rows * columns : nullptr,
                  norm.as<float>(), epsilon_, columns, sum.as<float>() + r * columns, memory);
    return memory;
  };
  if (!packed_.is_float()) {
    multiply(run, a, normalize);
    return;
  }
  struct Normed;
  float* normed = reinterpret_cast<float*>(scratch<Normed>(sizeof(float) * a.size()));
  run.for_rows(a.size() / columns, [&](int64_t r) { normalize(r, normed + r * columns); });
  multiply_floats(run, a.shape, normed);
}

}  // namespace onnxsmith
