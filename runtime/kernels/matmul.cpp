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
constexpr int64_t kRowsOfTask = 16;  // that one thread rounds
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
  if (present == kTile) {
    for (int64_t c = 0; c < kTile; ++c) to[c] += more[c];
  } else {
    for (int64_t c = 0; c < present; ++c) to[c] += more[c];
  }
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

MatMulPacked::MatMulPacked(const Node& node, const char* name, size_t first_input, size_t residual)
    : name_(name), packed_(node, name, first_input), bias_(first_input + 3), residual_(residual), gate_(gate_of(node.word("activation", "none"))),
      gated_(node.integer("gated", 1) != 0) {
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
  run.parallel((rows + kRowsOfTask - 1) / kRowsOfTask, [&](size_t task) {
    struct Row;
    float* memory = reinterpret_cast<float*>(scratch<Row>(sizeof(float) * columns));
    const int64_t end = std::min<int64_t>(rows, (task + 1) * kRowsOfTask);
    for (int64_t r = task * kRowsOfTask; r < end; ++r) {
      isa.round(prepare(r, memory), columns, unit, row_of(rounded, r, columns, unit));
    }
  });

  const int64_t outputs = (width + kTile - 1) / kTile;
  // Tiles of a step: a gate and its values, or of several rows two that lie side by side.
  const int64_t together = !gated && rows > 1 ? 2 : 1;
  const int64_t steps = (outputs + together - 1) / together;
  const int64_t bytes = weight.code_bytes() * (gated ? 2 : together);
  const int64_t work = bytes * std::min<int64_t>(rows, 8);
  const int64_t pieces = std::max<int64_t>(1, std::min(std::min(kPieces, steps), steps * work / kLeastBytes));
  run.parallel(pieces, [&](size_t piece) {
    alignas(64) float out[kRowsAtOnce * kTile];
    alignas(64) float other[kRowsAtOnce * kTile];
    for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, rows - first);
      const Activations some = row_of(rounded, first, columns, unit);
      const auto add_bias = [&](float* sums, int64_t tile) {
        if (!bias) return;
        const float* add = bias.as<float>() + tile * kTile;
        const int64_t present = std::min(kTile, packed_.rows - tile * kTile);
        for (int64_t r = 0; r < count; ++r) add_row(add, present, sums + r * kTile);
      };
      const auto write = [&](float* sums, int64_t tile) {
        if (gate_ != Gate::kNone && !gated) isa.gate(gate_, sums, nullptr, count * kTile);
        const int64_t present = std::min(kTile, width - tile * kTile);
        float* const result = y.as<float>() + first * width + tile * kTile;
        if (residual) {
          const float* more = residual.as<float>() + first * width + tile * kTile;
          for (int64_t r = 0; r < count; ++r) add_row(more + r * width, present, sums + r * kTile);
        }
        for (int64_t r = 0; r < count; ++r) write_row(sums + r * kTile, present, result + r * width);
      };
      for (int64_t s = steps * piece / pieces; s < steps * int64_t(piece + 1) / pieces; ++s) {
        const int64_t tile = s * together;
        if (gated) {
          // N / 2 is a multiple of the tile's rows.
          isa.products(weight, tile, tile + outputs, some, count, out, other, kTile);
          add_bias(out, tile);
          add_bias(other, tile + outputs);
          isa.gate(gate_, out, other, count * kTile);
          write(out, tile);
        } else if (together == 2 && tile + 1 < outputs) {
          isa.products(weight, tile, tile + 1, some, count, out, other, kTile);
          add_bias(out, tile);
          add_bias(other, tile + 1);
          write(out, tile);
          write(other, tile + 1);
        } else {
          isa.product(weight, tile, some, count, out, kTile);
          add_bias(out, tile);
          write(out, tile);
        }
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

  const Tiles& isa = tiles();
  const Attend& floats = attend();
  float last_of_bias[kTile] = {};
  if (bias) {
    const int64_t begin = packed_.rows / kTile * kTile;
    std::copy(bias.as<float>() + begin, bias.as<float>() + packed_.rows, last_of_bias);
  }
  const int64_t outputs = (width + kTile - 1) / kTile;
  // Tiles of a step: for one row as many as there are streams from memory, for several what fits the nearest cache.
  const int64_t together = count_of_rows == 1 ? kFloatTiles : kFloatTiles / 2;
  const int64_t steps = (outputs + together - 1) / together;
  const int64_t row_blocks = (count_of_rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t work = together * kTile * columns * sizeof(float) * std::min<int64_t>(count_of_rows, 8);
  // Rows are shared out first: what a thread does next is then behind the tiles that it has, and was asked for.
  const int64_t groups = std::min(row_blocks, kPieces);
  const int64_t most = std::max<int64_t>(1, kPieces / groups);
  const int64_t pieces = std::max<int64_t>(1, std::min(std::min(most, steps), steps * work / kLeastBytes));
  run.parallel(pieces * groups, [&](size_t task) {
    const int64_t piece = task % pieces;
    const int64_t group = task / pieces;
    alignas(64) float sums[2 * kFloatTiles][kRowsAtOnce * kTile];
    for (int64_t block = row_blocks * group / groups; block < row_blocks * (group + 1) / groups; ++block) {
      const int64_t first = block * kRowsAtOnce;
      const int64_t count = std::min(kRowsAtOnce, count_of_rows - first);
      for (int64_t s = steps * piece / pieces; s < steps * (piece + 1) / pieces; ++s) {
        const int64_t tile = s * together;
        const int64_t number = std::min(together, outputs - tile);
        float* const result = y.as<float>() + first * width + tile * kTile;
        const float* const more = residual ? residual.as<float>() + first * width + tile * kTile : nullptr;
        const int64_t all = halves() ? 2 * number : number;
        // What is not multiplied with something else is written where it belongs.
        const bool straight = !halves() && (tile + number) * kTile <= width;
        const int64_t stride = straight ? width : kTile;
        const float* from[2 * kFloatTiles];
        const float* starts[2 * kFloatTiles];
        float* to[2 * kFloatTiles];
        for (int64_t t = 0; t < all; ++t) {
          const int64_t which = tile + t % number + t / number * outputs;
          from[t] = tiles_of_weight + which * columns * kTile;
          to[t] = straight ? result + t * kTile : sums[t];
          if (bias) {
            // Only the last of all tiles may have fewer rows.
            const bool whole = (which + 1) * kTile <= packed_.rows;
            starts[t] = whole ? bias.as<float>() + which * kTile : last_of_bias;
          }
        }
        // Where results go is asked for while they are computed, and what is added to them.
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t t = 0; t < number; ++t) {
            __builtin_prefetch(result + r * width + t * kTile, 1);
            if (more != nullptr) __builtin_prefetch(more + r * width + t * kTile);
          }
        }
        floats.products(from, bias ? starts : nullptr, static_cast<int>(all), columns, rows + first * columns, count, to,
                        stride);
        if (straight && gate_ != Gate::kNone) {
          for (int64_t r = 0; r < count; ++r) isa.gate(gate_, result + r * width, nullptr, number * kTile);
        }
        for (int64_t r = 0; straight && more != nullptr && r < count; ++r) {
          for (int64_t t = 0; t < number; ++t) {
            add_row(more + r * width + t * kTile, kTile, result + r * width + t * kTile);
          }
        }
        for (int64_t t = 0; t < number && !straight; ++t) {
          if (gate_ != Gate::kNone) isa.gate(gate_, to[t], halves() ? to[t + number] : nullptr, count * kTile);
          const int64_t present = std::min(kTile, width - (tile + t) * kTile);
          for (int64_t r = 0; r < count; ++r) {
            if (more != nullptr) add_row(more + r * width + t * kTile, present, to[t] + r * kTile);
            write_row(to[t] + r * kTile, present, result + r * width + t * kTile);
          }
        }
      }
    }
  });
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
  const int64_t rows = a.size() / columns;
  run.parallel((rows + kRowsOfTask - 1) / kRowsOfTask, [&](size_t task) {
    const int64_t end = std::min<int64_t>(rows, (task + 1) * kRowsOfTask);
    for (int64_t r = task * kRowsOfTask; r < end; ++r) normalize(r, normed + r * columns);
  });
  multiply_floats(run, a.shape, normed);
}

}  // namespace onnxsmith
