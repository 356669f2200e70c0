// What every instruction set compiles as it stands, with its own flags. Included inside a namespace of its own.

#include "exponential.inl"

// Asks for the codes that a row needs after these. Processors ask for what lies ahead too, and stop at the end of a
// page: at every 4 KiB a row would wait for memory.
inline void ask_ahead(const uint8_t* codes, int64_t bytes) {
  constexpr int64_t kAhead = 4096;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes + kAhead + i);
}

inline Vector sigmoid(Vector x) { return all_of(1.0f) / (all_of(1.0f) + exponential(all_of(0.0f) - x)); }

// erf by Abramowitz and Stegun 7.1.26 is too coarse; this is a quotient of polynomials that is right to 2e-7,
// the one that ONNX Runtime's MlasComputeErf and Eigen use in other forms: x clamped, odd over even.
inline Vector error_function(Vector x) {
  static constexpr float kAbove[] = {-1.60960333262415e-02f, -2.95459980854025e-03f, -7.34990630326855e-04f,
                                     -5.69250639462346e-05f, -2.10102402082508e-06f, 2.77068142495902e-08f,
                                     -2.72614225801306e-10f};
  static constexpr float kBelow[] = {-1.42647390514189e-02f, -7.37332916720468e-03f, -1.68282697438203e-03f,
                                     -2.13374055278905e-04f, -1.45660718464996e-05f};
  x = smaller(all_of(3.925f), larger(all_of(-3.925f), x));
  const Vector square = x * x;
  return x * polynomial(kAbove, square) / polynomial(kBelow, square);
}

template <Gate kind>
inline Vector activated(Vector x) {
  if (kind == Gate::kSilu) return x * sigmoid(x);
  if (kind == Gate::kGelu) {
    return all_of(0.5f) * x * (all_of(1.0f) + error_function(x * all_of(0.70710678118654752f)));
  }
  const Vector inner = all_of(0.7978845608028654f) * fused(all_of(0.044715f) * x * x, x, x);
  return x * sigmoid(all_of(2.0f) * inner);
}

// `count` is a multiple of 16.
template <Gate kind>
void gate_by(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    Vector some = activated<kind>(load(gate + i));
    if (up != nullptr) some = some * load(up + i);
    store(gate + i, some);
  }
}

void gate(Gate function, float* gate, const float* up, int64_t count) {
  if (function == Gate::kSilu) gate_by<Gate::kSilu>(gate, up, count);
  if (function == Gate::kGelu) gate_by<Gate::kGelu>(gate, up, count);
  if (function == Gate::kGeluTanh) gate_by<Gate::kGeluTanh>(gate, up, count);
}

template <int UNIT>
void round_by(const float* __restrict row, int64_t columns, Activations out) {
  for (int64_t u = 0; u < columns / UNIT; ++u) {
    const float* values = row + u * UNIT;
    // Among numbers that are not negative, floats are ordered as their bits are.
    int32_t largest = 0;
    for (int i = 0; i < UNIT; ++i) {
      int32_t bits;
      std::memcpy(&bits, values + i, sizeof(bits));
      bits &= 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    float top;
    std::memcpy(&top, &largest, sizeof(top));
    const float scale = top / 127.0f;
    // A scale too small to have an inverse rounds to zeros.
    const float inverse = top > 1e-35f ? 127.0f / top : 0.0f;
    int8_t* codes = out.codes + u * UNIT;
    int32_t sum = 0;
    if (largest >= 0x7f800000) {
      // Not all are numbers, so the scale is none, and neither is what it is multiplied with.
      std::memset(codes, 0, UNIT);
      out.scales[u] = scale;
      out.sums[u] = 0;
      out.scaled_sums[u] = scale * 0.0f;
      continue;
    }
    for (int i = 0; i < UNIT; ++i) {
      const int32_t code = static_cast<int32_t>(nearest(values[i] * inverse));
      codes[i] = static_cast<int8_t>(code);
      sum += code;
    }
    out.scales[u] = scale;
    out.sums[u] = sum;
    out.scaled_sums[u] = scale * static_cast<float>(sum);
  }
}

void round(const float* row, int64_t columns, int64_t unit, Activations out) {
  if (unit == 16) round_by<16>(row, columns, out);
  if (unit == 32) round_by<32>(row, columns, out);
  if (unit == 64) round_by<64>(row, columns, out);
  if (unit == 128) round_by<128>(row, columns, out);
}

void normalize(const float* row, const float* skip, const float* weight, float epsilon, int64_t columns,
               float* sum, float* out) {
  if (skip != nullptr) {
    for (int64_t i = 0; i < columns; ++i) sum[i] = row[i] + skip[i];
    row = sum;
  }
  // Sixteen sums side by side, added up in a fixed order.
  float squares[16] = {};
  for (int64_t i = 0; i < columns; i += 16) {
    for (int c = 0; c < 16; ++c) squares[c] = std::fma(row[i + c], row[i + c], squares[c]);
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int c = 0; c < half; ++c) squares[c] += squares[c + half];
  }
  const float factor = 1.0f / std::sqrt(squares[0] / static_cast<float>(columns) + epsilon);
  for (int64_t i = 0; i < columns; ++i) out[i] = row[i] * factor * weight[i];
}
