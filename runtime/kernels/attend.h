// What is computed in float32, compiled once for each instruction set: attention of some query rows over a piece of
// the keys, and products.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace onnxsmith {

// Keys are taken in pieces that begin at multiples of this, so that a row's result does not depend on how
// many rows or keys are computed with it.
constexpr int64_t kPiece = 128;

// One query row and what it sees: keys [first, end) of its own sequence.
struct QueryRow {
  const float* query;  // [size], already scaled
  const float* bias;   // [keys] or null
  int64_t first;
  int64_t end;
};

// A softmax that is not finished: sum of e^(score - highest), and the values weighted by that.
struct Partial {
  float highest;
  float sum;
};

// One head's keys and values in tiles of 16: keys [size, 16], turned, and values [keys, 16], the keys filled up to a
// multiple of 16.
struct Heads {
  const float* key_tiles;
  const float* value_tiles;
  int64_t keys;
  int64_t size;
  int64_t value_tiles_number;
};

constexpr int64_t kRowsOfHeads = 32;  // at most, of one call

struct Attend {
  const char* name;
  // Rows over keys [begin, begin + kPiece), cut at `end`. keys and values are [*, size] from key 0.
  // partials[r], values_out[r * size ...]; a row that sees none of them gets sum 0.
  void (*piece)(const QueryRow* rows, int64_t count, const float* keys, const float* values, int64_t size,
                int64_t begin, int64_t end, float softcap, Partial* partials, float* values_out);
  // The same for keys and values that no cache has: they are asked for ahead.
  void (*far_piece)(const QueryRow* rows, int64_t count, const float* keys, const float* values, int64_t size,
                    int64_t begin, int64_t end, float softcap, Partial* partials, float* values_out);
  // into += from, both unfinished.
  void (*merge)(Partial* into, float* into_values, const Partial& from, const float* from_values, int64_t size);
  // Rows [count, columns] with each of `number` tiles [columns, 16]: out[t][r * stride + c], which begins with
  // starts[t][c] where `starts` is not null.
  void (*products)(const float* const* tiles, const float* const* starts, int number, int64_t columns,
                   const float* rows, int64_t count, float* const* out, int64_t stride);
  // Softmax(rows times keys + bias) times values: rows [count, size], already scaled; biases[r] [keys], or null for
  // none; scores [count, keys] is memory, filled up to a multiple of 16; out [count, 16 * value_tiles_number].
  void (*heads)(const Heads& head, const float* rows, int64_t count, const float* const* biases, float* scores,
                float* out);
  // to[r * to_stride + c] = (rows[r * stride + c] + bias[c]) * factor for `width` numbers; `bias` may be null.
  void (*shift)(const float* rows, int64_t stride, int64_t count, int64_t width, const float* bias, float factor,
                float* to, int64_t to_stride);
  // tile[d * 16 + j] = rows[j * stride + d] + bias[d] for `count` rows, 0 for others; `bias` may be null.
  void (*transpose)(const float* rows, int64_t stride, int64_t count, int64_t size, const float* bias, float* tile);
};

const Attend& generic_attend();
#if defined(__x86_64__)
const Attend& avx2_attend();
const Attend& avx512_attend();
#endif

// The one that goes with `tiles()`.
const Attend& attend();

}  // namespace onnxsmith
