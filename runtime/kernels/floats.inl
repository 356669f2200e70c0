// Products in float32. Included inside a namespace of its own; needs a `Vector`, and kFloatRows
// and kFloatTiles: how many rows and tiles fit the registers.

// out[t][r * stride + c] = starts[t][c] + sum over k of rows[r * columns + k] * tiles[t][16 * k + c], added up in the
// order of k; `starts` may be null.
// Meanwhile `fetched` lines of 64 bytes for each 8 columns are asked for, from `ahead` on.
template <int R, int T>
inline void float_block(const float* const* tiles, const float* const* starts, int64_t columns, const float* rows,
                        float* const* out, int64_t stride, const float* ahead, int64_t fetched) {
  Vector acc[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[r][t] = starts != nullptr ? load(starts[t]) : Vector{};
  }
  const float* from[T];
  for (int t = 0; t < T; ++t) from[t] = tiles[t];
  for (int64_t begin = 0; begin < columns; begin += 8) {
    for (int64_t line = 0; line < fetched; ++line, ahead += 16) __builtin_prefetch(ahead);
    const int64_t end = begin + 8 < columns ? begin + 8 : columns;
    for (int64_t k = begin; k < end; ++k) {
      Vector some[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) some[t] = load(from[t] + 16 * k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vector a = all_of(rows[r * columns + k]);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[r][t] = plus_product(acc[r][t], a, some[t]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) std::memcpy(out[t] + r * stride, &acc[r][t], sizeof(Vector));
  }
}

template <int T>
void float_rows(const float* const* tiles, const float* const* starts, int64_t columns, const float* rows,
                int64_t count, float* const* out, int64_t stride) {
  // What comes next lies behind these tiles. It is spread over the blocks of rows.
  const int64_t blocks = count / kFloatRows;
  const int64_t fetched = blocks > 0 ? (8 * T + blocks - 1) / blocks : 0;
  const float* ahead = tiles[T - 1] + 16 * columns;
  int64_t r = 0;
  const auto some = [&](auto number) {
    float* at[T];
    for (int t = 0; t < T; ++t) at[t] = out[t] + r * stride;
    float_block<number, T>(tiles, starts, columns, rows + r * columns, at, stride, ahead,
                           number == kFloatRows ? fetched : 0);
    ahead += (columns + 7) / 8 * fetched * 16;
    r += number;
  };
  while (r + kFloatRows <= count) some(std::integral_constant<int, kFloatRows>());
  if (kFloatRows > 4 && r + 4 <= count) some(std::integral_constant<int, 4>());
  if (kFloatRows > 2 && r + 2 <= count) some(std::integral_constant<int, 2>());
  while (r < count) some(std::integral_constant<int, 1>());
}

void products(const float* const* tiles, const float* const* starts, int number, int64_t columns, const float* rows,
              int64_t count, float* const* out, int64_t stride) {
  int t = 0;
  const auto from = [&](int tile) { return starts != nullptr ? starts + tile : nullptr; };
  if (count == 1) {
    // What is read from memory comes in several streams.
    for (; t + 4 <= number; t += 4) float_block<1, 4>(tiles + t, from(t), columns, rows, out + t, stride, nullptr, 0);
  }
  for (; t + kFloatTiles <= number; t += kFloatTiles) {
    float_rows<kFloatTiles>(tiles + t, from(t), columns, rows, count, out + t, stride);
  }
  for (; t < number; ++t) float_rows<1>(tiles + t, from(t), columns, rows, count, out + t, stride);
}
