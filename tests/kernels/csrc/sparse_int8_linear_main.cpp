// The sparse int8 product against sums one by one, over odd shapes and all instruction sets, with two threads; compiled
// with the address and undefined-behaviour sanitizers by tests/kernels/test_sparse_int8_linear.py, to find what reads
// or writes outside. Exit code 0 if all agree.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "int8_instruction_sets.h"

namespace {

// W is all in one column block and in the order of its rows, every word stored; vectors are as long as they must be.
bool check(const char* name, int64_t tokens, int64_t rows, int64_t cols) {
  std::mt19937 random(tokens * 1000003 + rows * 1009 + cols);
  const int64_t words = (cols + 3) / 4, row_block = (rows + 3) / 4 * 4;
  std::vector<int8_t> dense(rows * words * 4);
  std::vector<float> x(tokens * cols), scales(rows), bias(rows), y(tokens * rows, NAN);
  std::vector<int32_t> corrections(rows), starts{0};
  for (int64_t r = 0; r < rows; ++r) {
    scales[r] = 0.5f + r;
    bias[r] = float(r % 5);
    for (int64_t c = 0; c < cols; ++c) {
      dense[r * words * 4 + c] = int8_t(int(random() % 255) - 127);
      corrections[r] -= 128 * dense[r * words * 4 + c];
    }
  }
  // Whole numbers, the largest 127 in every token: their scale is 1 and nothing is rounded.
  for (int64_t i = 0; i < tokens * cols; ++i) x[i] = i % cols == 0 ? 127.0f : float(int(random() % 255) - 127);
  std::vector<int32_t> values;
  std::vector<uint16_t> offsets;
  std::vector<int16_t> order;
  for (int64_t slice = 0; slice < row_block / 4; ++slice) {
    for (int64_t word = 0; word < words; ++word)
      for (int64_t r = slice * 4; r < slice * 4 + 4; ++r) {
        int32_t four = 0;
        if (r < rows) std::memcpy(&four, &dense[(r * words + word) * 4], 4);
        values.push_back(four);
        offsets.push_back(word * 16);
      }
    starts.push_back(starts.back() + words);
    for (int i = 0; i < 4; ++i) order.push_back(slice * 4 + i);
  }
  values.shrink_to_fit();
  offsets.shrink_to_fit();
  const cap_hf::SparseWeight<int32_t> weight{rows,           words,          row_block,     words,
                                             values.data(),  offsets.data(), starts.data(), order.data()};
  cap_hf::Scales<int32_t> all{corrections.data(), scales.data(), bias.data()};
  const int64_t tiles = cap_hf::Product<int32_t>::tiles(tokens);
  std::vector<int32_t> buffer(tiles * words * cap_hf::kTile);
  std::vector<float> of_tokens(tiles * cap_hf::kTile);
  std::vector<std::atomic<uint8_t>> ready(tiles);
  const auto run = [&](const cap_hf::Input& input, const cap_hf::Output& output) {
    for (auto& each : ready) each = 0;
    const std::vector<cap_hf::Part<int32_t>> parts{{{weight, all}, output}};
    cap_hf::Product<int32_t> product(*cap_hf::int8_kernels_named(name), parts, input, buffer.data(), of_tokens.data(),
                                     ready.data(), 3);
    std::thread other([&] { product.work(1); });
    product.work(0);
    other.join();
  };
  run({x.data(), cols, tokens, false}, {y.data(), false});
  // Tiled, on either side, it must be the same.
  const auto place = [](int64_t token, int64_t col, int64_t size) {
    return (token / cap_hf::kTile * size + col) * cap_hf::kTile + token % cap_hf::kTile;
  };
  std::vector<float> tiled_x(tiles * cap_hf::kTile * cols), tiled_y(tiles * cap_hf::kTile * rows, NAN);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < cols; ++c) tiled_x[place(t, c, cols)] = x[t * cols + c];
  run({tiled_x.data(), cols, tokens, true}, {tiled_y.data(), true});
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r)
      if (tiled_y[place(t, r, rows)] != y[t * rows + r]) {
        std::printf("%s: token %ld row %ld of %ld x %ld x %ld differs if tiled\n", name, long(t), long(r), long(tokens),
                    long(rows), long(cols));
        return false;
      }
  // Each token as a patch of an image with one row for each, it must be the same.
  const cap_hf::Patches patches{1, tokens, cols, 1, cols};
  std::vector<float> of_patches(tokens * rows, NAN);
  run({x.data(), cols, tokens, false, {}, &patches}, {of_patches.data(), false});
  // After LayerNorm, with factors and added to something, what the same steps one by one give.
  std::vector<float> weights(cols, 1.5f), biases(cols, 0.25f), factors(rows, 0.75f), added(tokens * rows, 3.0f);
  std::vector<float> normal(tokens * cols), one_by_one(tokens * rows, NAN), at_once(tokens * rows, NAN);
  const cap_hf::Norm norm{weights.data(), biases.data(), 1e-6f};
  cap_hf::int8_kernels_named(name)->normalise(x.data(), tokens, cols, norm, normal.data());
  run({normal.data(), cols, tokens, false}, {one_by_one.data(), false});
  all.factors = factors.data();
  run({x.data(), cols, tokens, false, norm}, {at_once.data(), false, added.data()});
  for (int64_t i = 0; i < tokens * rows; ++i)
    if (of_patches[i] != y[i] || at_once[i] != added[i] + one_by_one[i] * factors[i % rows]) {
      std::printf("%s: number %ld of %ld x %ld x %ld differs with patches or LayerNorm\n", name, long(i), long(tokens),
                  long(rows), long(cols));
      return false;
    }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      int64_t sum = 0;
      for (int64_t c = 0; c < cols; ++c) sum += int64_t{dense[r * words * 4 + c]} * int64_t(x[t * cols + c]);
      const double expected = double(sum) * scales[r] + bias[r];
      if (!(std::fabs(expected - y[t * rows + r]) <= 1e-6 * std::fabs(expected) + 1e-6)) {
        std::printf("%s: token %ld row %ld of %ld x %ld x %ld: %.9g is not %.9g\n", name, long(t), long(r),
                    long(tokens), long(rows), long(cols), y[t * rows + r], expected);
        return false;
      }
    }
  return true;
}

} // namespace

int main() {
  int sets = 0;
  for (const char* name : {"portable", "avx2", "avx_vnni", "avx512_vnni"}) {
    if (cap_hf::int8_kernels_named(name) == nullptr) continue;
    ++sets;
    for (int64_t tokens : {1, 15, 16, 17, 31, 32, 33, 70})
      for (int64_t rows : {1, 3, 4, 17, 50})
        for (int64_t cols : {1, 2, 3, 4, 16, 37, 63, 64, 65, 130})
          if (!check(name, tokens, rows, cols)) return 1;
  }
  std::printf("%d instruction sets agree\n", sets);
  return 0;
}
