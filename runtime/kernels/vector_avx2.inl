// Sixteen floats, in two registers of 256 bits.
// Included inside a namespace of its own. All of these vectors have the same functions, and give the same bits:
// operators, load, store, all_of, fused, larger, smaller, two_to; but plus_product rounds as is fastest.

struct Vector {
  __m256 low = _mm256_setzero_ps();
  __m256 high = _mm256_setzero_ps();
};

inline Vector load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

inline void store(float* to, Vector v) {
  _mm256_storeu_ps(to, v.low);
  _mm256_storeu_ps(to + 8, v.high);
}

inline Vector all_of(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }

inline Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }

inline Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }

inline Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }

inline Vector operator/(Vector a, Vector b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }

inline Vector& operator+=(Vector& a, Vector b) { return a = a + b; }

inline Vector fused(Vector a, Vector b, Vector c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline Vector plus_product(Vector sum, Vector a, Vector b) { return fused(a, b, sum); }

inline Vector larger(Vector a, Vector b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }

inline Vector smaller(Vector a, Vector b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

inline __m256 two_to(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127)), 23));
}

inline Vector two_to(Vector n) { return {two_to(n.low), two_to(n.high)}; }
