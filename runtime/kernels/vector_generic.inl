// Sixteen floats, in four vectors that every processor has instructions for.
// Included inside a namespace of its own. All of these vectors have the same functions, and give the same bits:
// operators, load, store, all_of, fused, larger, smaller, two_to; but plus_product rounds as is fastest.

typedef float Four __attribute__((vector_size(16)));
typedef uint32_t FourIntegers __attribute__((vector_size(16)));

struct Vector {
  Four part[4] = {};
};

inline Vector load(const float* from) {
  Vector out;
  std::memcpy(out.part, from, sizeof(out.part));
  return out;
}

inline void store(float* to, Vector v) { std::memcpy(to, v.part, sizeof(v.part)); }

template <typename Work>
inline Vector of_parts(const Work& work) {
  Vector out;
  for (int i = 0; i < 4; ++i) out.part[i] = work(i);
  return out;
}

inline Vector all_of(float a) {
  return of_parts([&](int) { return Four{a, a, a, a}; });
}

inline Vector operator+(Vector a, Vector b) {
  return of_parts([&](int i) { return a.part[i] + b.part[i]; });
}

inline Vector operator-(Vector a, Vector b) {
  return of_parts([&](int i) { return a.part[i] - b.part[i]; });
}

inline Vector operator*(Vector a, Vector b) {
  return of_parts([&](int i) { return a.part[i] * b.part[i]; });
}

inline Vector operator/(Vector a, Vector b) {
  return of_parts([&](int i) { return a.part[i] / b.part[i]; });
}

inline Vector& operator+=(Vector& a, Vector b) { return a = a + b; }

inline Vector fused(Vector a, Vector b, Vector c) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) a.part[i][j] = std::fma(a.part[i][j], b.part[i][j], c.part[i][j]);
  }
  return a;
}

inline Vector plus_product(Vector sum, Vector a, Vector b) { return sum + a * b; }

inline Four larger(Four a, Four b) { return a > b ? a : b; }

inline Four smaller(Four a, Four b) { return a < b ? a : b; }

inline Vector larger(Vector a, Vector b) {
  return of_parts([&](int i) { return larger(a.part[i], b.part[i]); });
}

inline Vector smaller(Vector a, Vector b) {
  return of_parts([&](int i) { return smaller(a.part[i], b.part[i]); });
}

inline Vector two_to(Vector n) {
  // Where floats are as far apart as whole numbers, the last bits are n + 127.
  return of_parts([&](int i) {
    const Four shifted = n.part[i] + (12582912.0f + 127.0f);
    FourIntegers bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits <<= 23;
    Four out;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
  });
}
