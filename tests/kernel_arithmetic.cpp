// The arithmetic of the kernels without ONNX Runtime: one line for each instruction set of this processor, with
// a hash of all results. Made-up numbers are the same everywhere, so all lines are, on all processors.
#include <cstdio>
#include <vector>

#include "tiles.h"

using namespace onnxsmith;

namespace {

struct Numbers {
  uint64_t state = 88172645463325252ull;  // xorshift64

  uint32_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
  }
  float real(float scale) { return scale * (static_cast<int32_t>(next() % 2000001) - 1000000) / 1e6f; }
  std::vector<float> reals(size_t count, float scale) {
    std::vector<float> made(count);
    for (float& x : made) x = real(scale);
    return made;
  }
};

struct Hash {
  uint64_t value = 1469598103934665603ull;  // FNV-1a

  template <typename T>
  void add(const std::vector<T>& values) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) value = (value ^ bytes[i]) * 1099511628211ull;
  }
};

constexpr int64_t kColumns = 256;
constexpr int64_t kRows = 13;

void try_form(const Tiles& tiles, int bits, int64_t unit, int64_t block_size, Offsets kind, bool half,
              Numbers* numbers, Hash* hash) {
  const int64_t scales = 2 * kTile * kColumns / block_size;
  std::vector<uint8_t> codes(2 * kTile * kColumns * bits / 8);
  // Many at the end of their range, where sums are largest.
  for (uint8_t& code : codes) code = numbers->next() % 4 == 0 ? 255 : numbers->next();
  const std::vector<float> steps = numbers->reals(scales, 0.01f);
  const std::vector<float> minimums = numbers->reals(scales, 1.0f);
  std::vector<uint16_t> half_steps(scales), half_minimums(scales);
  std::vector<uint8_t> zero_points(scales);
  for (int64_t i = 0; i < scales; ++i) {
    half_steps[i] = 0x2000 + numbers->next() % 0x800;
    half_minimums[i] = 0x9000 + numbers->next() % 0x2000;
    zero_points[i] = numbers->next() % (1 << bits);
  }
  Weight weight{};
  weight.codes = codes.data();
  weight.scales = half ? static_cast<const void*>(half_steps.data()) : steps.data();
  weight.offsets = half ? static_cast<const void*>(half_minimums.data()) : minimums.data();
  if (kind == Offsets::kZeroPoints) weight.offsets = zero_points.data();
  weight.half_scales = weight.half_offsets = half;
  weight.kind = kind;
  weight.bits = bits;
  weight.columns = kColumns;
  weight.block_size = block_size;
  weight.unit = unit;

  std::vector<float> rows = numbers->reals(kRows * kColumns, 3.0f);
  for (int64_t k = 0; k < kColumns; ++k) {
    rows[3 * kColumns + k] = 0.0f;
    rows[4 * kColumns + k] = 1e-38f;
    rows[5 * kColumns + k] *= 1e20f;
  }
  const int64_t units = kColumns / unit;
  std::vector<int8_t> rounded(kRows * kColumns);
  std::vector<float> row_scales(kRows * units), scaled_sums(kRows * units);
  std::vector<int32_t> sums(kRows * units);
  for (int64_t r = 0; r < kRows; ++r) {
    tiles.round(rows.data() + r * kColumns, kColumns, unit,
                {rounded.data() + r * kColumns, row_scales.data() + r * units, sums.data() + r * units,
                 scaled_sums.data() + r * units});
  }
  hash->add(rounded);
  hash->add(row_scales);
  hash->add(scaled_sums);

  const Activations activations{rounded.data(), row_scales.data(), sums.data(), scaled_sums.data()};
  std::vector<float> one(kRows * kTile), other(kRows * kTile);
  tiles.products(weight, 0, 1, activations, kRows, one.data(), other.data(), kTile);
  hash->add(one);
  hash->add(other);
  tiles.product(weight, 1, activations, kRows, one.data(), kTile);
  hash->add(one);

  for (const Gate gate : {Gate::kSilu, Gate::kGelu, Gate::kGeluTanh}) {
    std::vector<float> gates = numbers->reals(64, 12.0f);
    const std::vector<float> values = numbers->reals(64, 1.0f);
    tiles.gate(gate, gates.data(), values.data(), 64);
    hash->add(gates);
  }
  const std::vector<float> norm = numbers->reals(kColumns, 1.0f);
  std::vector<float> sum(kColumns), normed(kColumns);
  tiles.normalize(rows.data(), rows.data() + kColumns, norm.data(), 1e-5f, kColumns, sum.data(), normed.data());
  hash->add(sum);
  hash->add(normed);
}

void try_all(const Tiles& tiles) {
  if (!tiles.supported()) return;
  Numbers numbers;
  Hash hash;
  for (const int bits : {4, 8}) {
    for (const int64_t unit : {16, 32, 64, 128}) {
      for (const int64_t block_size : {16, 32, 64, 128}) {
        for (const Offsets kind : {Offsets::kMiddle, Offsets::kZeroPoints, Offsets::kMinimums}) {
          for (const bool half : {false, true}) {
            if (block_size >= unit) try_form(tiles, bits, unit, block_size, kind, half, &numbers, &hash);
          }
        }
      }
    }
  }
  std::printf("%s %016llx\n", tiles.name, static_cast<unsigned long long>(hash.value));
}

}  // namespace

int main() {
  try_all(generic_tiles());
#if defined(__aarch64__)
  try_all(dotprod_tiles());
#endif
#if defined(__x86_64__)
  try_all(avx2_tiles());
  if (avxvnni_tiles() != nullptr) try_all(*avxvnni_tiles());
  try_all(avx512vnni_tiles());
#endif
}
