// Attention of one head in int8, y = softmax(scale q k^T) v: what it works on. Nothing of PyTorch is included here.
//
//   q, k     quantised per token; the mean key is taken off the keys before, which adds the same to all scores of a
//            query and so changes no weight (SageAttention, arXiv 2410.02367, section 4.2)
//   weights  of the softmax, before they are divided by their sum: 0 to 65535, where 65535 is a query's largest. Eight
//            bits would lose what many small ones add up to, so each weight is two bytes, and v is multiplied twice.
//   v        quantised per channel
#pragma once

#include <cstdint>

#include "sparse_linear.h"

namespace cap_hf {

constexpr int64_t kMostKeys = 0x7fffffff / 65535; // their weights are added up in 32 bits

// One head of one image. Strides are floats from one token to the next.
struct Head {
  const float* q;
  const float* k;
  const float* v;
  float* y;
  int64_t q_stride, k_stride, v_stride, y_stride;
  int64_t queries, keys; // of the whole head, however many queries a call of it computes
  int64_t cols; // numbers of a query, a key, a value
  float scale;  // positive
};

inline int64_t padded(int64_t size) { return (size + kTile - 1) / kTile * kTile; }

// Words of working memory that a head takes, which start at a cache line.
inline int64_t attention_words(int64_t keys, int64_t cols) {
  const int64_t words = (cols + 3) / 4, key_words = (keys + 3) / 4;
  return words * padded(keys) + key_words * padded(cols) // k and v
         + words * kTile + padded(keys) * kTile          // q and the scores of a tile
         + 2 * key_words * kTile + 2 * padded(cols) * kTile // the weights' two bytes, and the sums of either
         + 2 * padded(keys) + 2 * padded(cols);
}

} // namespace cap_hf
