#include "tiles.h"

#include "attend.h"

#include <cstdlib>
#include <cstring>

namespace onnxsmith {

namespace {

const Tiles& choose() {
  const Tiles* known[] = {
#if defined(__aarch64__)
      &dotprod_tiles(),
#endif
#if defined(__x86_64__)
      &avx512vnni_tiles(),
      avxvnni_tiles(),
      &avx2_tiles(),
#endif
      &generic_tiles(),
  };
  const char* wanted = std::getenv("ONNXSMITH_KERNELS_ISA");
  if (wanted != nullptr) {
    for (const Tiles* tiles : known) {
      if (tiles != nullptr && std::strcmp(tiles->name, wanted) == 0 && tiles->supported()) return *tiles;
    }
  }
  for (const Tiles* tiles : known) {
    if (tiles != nullptr && tiles->supported()) return *tiles;
  }
  return generic_tiles();
}

}  // namespace

const Tiles& tiles() {
  static const Tiles& chosen = choose();
  return chosen;
}

const Attend& attend() {
#if defined(__x86_64__)
  if (&tiles() == &avx512vnni_tiles()) return avx512_attend();
  if (&tiles() == &avx2_tiles() || &tiles() == avxvnni_tiles()) return avx2_attend();
#endif
  return generic_attend();
}

}  // namespace onnxsmith
