// What the elimination and the inversion of a block have in common: vectors, and matrix products tile by tile.
#pragma once

#include <cstdint>

namespace cap_hf {

// Steps of a panel: few enough for its columns to stay in the second-level cache.
constexpr int kPanel = 64;
// Bytes of a vector; compilers turn one into as many registers as the processor needs.
constexpr int kVectorBytes = 64;
// A product goes tile by tile, kRows rows by kColumns vectors each, whose sums stay in registers.
constexpr int kRows = 8;
constexpr int kColumns = 2;

template <typename Scalar>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(kVectorBytes), aligned(sizeof(Scalar))));
};
template <typename Scalar>
using Vector = typename VectorOf<Scalar>::type;

// Entries of a vector.
template <typename Scalar>
constexpr int lanes() {
  return kVectorBytes / sizeof(Scalar);
}

// Entries from one row to the next of a matrix with so many columns, so that whole tiles can be read and written.
template <typename Scalar>
constexpr int64_t padded(int64_t size) {
  return (size + lanes<Scalar>() - 1) / lanes<Scalar>() * lanes<Scalar>() + lanes<Scalar>() * kColumns;
}

template <typename Scalar>
inline Vector<Scalar> load(const Scalar* from) {
  return *reinterpret_cast<const Vector<Scalar>*>(from);
}
template <typename Scalar>
inline void store(Scalar* to, Vector<Scalar> value) {
  *reinterpret_cast<Vector<Scalar>*>(to) = value;
}

// Takes from the sums of a tile at (i, j) the products of `width` columns, which lie `stride` entries after each other.
template <typename Scalar, int kHeight>
inline void subtract_products(Vector<Scalar> (&sum)[kHeight][kColumns], const Scalar* column, int64_t stride,
                              int64_t width, int64_t i, int64_t j) {
  for (int64_t k = 0; k < width; ++k, column += stride) {
    Vector<Scalar> right[kColumns];
    for (int c = 0; c < kColumns; ++c) right[c] = load(column + j + c * lanes<Scalar>());
    for (int r = 0; r < kHeight; ++r) {
      for (int c = 0; c < kColumns; ++c) sum[r][c] -= column[i + r] * right[c];
    }
  }
}

}  // namespace cap_hf
