// The damped Fisher of one block in double, as cap_hf/method/fisher.py and prior.py make it in PyTorch: from its sums,
// of which little more than the lower half is stored, and from the second moments of its inputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cap_hf {

// Some rows of the sums of all blocks: `data` holds those from `start` to `stop` of a block after the other, and of
// each the columns before `stop`.
template <typename Scalar>
struct Strip {
  const Scalar* data;
  int64_t start, stop;
};

// The second moments that blocks are mixed with; a block consists of `rows` parts, each with a moment of its own.
struct Moments {
  const double* data;    // (moments, size, size)
  const double* traces;  // (moments,)
  int64_t rows, size;
};

// Writes `(1 - strength) F + damp I` of a block, F its sums over `count`, plus for each part `strength` times its
// moment at `places`, scaled to the trace of its part of F.
template <typename Scalar>
void assemble(const std::vector<Strip<Scalar>>& strips, int64_t block, double count, double strength,
              const Moments& moments, const int64_t* places, double damp, int64_t size, double* out) {
  const double factor = (1 - strength) / count;
  for (const Strip<Scalar>& strip : strips) {
    const Scalar* from = strip.data + block * (strip.stop - strip.start) * strip.stop;
    for (int64_t i = strip.start; i < strip.stop; ++i, from += strip.stop) {
      double* row = out + i * size;
      for (int64_t j = 0; j < strip.stop; ++j) row[j] = factor * from[j];
    }
  }
  for (int64_t part = 0; part < moments.rows; ++part) {
    const int64_t first = part * moments.size, last = first + moments.size;
    double trace = 0;
    for (int64_t i = first; i < last; ++i) trace += out[i * size + i];
    const double whole = moments.traces[places[part]];
    // Inputs that are all 0 have no gradient: they get no prior, whatever their moment of 0 is multiplied by.
    const double scale = strength / (1 - strength) * trace / (whole == 0 ? 1 : whole);
    const double* moment = moments.data + places[part] * moments.size * moments.size;
    for (const Strip<Scalar>& strip : strips) {
      for (int64_t i = std::max(first, strip.start); i < std::min(last, strip.stop); ++i) {
        const double* from = moment + (i - first) * moments.size;
        double* row = out + i * size + first;
        const int64_t columns = std::min(last, strip.stop) - first;
        for (int64_t j = 0; j < columns; ++j) row[j] += scale * from[j];
      }
    }
  }
  constexpr int64_t kTile = 8;
  for (const Strip<Scalar>& strip : strips) {
    for (int64_t i = strip.start; i < strip.stop; i += kTile) {
      const int64_t rows = std::min(kTile, strip.stop - i);
      for (int64_t j = 0; j < strip.start; j += kTile) {
        const int64_t columns = std::min(kTile, strip.start - j);
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t r = 0; r < rows; ++r) out[(j + c) * size + i + r] = out[(i + r) * size + j + c];
        }
      }
    }
  }
  for (int64_t i = 0; i < size; ++i) out[i * size + i] += damp;
}

}  // namespace cap_hf
