// flags: -ffp-contract=fast
#include "attend.h"
#include "tiles.h"

namespace onnxsmith {
namespace generic {

#include "vector_generic.inl"

inline float largest_of(Vector v) {
  const Four four = larger(larger(v.part[0], v.part[1]), larger(v.part[2], v.part[3]));
  float largest = four[0];
  for (int i = 1; i < 4; ++i) largest = four[i] > largest ? four[i] : largest;
  return largest;
}

inline float sum_of(Vector v) {
  const Four four = (v.part[0] + v.part[1]) + (v.part[2] + v.part[3]);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

inline void sums_of(const Vector* vectors, float* out) {
  for (int j = 0; j < 16; ++j) out[j] = sum_of(vectors[j]);
}

#include "attend.inl"

constexpr int kFloatRows = 2;
constexpr int kFloatTiles = 1;

#include "floats.inl"

#include "turn.inl"

#include "heads.inl"

}  // namespace generic

const Attend& generic_attend() {
  static const Attend attend{"generic", generic::piece<false>, generic::piece<true>, generic::merge, generic::products,
                             generic::heads, generic::shift, generic::transpose};
  return attend;
}

}  // namespace onnxsmith
