// only: x86_64
// flags: -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -ffp-contract=fast
#include "attend.h"
#include "tiles.h"

#include <immintrin.h>

namespace onnxsmith {
namespace avx512 {

#include "vector_avx512.inl"

inline float largest_of(Vector v) { return _mm512_reduce_max_ps(v); }

inline float sum_of(Vector v) { return _mm512_reduce_add_ps(v); }

// A tree of additions that transposes on its way: 16 sums in 15 additions and 30 shuffles.
inline void sums_of(const Vector* v, float* out) {
  Vector quads[4];
  for (int i = 0; i < 4; ++i) {
    const Vector* four = v + 4 * i;
    const Vector a = _mm512_add_ps(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
    const Vector b = _mm512_add_ps(_mm512_unpacklo_ps(four[2], four[3]), _mm512_unpackhi_ps(four[2], four[3]));
    const __m512d ad = _mm512_castps_pd(a);
    const __m512d bd = _mm512_castps_pd(b);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ad, bd)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(ad, bd)));
  }
  // Each 128 bits of quads[i] hold a part of sums 4i to 4i + 3.
  const Vector low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                                   _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
  const Vector high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                                    _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
  _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                                      _mm512_shuffle_f32x4(low, high, 0xdd)));
}

#include "attend.inl"

constexpr int kFloatRows = 8;
constexpr int kFloatTiles = 2;

#include "floats.inl"

// Sixteen rows of sixteen become columns: pairs, fours and lanes of four change places.
inline void turn(Vector* v) {
  __m512d fours[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[i], v[i + 1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[i], v[i + 1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[i + 2], v[i + 3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[i + 2], v[i + 3]));
    fours[i] = _mm512_unpacklo_pd(a, c);
    fours[i + 1] = _mm512_unpackhi_pd(a, c);
    fours[i + 2] = _mm512_unpacklo_pd(b, d);
    fours[i + 3] = _mm512_unpackhi_pd(b, d);
  }
  // Lane l of fours[4i + k] holds column 4l + k of rows 4i to 4i + 3.
  for (int k = 0; k < 4; ++k) {
    const Vector a = _mm512_castpd_ps(fours[k]);
    const Vector b = _mm512_castpd_ps(fours[4 + k]);
    const Vector c = _mm512_castpd_ps(fours[8 + k]);
    const Vector d = _mm512_castpd_ps(fours[12 + k]);
    const Vector ab = _mm512_shuffle_f32x4(a, b, 0x88);
    const Vector cd = _mm512_shuffle_f32x4(c, d, 0x88);
    const Vector ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd);
    const Vector cd_odd = _mm512_shuffle_f32x4(c, d, 0xdd);
    v[k] = _mm512_shuffle_f32x4(ab, cd, 0x88);
    v[8 + k] = _mm512_shuffle_f32x4(ab, cd, 0xdd);
    v[4 + k] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    v[12 + k] = _mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
  }
}

#include "heads.inl"

}  // namespace avx512

const Attend& avx512_attend() {
  static const Attend attend{"avx512", avx512::piece<false>, avx512::piece<true>, avx512::merge, avx512::products,
                             avx512::heads, avx512::shift, avx512::transpose};
  return attend;
}

}  // namespace onnxsmith
