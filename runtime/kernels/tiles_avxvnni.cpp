// only: x86_64
// flags: -mavx2 -mfma -mf16c
// What processors have that lack AVX-512: a `vpdpbusd` of 256 bits. Not by a flag of the compiler, because g++ 10
// and clang 11 know none: they make a library without these.
#include "tiles.h"
#include "x86.h"

#include <immintrin.h>

#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avxvnni")
#endif

namespace onnxsmith {
namespace avxvnni {

#include "vector_avx2.inl"

#include "tiles.inl"
#include "tiles_256.inl"

template <int R, int BITS, int STEP>
inline void step_products(const uint8_t* codes, const int8_t* rows, int64_t stride, __m256i dot[R][kHalves]) {
  for (int r = 0; r < R; ++r) dot[r][0] = dot[r][1] = _mm256_setzero_si256();
  if (BITS == 8) {
    for (int g = 0; g < STEP / 4; ++g) {
      for (int h = 0; h < kHalves; ++h) {
        const __m256i q = load(codes + 64 * g + 32 * h);
        for (int r = 0; r < R; ++r) {
          dot[r][h] = _mm256_dpbusd_avx_epi32(dot[r][h], q, four(rows + r * stride + 4 * g));
        }
      }
    }
    return;
  }
  for (int g = 0; g < STEP / 8; ++g) {
    __m256i low[kHalves];
    __m256i high[kHalves];
    unpack(codes + 64 * g, low, high);
    for (int r = 0; r < R; ++r) {
      const __m256i a = four(rows + r * stride + 8 * g);
      const __m256i b = four(rows + r * stride + 8 * g + 4);
      for (int h = 0; h < kHalves; ++h) {
        dot[r][h] = _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(dot[r][h], low[h], a), high[h], b);
      }
    }
  }
}

bool supported() { return x86().avxvnni; }

}  // namespace avxvnni

const Tiles* avxvnni_tiles() {
  static const Tiles tiles{"avxvnni", avxvnni::supported, avxvnni::round, avxvnni::normalize, avxvnni::product,
                           one_by_one<avxvnni::product>, avxvnni::gate};
  return &tiles;
}

}  // namespace onnxsmith

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

const onnxsmith::Tiles* onnxsmith::avxvnni_tiles() { return nullptr; }

#endif
