// Attention of whole heads, for rows that all see the same keys. Included inside a namespace of its own; needs
// `products` of floats.inl, what attend.inl needs, and `turn`: sixteen rows of sixteen become columns.

void heads(const Heads& head, const float* rows, int64_t count, const float* const* biases, float* scores, float* out) {
  constexpr int kMost = 8;
  const auto all = [&](const float* tiles, int64_t number, int64_t columns, const float* operand, float* to) {
    for (int64_t first = 0; first < number; first += kMost) {
      const int some = static_cast<int>(number - first < kMost ? number - first : kMost);
      const float* from[kMost];
      float* results[kMost];
      for (int t = 0; t < some; ++t) {
        from[t] = tiles + (first + t) * columns * 16;
        results[t] = to + (first + t) * 16;
      }
      products(from, nullptr, some, columns, operand, count, results, number * 16);
    }
  };
  const int64_t width = tiles_of(head.keys) * kTile;
  all(head.key_tiles, width / kTile, head.size, rows, scores);
  // One thing for all rows after the other: what one row waits for, another does not.
  float highest[kRowsOfHeads];
  for (int64_t r = 0; r < count; ++r) {
    float* row = scores + r * width;
    for (int64_t j = head.keys; j < width; ++j) row[j] = -INFINITY;
    int64_t j = 0;
    Vector largest = all_of(-INFINITY);
    if (biases != nullptr) {
      for (; j + 16 <= head.keys; j += 16) {
        Vector some = load(row + j);
        some += load(biases[r] + j);
        store(row + j, some);
        largest = larger(largest, some);
      }
      for (int64_t i = j; i < head.keys; ++i) row[i] += biases[r][i];
    }
    for (; j < width; j += 16) largest = larger(largest, load(row + j));
    highest[r] = largest_of(largest);
    // A row of which no key is seen gets zeros: e^(-inf - 0).
    if (highest[r] == -INFINITY) highest[r] = 0.0f;
  }
  float sums[kRowsOfHeads];
  for (int64_t r = 0; r < count; ++r) {
    float* row = scores + r * width;
    const Vector top = all_of(highest[r]);
    Vector sum = {};
    for (int64_t j = 0; j < width; j += 16) {
      const Vector some = power_of_two((load(row + j) - top) * all_of(1.44269504088896341f));
      store(row + j, some);
      sum += some;
    }
    sums[r] = sum_of(sum);
  }
  all(head.value_tiles, head.value_tiles_number, width, scores, out);
  for (int64_t r = 0; r < count; ++r) {
    const float factor = sums[r] == 0.0f ? 0.0f : 1.0f / sums[r];
    for (int64_t t = 0; t < head.value_tiles_number; ++t) {
      float* some = out + (r * head.value_tiles_number + t) * 16;
      store(some, all_of(factor) * load(some));
    }
  }
}

// to[r * to_stride + c] = (rows[r * stride + c] + bias[c]) * factor for `width` numbers of a row; `bias` may be null.
void shift(const float* rows, int64_t stride, int64_t count, int64_t width, const float* bias, float factor, float* to,
           int64_t to_stride) {
  for (int64_t r = 0; r < count; ++r, rows += stride, to += to_stride) {
    int64_t c = 0;
    for (; c + 16 <= width; c += 16) {
      Vector some = load(rows + c);
      if (bias != nullptr) some += load(bias + c);
      store(to + c, all_of(factor) * some);
    }
    for (; c < width; ++c) to[c] = (rows[c] + (bias != nullptr ? bias[c] : 0.0f)) * factor;
  }
}

// tile[d * 16 + j] = rows[j * stride + d] + bias[d] for `count` rows, 0 for others; `bias` may be null.
void transpose(const float* rows, int64_t stride, int64_t count, int64_t size, const float* bias, float* tile) {
  int64_t d = 0;
  for (; count == 16 && d + 16 <= size; d += 16) {
    Vector some[16];
    for (int j = 0; j < 16; ++j) some[j] = load(rows + j * stride + d);
    turn(some);
    for (int i = 0; i < 16; ++i) {
      if (bias != nullptr) some[i] += all_of(bias[d + i]);
      store(tile + (d + i) * 16, some[i]);
    }
  }
  for (; d < size; ++d) {
    const float add = bias != nullptr ? bias[d] : 0.0f;
    for (int64_t j = 0; j < count; ++j) tile[d * 16 + j] = rows[j * stride + d] + add;
    for (int64_t j = count; j < 16; ++j) tile[d * 16 + j] = 0.0f;
  }
}
