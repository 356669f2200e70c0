// The arithmetic that is compiled once for each instruction set.
//
// All of them give bitwise the same: integer sums are exact, and the float operations of one result are the
// same in the same order, whatever the number of rows that are computed together.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace onnxsmith {

constexpr int64_t kTile = 16;  // rows of a weight that lie interleaved

// How many tiles so many rows, or columns of a result, fill, the last one perhaps in part.
constexpr int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

enum class Offsets { kMiddle, kZeroPoints, kMinimums };

// A packed weight, see docs/kernels.md for its layout.
struct Weight {
  const uint8_t* codes;
  const void* scales;
  const void* offsets;
  bool half_scales;
  bool half_offsets;
  Offsets kind;
  int bits;
  int64_t columns;     // K
  int64_t block_size;  // of its scales, along K
  int64_t unit;        // 16, 32, 64 or 128: what has one scale, of the weight and of the activations

  int64_t code_bytes() const { return columns * kTile * bits / 8; }  // of one tile
  int64_t blocks() const { return columns / block_size; }
  // A unit is multiplied in steps of 16 or 32.
  int64_t step() const { return unit < 32 ? unit : 32; }
};

// Rounded rows of activations: codes [rows, K]; of each unit its scale, the sum of its codes, and that sum
// times the scale, [rows, K / unit] each.
struct Activations {
  int8_t* codes;
  float* scales;
  int32_t* sums;
  float* scaled_sums;
};

enum class Gate { kNone, kSilu, kGelu, kGeluTanh };

struct Tiles {
  const char* name;
  bool (*supported)();
  // Rounds one row of `columns` numbers to int8 in blocks of `unit`: scale = max|a| / 127.
  void (*round)(const float* row, int64_t columns, int64_t unit, Activations out);
  // sum = row (+ skip); out = sum / sqrt(mean(sum^2) + epsilon) * weight. `skip` may be null, and then sum is
  // not written.
  void (*normalize)(const float* row, const float* skip, const float* weight, float epsilon, int64_t columns,
                    float* sum, float* out);
  // out[r * stride + c] = the products of `rows` rows with the 16 rows of the tile at `tile`.
  void (*product)(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
                  int64_t stride);
  // The same for two tiles, each with an `out` of its own.
  void (*products)(const Weight& weight, int64_t one, int64_t other, const Activations& rows, int64_t count,
                   float* out, float* other_out, int64_t stride);
  // gate[i] = function(gate[i]) * up[i], or function(gate[i]) where `up` is null; `count` is a multiple of 16.
  void (*gate)(Gate function, float* gate, const float* up, int64_t count);
};

// `Tiles::products` of an instruction set that gains nothing by two tiles at once.
template <void (*product)(const Weight&, int64_t, const Activations&, int64_t, float*, int64_t)>
void one_by_one(const Weight& weight, int64_t one, int64_t other, const Activations& rows, int64_t count, float* out,
                float* other_out, int64_t stride) {
  product(weight, one, rows, count, out, stride);
  product(weight, other, rows, count, other_out, stride);
}

const Tiles& generic_tiles();
#if defined(__aarch64__)
const Tiles& dotprod_tiles();
#endif
#if defined(__x86_64__)
const Tiles& avx2_tiles();
const Tiles* avxvnni_tiles();  // null where the compiler has not heard of it
const Tiles& avx512vnni_tiles();
#endif

// The fastest that this processor has, or what ONNXSMITH_KERNELS_ISA names.
const Tiles& tiles();

}  // namespace onnxsmith
