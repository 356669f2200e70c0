// flags: -ffp-contract=fast -Wno-psabi
#include "attend.h"
#include "tiles.h"

namespace onnxsmith {
namespace generic {

typedef float Vector __attribute__((vector_size(64)));

inline Vector load(const float* from) {
  Vector out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

inline Vector larger(Vector a, Vector b) {
  for (int i = 0; i < 16; ++i) a[i] = b[i] > a[i] ? b[i] : a[i];
  return a;
}

inline float largest_of(Vector v) {
  float largest = v[0];
  for (int i = 1; i < 16; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

inline float sum_of(Vector v) {
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sum += v[i];
  return sum;
}

inline void sums_of(const Vector* vectors, float* out) {
  for (int j = 0; j < 16; ++j) out[j] = sum_of(vectors[j]);
}

#include "attend.inl"

}  // namespace generic

const Attend& generic_attend() {
  static const Attend attend{"generic", generic::piece<false>, generic::piece<true>, generic::merge};
  return attend;
}

}  // namespace onnxsmith
