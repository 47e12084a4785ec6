// The sparse product against sums one by one, over odd shapes and all instruction sets, with two threads; compiled
// with the address and undefined-behaviour sanitizers by tests/kernels/test_sparse_linear.py. Exit code 0 if all agree.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "instruction_sets.h"

namespace {

struct Packed {
  std::vector<float> values;
  std::vector<uint16_t> offsets;
  std::vector<int32_t> starts{0};
  std::vector<int16_t> order;
};

// As cap_hf.inference.packing, one weight at a time. The vectors are exactly as long as they must be.
Packed pack(const std::vector<float>& dense, cap_hf::SparseWeight<float>& weight) {
  Packed packed;
  for (int64_t rb = 0; rb < weight.row_blocks(); ++rb)
    for (int64_t col = 0; col < weight.cols; col += weight.col_block) {
      std::vector<std::vector<int64_t>> columns(weight.row_block);
      for (int64_t r = 0; r < weight.row_block && rb * weight.row_block + r < weight.rows; ++r)
        for (int64_t c = col; c < std::min(col + weight.col_block, weight.cols); ++c)
          if (dense[(rb * weight.row_block + r) * weight.cols + c] != 0) columns[r].push_back(c);
      std::vector<int16_t> rows(weight.row_block);
      for (size_t r = 0; r < rows.size(); ++r) rows[r] = r;
      std::stable_sort(rows.begin(), rows.end(),
                       [&](int16_t a, int16_t b) { return columns[a].size() > columns[b].size(); });
      for (int64_t slice = 0; slice < weight.slices(); ++slice) {
        const int16_t* four = &rows[slice * 4];
        const size_t steps = columns[four[0]].size();
        for (size_t step = 0; step < steps; ++step)
          for (int i = 0; i < 4; ++i) {
            const bool there = step < columns[four[i]].size();
            const int64_t c = there ? columns[four[i]][step] : col;
            packed.values.push_back(there ? dense[(rb * weight.row_block + four[i]) * weight.cols + c] : 0.0f);
            packed.offsets.push_back((c - col) * 16);
          }
        packed.starts.push_back(packed.starts.back() + steps);
        packed.order.insert(packed.order.end(), four, four + 4);
      }
    }
  packed.values.shrink_to_fit();
  packed.offsets.shrink_to_fit();
  weight.values = packed.values.data();
  weight.offsets = packed.offsets.data();
  weight.starts = packed.starts.data();
  weight.order = packed.order.data();
  return packed;
}

bool check(const char* name, int64_t tokens, int64_t rows, int64_t cols, int64_t row_block, int64_t col_block,
           double density, bool with_bias) {
  std::mt19937 random(tokens * 1000003 + rows * 1009 + cols);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  std::vector<float> dense(rows * cols), x(tokens * cols), bias(rows), y(tokens * rows, NAN);
  for (float& w : dense) w = uniform(random) < density ? normal(random) : 0.0f;
  for (float& v : x) v = normal(random);
  for (float& v : bias) v = normal(random);
  cap_hf::SparseWeight<float> weight{rows, cols, row_block, col_block, nullptr, nullptr, nullptr, nullptr};
  const Packed packed = pack(dense, weight);
  const int64_t tiles = cap_hf::Product<float>::tiles(tokens);
  std::vector<float> buffer(tiles * cols * cap_hf::kTile);
  std::vector<std::atomic<uint8_t>> ready(tiles);
  const cap_hf::Scales<float> scales{with_bias ? bias.data() : nullptr, nullptr, nullptr};
  std::vector<float> of_tokens(tiles * cap_hf::kTile);
  const std::vector<cap_hf::Part<float>> parts{{{weight, scales}, {y.data(), false}}};
  cap_hf::Product<float> product(*cap_hf::kernels_named(name), parts, {x.data(), cols, tokens, false}, buffer.data(),
                                 of_tokens.data(), ready.data(), 3);
  std::thread other([&] { product.work(1); });
  product.work(0);
  other.join();
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = with_bias ? bias[r] : 0.0, size = 1.0;
      for (int64_t c = 0; c < cols; ++c) {
        sum += double{dense[r * cols + c]} * x[t * cols + c];
        size += std::fabs(double{dense[r * cols + c]} * x[t * cols + c]);
      }
      if (!(std::fabs(sum - y[t * rows + r]) <= 1e-6 * size)) {
        std::printf("%s: token %ld row %ld of %ld x %ld x %ld: %.9g is not %.9g\n", name, long(t), long(r),
                    long(tokens), long(rows), long(cols), y[t * rows + r], sum);
        return false;
      }
    }
  return true;
}

} // namespace

int main() {
  int sets = 0;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    if (cap_hf::kernels_named(name) == nullptr) continue;
    ++sets;
    for (int64_t tokens : {1, 15, 16, 17, 31, 32, 33, 70})
      for (int64_t rows : {1, 3, 4, 17, 50})
        for (int64_t cols : {1, 2, 16, 37})
          for (double density : {0.0, 0.2, 1.0})
            if (!check(name, tokens, rows, cols, rows > 16 ? 20 : 4, cols > 16 ? 10 : 64, density, tokens % 2)) return 1;
    if (!check(name, 40, 300, 5000, 128, 4095, 0.1, true)) return 1;
  }
  std::printf("%d instruction sets agree\n", sets);
  return 0;
}
