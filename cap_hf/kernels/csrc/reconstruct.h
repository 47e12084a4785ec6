// The weights that stay of one block, for several numbers of them, from one Cholesky factor in memory that stays in the
// cache.
//
// Survivors S of weights w have F_SS w'_S = (F w)_S. Each number of survivors takes the first so many of one order, so
// its F_SS is a leading part of the largest one, and the upper factor of that, U with U' U = F_SS, begins with its
// factor. Beside U stands y with U' y = F w, as one more column: what is left for each number is to solve U w' = y from
// its last survivor up. Every entry comes out of the same operations however large the largest F_SS is: so what comes
// out for one number does not depend on the others, to the bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tiles.h"

namespace cap_hf {

// The working memory of a thread, for blocks of one size, and the solving in it.
class Reconstructor {
  static constexpr int kLanes = lanes<double>();

 public:
  explicit Reconstructor(int64_t size)
      : size_(size), factor_(size * padded<double>(size + 1) + kLanes * kColumns), solved_(size) {}

  // Writes the new weights of each time to `out`, `stride` entries after those of the time before.
  //
  // index: all places of the block, those of the last survivors first. counts: of each time, how many survive, `step`
  // entries after each other. Returns what LAPACK calls info: 0, or which pivot was not positive and finite.
  int32_t run(const double* weights, const double* matrix, const int64_t* index, const int64_t* counts, int64_t times,
              int64_t step, double* out, int64_t stride) {
    int64_t most = 0;
    for (int64_t time = 0; time < times; ++time) {
      std::fill_n(out + time * stride, size_, 0.0);
      if (moves(weights, index, counts[time * step])) most = std::max(most, counts[time * step]);
    }
    const int32_t info = most == 0 ? 0 : factorize(weights, matrix, index, most);
    if (info != 0) return info;
    for (int64_t time = 0; time < times; ++time) {
      const int64_t count = counts[time * step];
      const bool solves = moves(weights, index, count);
      if (solves) solve(count);
      for (int64_t i = 0; i < count; ++i) {
        out[time * stride + index[i]] = solves ? solved_[i] : weights[index[i]];
      }
    }
    return 0;
  }

 private:
  // Returns whether anything goes that was not 0: else everything stays as it is, to the bit.
  bool moves(const double* weights, const int64_t* index, int64_t count) const {
    return std::any_of(index + count, index + size_, [&](int64_t place) { return weights[place] != 0; });
  }

  // Makes U and y of the first `most` survivors, in rows, from the diagonal on.
  int32_t factorize(const double* weights, const double* matrix, const int64_t* index, int64_t most) {
    most_ = most;
    stride_ = padded<double>(most + 1);
    for (int64_t i = 0; i < most; ++i) {
      const double* from = matrix + index[i] * size_;
      double* row = &factor_[i * stride_];
      for (int64_t j = i; j < most; ++j) row[j] = from[index[j]];
      row[most] = dot(from, size_, [&](int64_t j) { return weights[j]; });
    }
    for (int64_t start = 0; start < most; start += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, most - start);
      for (int64_t k = 0; k < width; ++k) {
        if (!finish_row(start, k)) return static_cast<int32_t>(start + k + 1);
      }
      int64_t i = start + width;
      for (; i + kRows <= most; i += kRows) update_rows<kRows>(start, width, i);
      for (; i < most; ++i) update_rows<1>(start, width, i);
    }
    return 0;
  }

  // Takes from the panel's k-th row what those before it in the panel make, and divides it by the root of its pivot.
  // Left of the pivot there is nothing that is read.
  bool finish_row(int64_t start, int64_t k) {
    const int64_t pivot = start + k, end = most_ + 1;
    double at_pivot[kPanel];
    for (int64_t j = 0; j < k; ++j) at_pivot[j] = factor_[(start + j) * stride_ + pivot];
    double* row = &factor_[pivot * stride_];
    constexpr int kStep = 4;
    const int64_t first = pivot / kLanes * kLanes;
    int64_t i = first;
    for (; i + kStep * kLanes <= end; i += kStep * kLanes) subtract<kStep>(start, i, k, row, at_pivot);
    for (; i < end; i += kLanes) subtract<1>(start, i, k, row, at_pivot);
    const double d = row[pivot], root = std::sqrt(d), scale = 1 / root;
    if (!(d > 0) || !std::isfinite(root) || !std::isfinite(scale)) return false;
    for (i = first; i < end; i += kLanes) store(row + i, load(row + i) * scale);
    row[pivot] = root;
    return true;
  }

  template <int kStep>
  void subtract(int64_t start, int64_t i, int64_t k, double* row, const double* at_pivot) {
    Vector<double> sum[kStep];
    for (int v = 0; v < kStep; ++v) sum[v] = load(row + i + v * kLanes);
    const double* past = &factor_[start * stride_ + i];
    for (int64_t j = 0; j < k; ++j, past += stride_) {
      for (int v = 0; v < kStep; ++v) sum[v] -= at_pivot[j] * load(past + v * kLanes);
    }
    for (int v = 0; v < kStep; ++v) store(row + i + v * kLanes, sum[v]);
  }

  // Brings some rows after a panel up to date with all of it.
  template <int kHeight>
  void update_rows(int64_t start, int64_t width, int64_t i) {
    constexpr int64_t kTile = kColumns * kLanes;
    for (int64_t j = i / kTile * kTile; j <= most_; j += kTile) {
      Vector<double> sum[kHeight][kColumns];
      for (int r = 0; r < kHeight; ++r) {
        for (int c = 0; c < kColumns; ++c) sum[r][c] = load(&factor_[(i + r) * stride_ + j + c * kLanes]);
      }
      subtract_products<double, kHeight>(sum, &factor_[start * stride_], stride_, width, i, j);
      for (int r = 0; r < kHeight; ++r) {
        for (int c = 0; c < kColumns; ++c) store(&factor_[(i + r) * stride_ + j + c * kLanes], sum[r][c]);
      }
    }
  }

  // Solves for the first `count` survivors.
  void solve(int64_t count) {
    for (int64_t k = count - 1; k >= 0; --k) {
      const double *row = &factor_[k * stride_], *after = &solved_[k] + 1;
      solved_[k] = (row[most_] - dot(row + k + 1, count - k - 1, [&](int64_t j) { return after[j]; })) / row[k];
    }
  }

  int64_t size_, most_ = 0, stride_ = 0;
  std::vector<double> factor_, solved_;
};

}  // namespace cap_hf
