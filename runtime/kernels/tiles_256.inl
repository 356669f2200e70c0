// Packed products with registers of 256 bits: two of them hold 16 rows of a weight by 4 columns. Includes nothing,
// and is included inside a namespace of its own, which defines the template declared below.

// What 16 rows have each one of: those of rows 0 to 7, and of rows 8 to 15.
constexpr int kHalves = 2;

inline __m256 load(const void* from, bool half, int64_t at) {
  if (!half) return _mm256_loadu_ps(static_cast<const float*>(from) + at);
  return _mm256_cvtph_ps(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + at)));
}

inline __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

// The low and the high halves of the bytes of 16 rows.
inline void unpack(const uint8_t* codes, __m256i low[kHalves], __m256i high[kHalves]) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int h = 0; h < kHalves; ++h) {
    const __m256i both = load(codes + 32 * h);
    low[h] = _mm256_and_si256(both, mask);
    high[h] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  }
}

// The same four activations for all rows of a weight.
inline __m256i four(const int8_t* from) {
  int32_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  return _mm256_set1_epi32(bits);
}

// dot[r][h] = the products of a step's codes with `R` rows, which are `stride` apart.
template <int R, int BITS, int STEP>
void step_products(const uint8_t* codes, const int8_t* rows, int64_t stride, __m256i dot[R][kHalves]);

// `R` rows at once: the codes of a step are unpacked once for all of them.
template <int R, int BITS, int STEP, Offsets KIND>
void some_rows(const Weight& weight, int64_t tile, const Activations& rows, int64_t first, float* out,
               int64_t stride) {
  const int64_t units = weight.columns / weight.unit;
  const int64_t per_block = weight.block_size / weight.unit;
  const int64_t steps = weight.unit / STEP;
  const uint8_t* codes = weight.codes + tile * weight.code_bytes();
  const int8_t* row = rows.codes + first * weight.columns;
  const float* row_scales = rows.scales + first * units;
  const int32_t* sums = rows.sums + first * units;
  const float* scaled_sums = rows.scaled_sums + first * units;
  __m256 acc[R][kHalves];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
  __m256 scales[kHalves] = {};
  __m256 minimums[kHalves] = {};
  __m256i zero_points[kHalves] = {};
  int64_t left = 0;  // units of this block
  int64_t at = tile * weight.blocks() * kTile - kTile;
  for (int64_t u = 0; u < units; ++u) {
    if (left == 0) {
      left = per_block;
      at += kTile;
      for (int h = 0; h < kHalves; ++h) {
        scales[h] = load(weight.scales, weight.half_scales, at + 8 * h);
        if (KIND == Offsets::kMinimums) minimums[h] = load(weight.offsets, weight.half_offsets, at + 8 * h);
        if (KIND == Offsets::kZeroPoints) {
          zero_points[h] = _mm256_cvtepu8_epi32(_mm_loadl_epi64(
              reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(weight.offsets) + at + 8 * h)));
        }
      }
    }
    --left;
    __m256i dot[R][kHalves];
    for (int64_t s = 0; s < steps; ++s, codes += STEP * kTile * BITS / 8) {
      ask_ahead(codes, STEP * kTile * BITS / 8);
      __m256i some[R][kHalves];
      step_products<R, BITS, STEP>(codes, row + (u * steps + s) * STEP, weight.columns, some);
      for (int r = 0; r < R; ++r) {
        for (int h = 0; h < kHalves; ++h) dot[r][h] = s == 0 ? some[r][h] : _mm256_add_epi32(dot[r][h], some[r][h]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const __m256i sum = _mm256_set1_epi32(sums[r * units + u]);
      const __m256 scale = _mm256_set1_ps(row_scales[r * units + u]);
      for (int h = 0; h < kHalves; ++h) {
        __m256i exact = dot[r][h];
        if (KIND == Offsets::kMiddle) exact = _mm256_sub_epi32(exact, _mm256_slli_epi32(sum, BITS - 1));
        if (KIND == Offsets::kZeroPoints) {
          // Both fit 16 bits; the upper halves of the zero points are zero.
          exact = _mm256_sub_epi32(exact, _mm256_madd_epi16(zero_points[h], sum));
        }
        acc[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), _mm256_mul_ps(scales[h], scale), acc[r][h]);
        if (KIND == Offsets::kMinimums) {
          acc[r][h] = _mm256_fmadd_ps(minimums[h], _mm256_set1_ps(scaled_sums[r * units + u]), acc[r][h]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < kHalves; ++h) _mm256_storeu_ps(out + (first + r) * stride + 8 * h, acc[r][h]);
  }
}

template <int BITS, int STEP, Offsets KIND>
void all_rows(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
              int64_t stride) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) some_rows<4, BITS, STEP, KIND>(weight, tile, rows, r, out, stride);
  if (r + 2 <= count) some_rows<2, BITS, STEP, KIND>(weight, tile, rows, r, out, stride), r += 2;
  if (r < count) some_rows<1, BITS, STEP, KIND>(weight, tile, rows, r, out, stride);
}

template <int BITS, int STEP>
void by_kind(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
             int64_t stride) {
  if (weight.kind == Offsets::kMiddle) {
    all_rows<BITS, STEP, Offsets::kMiddle>(weight, tile, rows, count, out, stride);
  } else if (weight.kind == Offsets::kZeroPoints) {
    all_rows<BITS, STEP, Offsets::kZeroPoints>(weight, tile, rows, count, out, stride);
  } else {
    all_rows<BITS, STEP, Offsets::kMinimums>(weight, tile, rows, count, out, stride);
  }
}

void product(const Weight& weight, int64_t tile, const Activations& rows, int64_t count, float* out,
             int64_t stride) {
  if (weight.bits == 4 && weight.step() == 32) by_kind<4, 32>(weight, tile, rows, count, out, stride);
  if (weight.bits == 4 && weight.step() == 16) by_kind<4, 16>(weight, tile, rows, count, out, stride);
  if (weight.bits == 8 && weight.step() == 32) by_kind<8, 32>(weight, tile, rows, count, out, stride);
  if (weight.bits == 8 && weight.step() == 16) by_kind<8, 16>(weight, tile, rows, count, out, stride);
}
