// The operator cap_hf::int8_attention: attention of all heads on PyTorch's tensors and threads.
#pragma once

#include "int8_layer.h"

namespace cap_hf {

// Queries, keys or values of all images and heads: where they are, and floats from one to the next.
struct Heads {
  const float* start;
  int64_t image_stride, head_stride, token_stride;
};

// Writes softmax(scale q k^T) v to y [images][queries][heads][cols].
inline void attend_all(const Kernels<int32_t>& kernels, const Heads& q, const Heads& k, const Heads& v, float* y,
                       int64_t images, int64_t heads, int64_t queries, int64_t keys, int64_t cols, float scale) {
  // A head is split where there are fewer heads than threads; each part quantises the keys and values by itself.
  const int64_t tiles = (queries + kTile - 1) / kTile;
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads()) / std::max(images * heads, int64_t{1});
  const int64_t parts = std::clamp(wanted, int64_t{1}, std::max(tiles, int64_t{1}));
  const auto head_at = [&](int64_t number) {
    const int64_t image = number / heads, head = number % heads;
    const auto start = [&](const Heads& x) { return x.start + image * x.image_stride + head * x.head_stride; };
    return Head{start(q),       start(k),       start(v),     y + (image * queries * heads + head) * cols,
                q.token_stride, k.token_stride, v.token_stride, heads * cols,
                queries,        keys,           cols,         scale};
  };
  parallel_for(0, images * heads * parts, 1, [&](int64_t begin, int64_t end) {
    int32_t* memory = scratch<int32_t>(attention_words(keys, cols));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      const Head head = head_at(task / parts);
      const bool more = part == parts - 1 && task + 1 < end;
      const Head next = more ? head_at(task / parts + 1) : head;
      kernels.attend(head, more ? &next : nullptr, tiles * part / parts * kTile,
                     std::min(tiles * (part + 1) / parts * kTile, queries), memory);
    }
  });
}

// Returns q, k or v as float32 in which the numbers of a token are next to each other.
inline Tensor tokens_in_float(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float && x.stride(3) == 1 ? x : without_gaps(x, ScalarType::Float);
}

// Returns softmax(scale q k^T) v [images, queries, heads, cols] for q [images, heads, queries, cols] and k and v
// [images, heads, keys, cols].
inline Tensor int8_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                             int64_t instruction_set) {
  const char* name = "int8_attention";
  const auto& kernels = kernels_for(instruction_set);
  for (const Tensor* x : {&q, &k, &v}) {
    check(x->dim() == 4, name, ": q, k and v must have 4 dimensions, not ", x->dim());
    check_input(name, *x, x->size(3));
  }
  const int64_t images = q.size(0), heads = q.size(1), queries = q.size(2), cols = q.size(3), keys = k.size(2);
  bool fit = true;
  for (const Tensor* x : {&k, &v})
    fit = fit && x->size(0) == images && x->size(1) == heads && x->size(2) == keys && x->size(3) == cols;
  check(fit, name, ": q ", Sizes{q}, ", k ", Sizes{k}, " and v ", Sizes{v}, " do not fit each other");
  check(keys > 0 && keys <= kMostKeys && cols > 0 && cols <= kMostCols, name, ": k has shape ", Sizes{k});
  check(scale > 0, name, ": scale must be positive, not ", scale);
  const Tensor queries_in = tokens_in_float(q), keys_in = tokens_in_float(k), values_in = tokens_in_float(v);
  const Tensor y = make(queries_in, {images, queries, heads, cols});
  const auto heads_of = [](const Tensor& x) {
    return Heads{x.const_data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)};
  };
  attend_all(kernels, heads_of(queries_in), heads_of(keys_in), heads_of(values_in), y.mutable_data_ptr<float>(), images,
             heads, queries, keys, cols, static_cast<float>(scale));
  return without_gaps(y, q.scalar_type());
}

} // namespace cap_hf
