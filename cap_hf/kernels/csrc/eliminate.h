// The greedy elimination of one block, as cap_hf/method/elimination.py does it in PyTorch, in memory that stays in the
// cache.
//
// The inverse A loses rank one with every removed weight. A panel is a number of steps in which only the pivots'
// columns of the current A are formed. After it one matrix product brings A up to date, for the weights that are left
// alone and packed together, so that every panel works on less memory than the one before.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "tiles.h"

namespace cap_hf {

// The working memory of a thread, for blocks of one size, and the elimination in it, in float or double.
template <typename Scalar>
class Eliminator {
  static constexpr int kLanes = lanes<Scalar>();
  typedef cap_hf::Vector<Scalar> Vector;
  typedef typename VectorOf<Scalar, kWideBytes>::type Wide;
  static constexpr int kWideLanes = kWideBytes / sizeof(Scalar);

 public:
  explicit Eliminator(int64_t size)
      : stride_(padded<Scalar>(size)),
        a_(std::max<int64_t>(0, size - kPanel) * stride_ + kLanes * kColumns),
        panel_(kPanel * stride_ + kLanes * kColumns),
        row_(stride_), w_(stride_), diagonal_(stride_), scores_(stride_), gate_(stride_),
        position_(size), left_(size), given_(size), taken_(size) {}

  // Does `steps` removals: of units of `unit` consecutive weights of the `size`, 1 for single ones. At most `limit` of
  // `group` consecutive ones go (group 0: any number). Returns whether every pivot was positive and finite.
  bool run(const Scalar* weights, const Scalar* inverse, int64_t size, int64_t steps, int64_t group, int64_t limit,
           int64_t unit, int64_t* order, Scalar* losses) {
    if (unit == 2) return run_units<2>(weights, inverse, size, steps, group, limit, order, losses);
    if (unit == 4) return run_units<4>(weights, inverse, size, steps, group, limit, order, losses);
    if (unit == 8) return run_units<8>(weights, inverse, size, steps, group, limit, order, losses);
    return run_units<1>(weights, inverse, size, steps, group, limit, order, losses);
  }

 private:
  template <int kUnit>
  bool run_units(const Scalar* weights, const Scalar* inverse, int64_t size, int64_t steps, int64_t group,
                 int64_t limit, int64_t* order, Scalar* losses) {
    static_assert(kPanel % kUnit == 0 && kWideLanes % kUnit == 0, "units are whole in panels and in vectors");
    steps *= kUnit;
    std::copy_n(weights, size, w_.begin());
    std::fill(w_.begin() + size, w_.end(), Scalar{0});
    std::fill(gate_.begin(), gate_.end(), kNever);
    for (int64_t i = 0; i < size; ++i) {
      position_[i] = i;
      const Scalar* own = weights + i / kUnit * kUnit;
      gate_[i] = std::all_of(own, own + kUnit, [](Scalar w) { return w == 0; }) ? kFirst : kLive;
    }
    std::fill(given_.begin(), given_.end(), 0);
    // The first panel reads the caller's matrix; after it, what is left of A is packed into a_.
    const Scalar* a = inverse;
    int64_t a_stride = size;
    int64_t count = size;  // weights that A still holds
    for (int64_t start = 0; start < steps; start += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, steps - start);
      for (int64_t i = 0; i < count; ++i) diagonal_[i] = a[i * a_stride + i];
      std::fill(diagonal_.begin() + count, diagonal_.end(), Scalar{1});
      take_own<kUnit>(a, a_stride, count);
      int64_t first = 0;
      for (int64_t k = 0; k < width; ++k) {
        if (k % kUnit == 0) first = cheapest<kUnit>(count);
        if (first < 0) return false;
        const int64_t pivot = first + k % kUnit;
        const Scalar root = std::sqrt(diagonal_[pivot]);
        const Scalar cost = w_[pivot] / root, loss = cost * cost / 2;
        if (!(diagonal_[pivot] > 0) || !std::isfinite(loss)) return false;
        std::copy_n(a + pivot * a_stride, count, row_.begin());
        form_column(pivot, k, count, root, cost);
        update_own<kUnit>(k, count);
        w_[pivot] = 0;
        diagonal_[pivot] = 1;
        gate_[pivot] = kNever;
        pivots_[k] = pivot;
        if (group && ++given_[position_[pivot] / group] == limit) close(position_[pivot] / group, group, count);
        if (k % kUnit == 0) {
          order[(start + k) / kUnit] = position_[pivot] / kUnit;
          losses[(start + k) / kUnit] = loss;
        } else {
          losses[(start + k) / kUnit] += loss;
        }
      }
      if (start + width < steps) {
        count = shrink(a, a_stride, count, width);
        a = a_.data();
        a_stride = stride_;
      }
    }
    return true;
  }

  // Added to a unit's cost: it may be removed, it is 0 and goes before all others, or it stays.
  static constexpr Scalar kLive = 0, kFirst = -1, kNever = std::numeric_limits<Scalar>::infinity();

  // Returns the first weight of the unit whose removal costs least, the first of equals; -1 if every cost is infinite or
  // not a number.
  template <int kUnit>
  int64_t cheapest(int64_t count) {
    constexpr int kBytes = kUnit == 1 ? kVectorBytes : kWideBytes, kEntries = kBytes / sizeof(Scalar);
    typedef typename VectorOf<Scalar, kBytes>::type Any;
    Any least = Any{} + kNever;
    for (int64_t i = 0; i < count; i += kEntries) {
      const Any score = cost_of<kUnit, kBytes>(i) + load<kBytes>(&gate_[i]);
      store<kBytes>(&scores_[i], score);
      least = score < least ? score : least;
    }
    Scalar lowest = kNever;
    for (int lane = 0; lane < kEntries; ++lane) lowest = std::min(lowest, least[lane]);
    if (lowest == kNever) return -1;
    int64_t found = 0;
    while (scores_[found] != lowest) ++found;
    return found;
  }

  // Twice the loss of the removal of each unit of a vector, in all of its lanes: w' A^-1 w of the unit's own part of A,
  // one weight of it after the other.
  template <int kUnit, int kBytes>
  typename VectorOf<Scalar, kBytes>::type cost_of(int64_t i) const {
    typedef typename VectorOf<Scalar, kBytes>::type Any;
    Any w = load<kBytes>(&w_[i]);
    if constexpr (kUnit == 1) {
      return w * w / load<kBytes>(&diagonal_[i]);
    } else {
      Any own[kUnit], cost{};
      for (int c = 0; c < kUnit; ++c) own[c] = load<kBytes>(&own_[c * stride_ + i]);
      for (int first = 0; first < kUnit; ++first) {
        const Any pivot = spread<kUnit>(own[first], first), value = spread<kUnit>(w, first);
        const Any share = own[first] / pivot;
        cost += value * value / pivot;
        w -= share * value;
        for (int c = first + 1; c < kUnit; ++c) own[c] -= share * spread<kUnit>(own[first], c);
      }
      return cost;
    }
  }

  // Returns what each unit of a vector has at one of its places, in all lanes of the unit.
  template <int kUnit>
  static Wide spread(Wide from, int place) {
    Wide to;
    for (int lane = 0; lane < kWideLanes; ++lane) to[lane] = from[lane / kUnit * kUnit + place];
    return to;
  }

  // Copies each unit's own part of A: for the c-th column of it a row of own_, as long as w_.
  template <int kUnit>
  void take_own(const Scalar* a, int64_t a_stride, int64_t count) {
    if constexpr (kUnit > 1) {
      own_.assign(kUnit * stride_, Scalar{0});
      for (int c = 0; c < kUnit; ++c) {
        Scalar* own = &own_[c * stride_];
        for (int64_t i = 0; i < count; ++i) own[i] = a[i * a_stride + i / kUnit * kUnit + c];
        // What is past the last weight is a unit matrix, so that nothing is divided by 0.
        for (int64_t i = count; i < stride_; ++i) own[i] = i % kUnit == c;
      }
    }
  }

  // Brings each unit's own part of A up to date with the k-th column.
  template <int kUnit>
  void update_own(int64_t k, int64_t count) {
    if constexpr (kUnit > 1) {
      for (int64_t i = 0; i < count; i += kWideLanes) {
        const Wide column = load<kWideBytes>(&panel_[k * stride_ + i]);
        for (int c = 0; c < kUnit; ++c) {
          Scalar* own = &own_[c * stride_ + i];
          store<kWideBytes>(own, load<kWideBytes>(own) - column * spread<kUnit>(column, c));
        }
      }
    }
  }

  // Keeps the other weights of a group that has given up as many as it may.
  void close(int64_t number, int64_t group, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (position_[i] / group == number) gate_[i] = kNever;
    }
  }

  // Forms the pivot's column of the current A, divided by the root of its diagonal entry, and updates w and the
  // diagonal with it.
  void form_column(int64_t pivot, int64_t k, int64_t count, Scalar root, Scalar cost) {
    Scalar at_pivot[kPanel];
    for (int64_t j = 0; j < k; ++j) at_pivot[j] = panel_[j * stride_ + pivot];
    const Scalar* row = row_.data();
    Scalar* column = &panel_[k * stride_];
    const Scalar scale = Scalar{1} / root;
    constexpr int kStep = 4;
    int64_t i = 0;
    for (; i + kStep * kLanes <= count; i += kStep * kLanes) form_part<kStep>(i, k, row, column, at_pivot, scale, cost);
    for (; i < count; i += kLanes) form_part<1>(i, k, row, column, at_pivot, scale, cost);
  }

  template <int kStep>
  void form_part(int64_t i, int64_t k, const Scalar* row, Scalar* column, const Scalar* at_pivot, Scalar scale,
                 Scalar cost) {
    Vector sum[kStep];
    for (int v = 0; v < kStep; ++v) sum[v] = load(row + i + v * kLanes);
    const Scalar* past = &panel_[i];
    for (int64_t j = 0; j < k; ++j, past += stride_) {
      for (int v = 0; v < kStep; ++v) sum[v] -= at_pivot[j] * load(past + v * kLanes);
    }
    for (int v = 0; v < kStep; ++v) {
      const int64_t at = i + v * kLanes;
      sum[v] *= scale;
      store(column + at, sum[v]);
      store(&w_[at], load(&w_[at]) - sum[v] * cost);
      store(&diagonal_[at], load(&diagonal_[at]) - sum[v] * sum[v]);
    }
  }

  // Brings A up to date with a whole panel, for the weights that are left, which are packed into the first rows and
  // columns. Returns how many there are.
  int64_t shrink(const Scalar* a, int64_t a_stride, int64_t count, int64_t width) {
    std::fill(taken_.begin(), taken_.end(), false);
    for (int64_t k = 0; k < width; ++k) taken_[pivots_[k]] = true;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!taken_[i]) left_[kept++] = i;
    }
    for (int64_t i = 0; i < kept; ++i) {
      w_[i] = w_[left_[i]];
      gate_[i] = gate_[left_[i]];
      position_[i] = position_[left_[i]];
    }
    std::fill(w_.begin() + kept, w_.begin() + count, Scalar{0});
    std::fill(gate_.begin() + kept, gate_.begin() + count, kNever);
    for (int64_t k = 0; k < width; ++k) {
      Scalar* column = &panel_[k * stride_];
      for (int64_t i = 0; i < kept; ++i) column[i] = column[left_[i]];
    }
    // Packing moves rows up and columns to the left, and a tile is read before it is written, so nothing that is read
    // later is overwritten. Only tiles below the diagonal are computed; the upper half is their mirror image.
    int64_t i = 0;
    for (; i + kRows <= kept; i += kRows) update_rows<kRows>(a, a_stride, i, width);
    for (; i < kept; ++i) update_rows<1>(a, a_stride, i, width);
    mirror(kept);
    return kept;
  }

  template <int kHeight>
  void update_rows(const Scalar* a, int64_t a_stride, int64_t i, int64_t width) {
    constexpr int64_t kWide = kColumns * kLanes;
    Scalar packed[kHeight][kWide];
    for (int64_t j = 0; j < i + kHeight; j += kWide) {
      const int64_t real = std::min<int64_t>(kWide, i + kHeight - j);
      for (int r = 0; r < kHeight; ++r) {
        const Scalar* row = a + left_[i + r] * a_stride;
        for (int64_t c = 0; c < real; ++c) packed[r][c] = row[left_[j + c]];
      }
      Vector sum[kHeight][kColumns];
      for (int r = 0; r < kHeight; ++r) {
        for (int c = 0; c < kColumns; ++c) sum[r][c] = load(&packed[r][c * kLanes]);
      }
      subtract_products<Scalar, kHeight>(sum, panel_.data(), stride_, width, i, j);
      for (int r = 0; r < kHeight; ++r) {
        for (int c = 0; c < kColumns; ++c) store(&packed[r][c * kLanes], sum[r][c]);
        std::copy_n(packed[r], real, &a_[(i + r) * stride_ + j]);
      }
    }
  }

  void mirror(int64_t count) {
    constexpr int64_t kTile = 8;
    for (int64_t i = 0; i < count; i += kTile) {
      const int64_t rows = std::min(kTile, count - i);
      for (int64_t j = 0; j <= i; j += kTile) {
        const int64_t columns = std::min(kTile, count - j);
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t r = 0; r < rows; ++r) {
            if (j + c < i + r) a_[(j + c) * stride_ + i + r] = a_[(i + r) * stride_ + j + c];
          }
        }
      }
    }
  }

  int64_t stride_;
  std::vector<Scalar> a_, panel_, row_, w_, diagonal_, scores_, gate_, own_;
  std::vector<int64_t> position_, left_, given_;
  std::vector<uint8_t> taken_;
  int64_t pivots_[kPanel];
};

}  // namespace cap_hf
