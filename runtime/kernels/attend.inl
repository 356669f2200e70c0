// Attention over one piece of the keys; includes nothing, and is included inside a namespace of its own.
// Needs a `Vector`, `largest_of`, `sum_of` and `sums_of` (16 sums of 16 vectors) from who includes it.
#include "exponential.inl"

constexpr int64_t kAhead = 32;  // keys

// Scores of a row with 16 keys: 16 sums side by side, so that none waits for another. SIZE is the size of a
// head where it is known when this is compiled, or 0.
template <int64_t SIZE>
inline void scores_of_16(const float* query, const float* keys, int64_t size, float* out) {
  const int64_t stride = SIZE ? SIZE : size;
  // From zero: of two products in one sum a compiler may round either.
  Vector sums[16] = {};
  for (int64_t d = 0; d < stride; d += 16) {
    const Vector some = load(query + d);
    for (int j = 0; j < 16; ++j) sums[j] += some * load(keys + j * stride + d);
  }
  sums_of(sums, out);
}

// p[j] = e^(score - highest) for visible keys, 0 for others, in the place of the scores.
inline Partial weights_of(const QueryRow& row, int64_t begin, int64_t count, float softcap, float* scores) {
  const int64_t skipped = row.first - begin;
  const int64_t seen = row.end - begin < count ? row.end - begin : count;
  const int64_t from = skipped < 0 ? 0 : skipped < kPiece ? skipped : kPiece;
  const int64_t to = seen > 0 ? seen : 0;
  if (softcap > 0.0f) {
    for (int64_t j = 0; j < kPiece; j += 16) {
      // tanh(x) = 1 - 2 / (e^2x + 1)
      const Vector power = exponential(all_of(2.0f) * (load(scores + j) / all_of(softcap)));
      store(scores + j, all_of(softcap) * (all_of(1.0f) - all_of(2.0f) / (power + all_of(1.0f))));
    }
  }
  if (row.bias != nullptr) {
    for (int64_t j = from; j < to; ++j) scores[j] += row.bias[begin + j];
  }
  for (int64_t j = 0; j < from; ++j) scores[j] = -INFINITY;
  for (int64_t j = to; j < kPiece; ++j) scores[j] = -INFINITY;
  Vector largest = load(scores);
  for (int64_t j = 16; j < kPiece; j += 16) largest = larger(largest, load(scores + j));
  const float highest = largest_of(largest);
  if (!(highest > -INFINITY)) {
    // It sees none of them, or all are masked by an infinite bias; or what it sees are no numbers, which may not
    // be hidden.
    float none = 0.0f;
    for (int64_t j = from; j < to; ++j) none = scores[j] == scores[j] ? none : NAN;
    for (int64_t j = 0; j < kPiece; ++j) scores[j] = none;
    return {0.0f, none};
  }
  Vector sum = {};
  for (int64_t j = 0; j < kPiece; j += 16) {
    const Vector some = exponential(load(scores + j) - all_of(highest));
    store(scores + j, some);
    sum += some;
  }
  return {highest, sum_of(sum)};
}

// out[r] = sum over keys of p[r][j] * value[j], `WIDTH` vectors of 16 at a time.
template <int R, int WIDTH>
inline void weighted(const float* weights, const float* values, int64_t size, int64_t count, float* out) {
  Vector acc[R][WIDTH];
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < WIDTH; ++w) acc[r][w] = Vector{};
  }
  for (int64_t j = 0; j < count; ++j) {
    Vector value[WIDTH];
    for (int w = 0; w < WIDTH; ++w) value[w] = load(values + j * size + 16 * w);
    for (int r = 0; r < R; ++r) {
      const Vector p = all_of(weights[r * kPiece + j]);
      for (int w = 0; w < WIDTH; ++w) acc[r][w] = plus_product(acc[r][w], p, value[w]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < WIDTH; ++w) std::memcpy(out + r * size + 16 * w, &acc[r][w], sizeof(Vector));
  }
}

template <int R, int64_t SIZE, bool FETCH>
void some_rows(const QueryRow* rows, const float* keys, const float* values, int64_t size, int64_t begin,
               int64_t count, float softcap, Partial* partials, float* out) {
  alignas(64) float scores[R * kPiece];
  const int64_t whole = count / 16 * 16;
  for (int64_t j = 0; j < whole; j += 16) {
    const float* some = keys + (begin + j) * size;
    // Both come from memory: what is needed next is asked for while this is computed.
    if (FETCH) {
      const float* next = some + kAhead * size;
      const float* values_next = values + (begin + j) * size;
      for (int64_t d = 0; d < 16 * size; d += 16) {
        __builtin_prefetch(next + d);
        __builtin_prefetch(values_next + d);
      }
    }
    for (int r = 0; r < R; ++r) scores_of_16<SIZE>(rows[r].query, some, size, scores + r * kPiece + j);
  }
  // What is behind the last key is not read.
  for (int r = 0; r < R; ++r) {
    for (int64_t j = whole; j < count; ++j) {
      Vector sum = {};
      for (int64_t d = 0; d < size; d += 16) sum += load(rows[r].query + d) * load(keys + (begin + j) * size + d);
      Vector sums[16] = {};
      sums[0] = sum;
      alignas(64) float out_sums[16];
      sums_of(sums, out_sums);
      scores[r * kPiece + j] = out_sums[0];
    }
  }
  for (int r = 0; r < R; ++r) partials[r] = weights_of(rows[r], begin, count, softcap, scores + r * kPiece);
  int64_t d = 0;
  const float* from = values + begin * size;
  for (; d + 64 <= size; d += 64) weighted<R, 4>(scores, from + d, size, count, out + d);
  for (; d < size; d += 16) weighted<R, 1>(scores, from + d, size, count, out + d);
}

template <int64_t SIZE, bool FETCH>
void piece_of(const QueryRow* rows, int64_t count, const float* keys, const float* values, int64_t size,
              int64_t begin, int64_t present, float softcap, Partial* partials, float* out) {
  const auto some = [&](auto number, int64_t r) {
    some_rows<number, SIZE, FETCH>(rows + r, keys, values, size, begin, present, softcap, partials + r, out + r * size);
  };
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) some(std::integral_constant<int, 4>(), r);
  if (count - r == 3) some(std::integral_constant<int, 3>(), r);
  if (count - r == 2) some(std::integral_constant<int, 2>(), r);
  if (count - r == 1) some(std::integral_constant<int, 1>(), r);
}

template <bool FETCH>
void piece(const QueryRow* rows, int64_t count, const float* keys, const float* values, int64_t size,
           int64_t begin, int64_t end, float softcap, Partial* partials, float* out) {
  const int64_t present = end - begin < kPiece ? end - begin : kPiece;
  const auto function = size == 64    ? piece_of<64, FETCH>
                        : size == 96  ? piece_of<96, FETCH>
                        : size == 128 ? piece_of<128, FETCH>
                                      : piece_of<0, FETCH>;
  function(rows, count, keys, values, size, begin, present, softcap, partials, out);
}

void merge(Partial* into, float* into_values, const Partial& from, const float* from_values, int64_t size) {
  if (from.sum == 0.0f) return;
  if (into->sum == 0.0f) {
    *into = from;
    if (into_values != from_values) std::memcpy(into_values, from_values, size * sizeof(float));
    return;
  }
  const float highest = from.highest > into->highest ? from.highest : into->highest;
  const float keep = exponential(into->highest - highest);
  const float add = exponential(from.highest - highest);
  into->highest = highest;
  into->sum = std::fma(into->sum, keep, from.sum * add);
  for (int64_t d = 0; d < size; ++d) into_values[d] = std::fma(into_values[d], keep, from_values[d] * add);
}
