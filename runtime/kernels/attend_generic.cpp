// flags: -ffp-contract=fast
#include "attend.h"
#include "tiles.h"

namespace onnxsmith {
namespace generic {

// Four vectors, which every processor has instructions for.
typedef float Four __attribute__((vector_size(16)));

struct Vector {
  Four part[4] = {};
};

inline Vector load(const float* from) {
  Vector out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

inline Vector operator*(Vector a, Vector b) {
  for (int i = 0; i < 4; ++i) a.part[i] *= b.part[i];
  return a;
}

inline Vector operator*(float a, Vector b) {
  for (int i = 0; i < 4; ++i) b.part[i] *= a;
  return b;
}

inline Vector& operator+=(Vector& a, Vector b) {
  for (int i = 0; i < 4; ++i) a.part[i] += b.part[i];
  return a;
}

inline Four larger(Four a, Four b) { return b > a ? b : a; }

inline Vector larger(Vector a, Vector b) {
  for (int i = 0; i < 4; ++i) a.part[i] = larger(a.part[i], b.part[i]);
  return a;
}

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

inline void add_product(Vector& sum, float a, Vector b) { sum += a * b; }

constexpr int kFloatRows = 2;
constexpr int kFloatTiles = 1;

#include "floats.inl"

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof(v)); }

inline Vector all_of(float a) {
  Vector out;
  for (int i = 0; i < 4; ++i) out.part[i] = Four{a, a, a, a};
  return out;
}

#include "power_of_two.inl"

inline Vector powers(Vector scores, float highest) {
  float some[16];
  store(some, scores);
  for (int i = 0; i < 16; ++i) some[i] = power_of_two((some[i] - highest) * kLogarithm);
  return load(some);
}

inline void turn(Vector* v) {
  float rows[16][16];
  float columns[16][16];
  for (int i = 0; i < 16; ++i) store(rows[i], v[i]);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) columns[i][j] = rows[j][i];
  }
  for (int i = 0; i < 16; ++i) v[i] = load(columns[i]);
}

#include "heads.inl"

}  // namespace generic

const Attend& generic_attend() {
  static const Attend attend{"generic", generic::piece<false>, generic::piece<true>, generic::merge, generic::products,
                             generic::heads, generic::shift, generic::transpose};
  return attend;
}

}  // namespace onnxsmith
