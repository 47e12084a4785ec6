// Attention in int8 against attention in doubles, over odd shapes and all instruction sets, in memory that is exactly as
// long as it must be; compiled with the address and undefined-behaviour sanitizers by
// tests/kernels/test_int8_attention.py, to find what reads or writes outside. Exit code 0 if all agree.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "int8_instruction_sets.h"

namespace {

bool check(const char* name, int64_t queries, int64_t keys, int64_t cols) {
  std::mt19937 random(queries * 1000003 + keys * 1009 + cols);
  std::normal_distribution<float> normal;
  std::vector<float> q(queries * cols), k(keys * cols), v(keys * cols), y(queries * cols, NAN);
  for (auto* x : {&q, &k, &v})
    for (float& number : *x) number = normal(random);
  std::vector<int32_t> memory(cap_hf::attention_words(keys, cols));
  const float scale = 1.0f / std::sqrt(float(cols));
  const cap_hf::Head head{q.data(), k.data(), v.data(), y.data(), cols, cols, cols, cols, queries, keys, cols,
                          scale};
  const auto* kernels = cap_hf::int8_kernels_named(name);
  kernels->attend(head, &head, 0, queries / 2, memory.data());
  kernels->attend(head, nullptr, queries / 2, queries, memory.data());
  for (int64_t i = 0; i < queries; ++i) {
    std::vector<double> weights(keys);
    double sum = 0;
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t c = 0; c < cols; ++c) weights[j] += double(q[i * cols + c]) * k[j * cols + c];
      sum += weights[j] = std::exp(weights[j] * scale);
    }
    for (int64_t c = 0; c < cols; ++c) {
      double expected = 0;
      for (int64_t j = 0; j < keys; ++j) expected += weights[j] / sum * v[j * cols + c];
      if (!(std::fabs(expected - y[i * cols + c]) <= 0.05)) {
        std::printf("%s: query %ld channel %ld of %ld, %ld, %ld: %g is not %g\n", name, long(i), long(c), long(queries),
                    long(keys), long(cols), y[i * cols + c], expected);
        return false;
      }
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
    for (int64_t queries : {1, 2, 15, 16, 17, 33, 70})
      for (int64_t keys : {1, 2, 3, 4, 5, 31, 32, 33, 70})
        for (int64_t cols : {1, 3, 4, 17, 32, 64, 72})
          if (!check(name, queries, keys, cols)) return 1;
  }
  std::printf("%d instruction sets agree\n", sets);
  return 0;
}
