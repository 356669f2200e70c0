// Included inside a namespace of its own, behind a `Vector`. A compiler that gets loops over single numbers makes
// branches of what is cut off at an end, and vectors of branches.

// Rounds to the nearest integer, ties to even, for |x| < 2^22.
inline float nearest(float x) {
  const float shift = 12582912.0f;
  return (x + shift) - shift;
}

inline Vector nearest(Vector x) {
  const Vector shift = all_of(12582912.0f);
  return (x + shift) - shift;
}

// factors[0] + factors[1] * x + ..., by Horner's rule.
template <int COUNT>
inline Vector polynomial(const float (&factors)[COUNT], Vector x) {
  Vector p = all_of(factors[COUNT - 1]);
  for (int i = COUNT - 2; i >= 0; --i) p = fused(p, x, all_of(factors[i]));
  return p;
}

// e^x to a unit in the last place or two, by Cody and Waite's reduction and a polynomial of degree 6 (Cephes); 0 for
// x below -87.7.
inline Vector exponential(Vector x) {
  static constexpr float kFactors[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                                       8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
  x = smaller(all_of(88.0f), larger(all_of(-88.0f), x));
  const Vector n = nearest(x * all_of(1.44269504088896341f));
  Vector r = fused(n, all_of(-0.693359375f), x);
  r = fused(n, all_of(2.12194440e-4f), r);
  return (fused(polynomial(kFactors, r), r * r, r) + all_of(1.0f)) * two_to(n);
}

inline float exponential(float x) {
  float all[16];
  store(all, exponential(all_of(x)));
  return all[0];
}

// 2^x for x <= 0, and exactly 0 for x below -126.5: x apart in an integer and a rest, whose power is a polynomial of
// degree 6. It has the least relative error on [-0.5, 0.5] (2e-9, found by Lawson's iteration); in float32 a unit in
// the last place.
inline Vector power_of_two(Vector x) {
  static constexpr float kFactors[] = {1.0f,           6.93147206e-1f, 2.40226469e-1f, 5.55032878e-2f,
                                       9.61848896e-3f, 1.33999314e-3f, 1.53458122e-4f};
  x = larger(all_of(-127.0f), x);
  const Vector n = nearest(x);
  return polynomial(kFactors, x - n) * two_to(n);
}
