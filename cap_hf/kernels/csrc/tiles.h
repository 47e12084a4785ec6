// What the solvers of a block have in common: vectors, sums of products, and matrix products tile by tile.
#pragma once

#include <cstdint>

namespace cap_hf {

// Steps of a panel: few enough for its columns to stay in the second-level cache.
constexpr int kPanel = 64;
// Bytes of a vector: what one register holds. Compilers split a wider one, into code that is 20 times as slow.
// A product goes tile by tile, kRows rows by kColumns vectors each, whose sums stay in registers: of these there are 32
// with AVX-512, else mostly 16.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 8;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRows = 4;
#else
constexpr int kVectorBytes = 16, kRows = 4;
#endif
constexpr int kColumns = 2;
// Bytes of a vector that holds whole units, of up to eight weights in double.
constexpr int kWideBytes = 64;

template <typename Scalar, int kBytes>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(kBytes), aligned(sizeof(Scalar))));
};
template <typename Scalar>
using Vector = typename VectorOf<Scalar, kVectorBytes>::type;

// Entries of a vector.
template <typename Scalar>
constexpr int lanes() {
  return kVectorBytes / sizeof(Scalar);
}

// Entries from one row to the next of a matrix with so many columns, so that whole tiles can be read and written.
template <typename Scalar>
constexpr int64_t padded(int64_t size) {
  constexpr int64_t kWide = kWideBytes / sizeof(Scalar);
  return (size + kWide - 1) / kWide * kWide + kWide * kColumns;
}

template <int kBytes = kVectorBytes, typename Scalar>
inline typename VectorOf<Scalar, kBytes>::type load(const Scalar* from) {
  return *reinterpret_cast<const typename VectorOf<Scalar, kBytes>::type*>(from);
}
template <int kBytes = kVectorBytes, typename Scalar>
inline void store(Scalar* to, typename VectorOf<Scalar, kBytes>::type value) {
  *reinterpret_cast<typename VectorOf<Scalar, kBytes>::type*>(to) = value;
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

// Sums a row times `other` of each place in double; eight sums side by side, so that they need not wait for each other.
template <typename Scalar, typename Other>
inline double dot(const Scalar* row, int64_t size, Other other) {
  double sums[8] = {};
  int64_t j = 0;
  for (; j + 8 <= size; j += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += row[j + lane] * other(j + lane);
  }
  double total = 0;
  for (; j < size; ++j) total += row[j] * other(j);
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace cap_hf
