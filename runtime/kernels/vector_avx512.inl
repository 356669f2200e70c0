// Sixteen floats, in a register of 512 bits.
// Included inside a namespace of its own. All of these vectors have the same functions, and give the same bits:
// operators, load, store, all_of, fused, larger, smaller, two_to; but plus_product rounds as is fastest.

typedef __m512 Vector;

inline Vector load(const float* from) { return _mm512_loadu_ps(from); }

inline void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }

inline Vector all_of(float a) { return _mm512_set1_ps(a); }

// a * b + c, rounded once.
inline Vector fused(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

inline Vector plus_product(Vector sum, Vector a, Vector b) { return fused(a, b, sum); }

// a > b ? a : b, so that what is no number stays where it is the second.
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }

inline Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }

// 2^n for whole n from -127, which gives 0, to 127.
inline Vector two_to(Vector n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127)), 23));
}
