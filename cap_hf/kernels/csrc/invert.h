// The inverse of one positive definite block in float, and how far it can be trusted, in memory that stays in the
// cache.
//
// A weight is swept after the other, as in Gauss and Jordan's method: sweeping all of them makes -A^-1 of A. Sweeping p
// takes c c' / d from A, where c is the column and d the diagonal entry at p, but for the row and column of p, which
// become c / d, and -1 / d on the diagonal. Entries at p come out like all others if they are taken for 0 before, and
// c / root(d) at p for -1 / root(d): so a panel of sweeps is one matrix product, on the lower half of A alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "tiles.h"

namespace cap_hf {

// The working memory of a thread, for blocks of one size, and the inversion in it.
class Inverter {
  static constexpr int kLanes = lanes<float>();

 public:
  explicit Inverter(int64_t size)
      : size_(size), stride_(padded<float>(size)), a_(size * stride_ + kLanes * kColumns),
        panel_(kPanel * stride_ + kLanes * kColumns), solved_(size) {}

  // Writes the inverse of `scale` times `matrix`, both `size` x `size`. Returns the largest error of what was inverted
  // times `inverse` times a vector of ones and minus ones, relative to that vector's length; infinity, and zeros for
  // the inverse, if a pivot was not positive and finite.
  double run(const double* matrix, double scale, float* inverse) {
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t j = 0; j <= i; ++j) a_[i * stride_ + j] = static_cast<float>(scale * matrix[i * size_ + j]);
    }
    for (int64_t start = 0; start < size_; start += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, size_ - start);
      take_rows(start, width);
      for (int64_t k = 0; k < width; ++k) {
        if (!sweep(start, k)) {
          std::fill_n(inverse, size_ * size_, 0.0f);
          return std::numeric_limits<double>::infinity();
        }
      }
      int64_t i = 0;
      for (; i + kRows <= size_; i += kRows) update_rows<kRows>(i, width);
      for (; i < size_; ++i) update_rows<1>(i, width);
    }
    write(inverse);
    return error(matrix, scale, inverse);
  }

 private:
  // Copies the rows of the panel's pivots, whole, from the lower half of A, and leaves 0 in these rows and columns.
  void take_rows(int64_t start, int64_t width) {
    for (int64_t k = 0; k < width; ++k) {
      float* row = &a_[(start + k) * stride_];
      std::copy_n(row, start + k + 1, &panel_[k * stride_]);
      std::fill(&panel_[k * stride_] + size_, &panel_[k * stride_] + stride_, 0.0f);
    }
    for (int64_t i = start; i < size_; ++i) {
      float* row = &a_[i * stride_ + start];
      const int64_t below = std::min(width, i - start);
      for (int64_t k = 0; k < below; ++k) panel_[k * stride_ + i] = row[k];
      std::fill_n(row, std::min(width, i - start + 1), 0.0f);
    }
    for (int64_t k = 0; k < width; ++k) std::fill_n(&a_[(start + k) * stride_], start, 0.0f);
  }

  // Makes the panel's k-th row the column of A at its pivot as it is after the sweeps before, divided by the root of d.
  bool sweep(int64_t start, int64_t k) {
    const int64_t pivot = start + k;
    float at_pivot[kPanel];
    float* column = &panel_[k * stride_];
    for (int64_t j = 0; j < k; ++j) {
      at_pivot[j] = panel_[j * stride_ + pivot];
      column[start + j] = 0;
    }
    constexpr int kStep = 4;
    int64_t i = 0;
    for (; i + kStep * kLanes <= size_; i += kStep * kLanes) subtract<kStep>(i, k, column, at_pivot);
    for (; i < size_; i += kLanes) subtract<1>(i, k, column, at_pivot);
    const float d = column[pivot];
    if (!(d > 0) || !std::isfinite(d)) return false;
    const float scale = 1 / std::sqrt(d);
    for (i = 0; i < size_; i += kLanes) store(column + i, load(column + i) * scale);
    for (int64_t j = 0; j < k; ++j) panel_[j * stride_ + pivot] = 0;
    column[pivot] = -scale;
    return std::isfinite(scale);
  }

  template <int kStep>
  void subtract(int64_t i, int64_t k, float* column, const float* at_pivot) {
    Vector<float> sum[kStep];
    for (int v = 0; v < kStep; ++v) sum[v] = load(column + i + v * kLanes);
    const float* past = &panel_[i];
    for (int64_t j = 0; j < k; ++j, past += stride_) {
      for (int v = 0; v < kStep; ++v) sum[v] -= at_pivot[j] * load(past + v * kLanes);
    }
    for (int v = 0; v < kStep; ++v) store(column + i + v * kLanes, sum[v]);
  }

  // Brings some rows of the lower half up to date with a whole panel.
  template <int kHeight>
  void update_rows(int64_t i, int64_t width) {
    for (int64_t j = 0; j < i + kHeight; j += kColumns * kLanes) {
      Vector<float> sum[kHeight][kColumns];
      for (int r = 0; r < kHeight; ++r) {
        for (int c = 0; c < kColumns; ++c) sum[r][c] = load(&a_[(i + r) * stride_ + j + c * kLanes]);
      }
      subtract_products<float, kHeight>(sum, panel_.data(), stride_, width, i, j);
      for (int r = 0; r < kHeight; ++r) {
        for (int c = 0; c < kColumns; ++c) store(&a_[(i + r) * stride_ + j + c * kLanes], sum[r][c]);
      }
    }
  }

  // Writes what has been swept, with its sign changed, and its mirror image.
  void write(float* inverse) const {
    constexpr int64_t kTile = 16;
    for (int64_t i = 0; i < size_; i += kTile) {
      const int64_t rows = std::min(kTile, size_ - i);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j <= i + r; ++j) inverse[(i + r) * size_ + j] = -a_[(i + r) * stride_ + j];
      }
      for (int64_t j = 0; j < i + rows; j += kTile) {
        const int64_t columns = std::min(kTile, i + rows - j);
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t r = 0; r < rows; ++r) {
            if (j + c < i + r) inverse[(j + c) * size_ + i + r] = inverse[(i + r) * size_ + j + c];
          }
        }
      }
    }
  }

  double error(const double* matrix, double scale, const float* inverse) {
    const auto sign = [](int64_t i) { return i % 2 ? 1.0 : -1.0; };
    for (int64_t i = 0; i < size_; ++i) {
      solved_[i] = dot(inverse + i * size_, size_, [&](int64_t j) { return sign(j); });
    }
    double largest = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const double made = scale * dot(matrix + i * size_, size_, [&](int64_t j) { return solved_[j]; });
      if (!std::isfinite(made)) return std::numeric_limits<double>::infinity();
      largest = std::max(largest, std::abs(made - sign(i)));
    }
    return largest / std::sqrt(std::max<double>(1, size_));
  }

  int64_t size_, stride_;
  std::vector<float> a_, panel_;
  std::vector<double> solved_;
};

}  // namespace cap_hf
