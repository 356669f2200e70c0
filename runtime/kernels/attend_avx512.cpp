// only: x86_64
// flags: -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -ffp-contract=fast
#include "attend.h"
#include "tiles.h"

#include <immintrin.h>

namespace onnxsmith {
namespace avx512 {

typedef __m512 Vector;

inline Vector load(const float* from) { return _mm512_loadu_ps(from); }

inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }

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

inline void add_product(Vector& sum, float a, Vector b) { sum = _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum); }

constexpr int kFloatRows = 8;
constexpr int kFloatTiles = 2;

#include "floats.inl"

}  // namespace avx512

const Attend& avx512_attend() {
  static const Attend attend{"avx512", avx512::piece<false>, avx512::piece<true>, avx512::merge, avx512::products};
  return attend;
}

}  // namespace onnxsmith
