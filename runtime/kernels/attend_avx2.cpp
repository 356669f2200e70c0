// only: x86_64
// flags: -mavx2 -mfma -ffp-contract=fast
#include "attend.h"
#include "tiles.h"

#include <immintrin.h>

namespace onnxsmith {
namespace avx2 {

#include "vector_avx2.inl"

inline __m128 halves(__m256 v, __m128 (*join)(__m128, __m128)) {
  return join(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

inline float largest_of(Vector v) {
  __m128 four = halves(_mm256_max_ps(v.low, v.high), [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline float sum_of(Vector v) {
  __m128 four = halves(_mm256_add_ps(v.low, v.high), [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// A tree of additions that transposes on its way.
inline void sums_of(const Vector* v, float* out) {
  for (int i = 0; i < 16; i += 8) {
    __m256 pairs[4];
    for (int j = 0; j < 4; ++j) {
      const Vector& a = v[i + 2 * j];
      const Vector& b = v[i + 2 * j + 1];
      pairs[j] = _mm256_hadd_ps(_mm256_add_ps(a.low, a.high), _mm256_add_ps(b.low, b.high));
    }
    const __m256 first = _mm256_hadd_ps(pairs[0], pairs[1]);
    const __m256 second = _mm256_hadd_ps(pairs[2], pairs[3]);
    _mm256_storeu_ps(out + i, _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20),
                                            _mm256_permute2f128_ps(first, second, 0x31)));
  }
}

#include "attend.inl"

constexpr int kFloatRows = 4;
constexpr int kFloatTiles = 1;

#include "floats.inl"

#include "turn.inl"

#include "heads.inl"

}  // namespace avx2

const Attend& avx2_attend() {
  static const Attend attend{"avx2", avx2::piece<false>, avx2::piece<true>, avx2::merge, avx2::products,
                             avx2::heads, avx2::shift, avx2::transpose};
  return attend;
}

}  // namespace onnxsmith
