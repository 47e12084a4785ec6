// The operators cap_hf::sparse_int8_attention_branch and cap_hf::sparse_int8_mlp_branch: the two residual branches of a
// transformer's block with LayerNorm first, x + factors * f(LayerNorm(x)).
#pragma once

#include "int8_attention.h"
#include "int8_layer.h"

namespace cap_hf {

// LayerNorm, as the operators are told of it: weight and bias, float32 [cols].
inline Norm norm_of(const char* name, const Tensor& weight, const Tensor& bias, double epsilon, int64_t cols) {
  for (const Tensor* each : {&weight, &bias})
    check(each->scalar_type() == ScalarType::Float && each->is_contiguous() && each->numel() == cols, name,
          ": LayerNorm's weight and bias must be ", cols, " float32 numbers each");
  check(epsilon >= 0, name, ": LayerNorm's epsilon must not be negative");
  return {weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), static_cast<float>(epsilon)};
}

// A layer whose tensors are values, offsets, starts, order, row scales, corrections and, if there is one, the bias, and
// whose sizes are rows, cols, row_block and col_block.
class ListedLayer {
 public:
  ListedLayer(const char* name, const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes,
              bool gelu = false) {
    check((tensors.size() == 6 || tensors.size() == 7) && sizes.size() == 4, name,
          ": a layer is six tensors, or seven with a bias, and four sizes");
    const std::optional<Tensor> bias = tensors.size() == 7 ? std::optional<Tensor>(tensors[6]) : std::nullopt;
    layer_ = layer_of(name,
                      {tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], bias, sizes[0], sizes[1],
                       sizes[2], sizes[3]},
                      gelu, bias_);
    cols_ = sizes[1];
  }

  // Of a layer that takes `cols` numbers and gives `rows`.
  const Layer<int32_t>& checked(const char* name, int64_t rows, int64_t cols) const {
    check(layer_.weight.rows == rows && cols_ == cols, name, ": a layer of ", layer_.weight.rows, " x ", cols_,
          " must be ", rows, " x ", cols);
    return layer_;
  }
  int64_t rows() const { return layer_.weight.rows; }

  // LayerScale of its outputs, or none.
  void scale(const char* name, const std::optional<Tensor>& factors) {
    if (!factors) return;
    factors_ = float_bias(name, factors, rows());
    layer_.scales.factors = factors_->const_data_ptr<float>();
  }

 private:
  Layer<int32_t> layer_{};
  int64_t cols_ = 0;
  std::optional<Tensor> bias_, factors_; // what layer_ reads
};

// Throws unless x is float32 [images, tokens, cols] without gaps.
inline void check_residual(const char* name, const Tensor& x) {
  check(x.dim() == 3 && x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.size(2) > 0, name,
        ": x must be float32 [images, tokens, cols] without gaps");
}

// Returns x + factors * output(attention(query(n), key(n), value(n))), n = LayerNorm(x), for x [images, tokens, cols].
inline Tensor sparse_int8_attention_branch(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                           double epsilon, const std::vector<Tensor>& query_tensors,
                                           const std::vector<int64_t>& query_sizes,
                                           const std::vector<Tensor>& key_tensors,
                                           const std::vector<int64_t>& key_sizes,
                                           const std::vector<Tensor>& value_tensors,
                                           const std::vector<int64_t>& value_sizes, int64_t heads, double scale,
                                           const std::vector<Tensor>& output_tensors,
                                           const std::vector<int64_t>& output_sizes,
                                           const std::optional<Tensor>& factors, int64_t instruction_set) {
  const char* name = "sparse_int8_attention_branch";
  const auto& kernels = kernels_for(instruction_set);
  check_residual(name, x);
  const int64_t images = x.size(0), tokens = x.size(1), cols = x.size(2);
  const Norm norm = norm_of(name, norm_weight, norm_bias, epsilon, cols);
  const ListedLayer query(name, query_tensors, query_sizes), key(name, key_tensors, key_sizes),
      value(name, value_tensors, value_sizes);
  ListedLayer output(name, output_tensors, output_sizes);
  output.scale(name, factors);
  const int64_t inner = query.rows();
  check(heads > 0 && inner % heads == 0, name, ": ", inner, " rows are not ", heads, " heads of one size");
  check(scale > 0, name, ": scale must be positive, not ", scale);
  check(tokens <= kMostKeys, name, ": more than ", kMostKeys, " tokens");
  const Tensor y = make(x, sizes_of(x));
  if (x.numel() == 0) return y;
  const Tensor between = make(x, {4, images, tokens, inner}); // queries, keys, values, and what attention makes of them
  float* q = between.mutable_data_ptr<float>();
  const int64_t count = images * tokens;
  float *k = q + count * inner, *v = k + count * inner, *attended = v + count * inner;
  const float* from = x.const_data_ptr<float>();
  multiply_parts<int32_t>(kernels, {from, cols, count, false, norm},
                          {{query.checked(name, inner, cols), {q, false}},
                           {key.checked(name, inner, cols), {k, false}},
                           {value.checked(name, inner, cols), {v, false}}});
  const int64_t size = inner / heads;
  const auto heads_of = [&](const float* start) { return Heads{start, tokens * inner, size, inner}; };
  attend_all(kernels, heads_of(q), heads_of(k), heads_of(v), attended, images, heads, tokens, tokens, size,
             static_cast<float>(scale));
  multiply_parts<int32_t>(kernels, {attended, inner, count, false},
                          {{output.checked(name, cols, inner), {y.mutable_data_ptr<float>(), false, from}}});
  return y;
}

// Returns x + factors * second(gelu(first(LayerNorm(x)))) for x [images, tokens, cols].
inline Tensor sparse_int8_mlp_branch(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                     double epsilon, const std::vector<Tensor>& first_tensors,
                                     const std::vector<int64_t>& first_sizes,
                                     const std::vector<Tensor>& second_tensors,
                                     const std::vector<int64_t>& second_sizes, const std::optional<Tensor>& factors,
                                     int64_t instruction_set) {
  const char* name = "sparse_int8_mlp_branch";
  const auto& kernels = kernels_for(instruction_set);
  check_residual(name, x);
  const int64_t cols = x.size(2);
  const Norm norm = norm_of(name, norm_weight, norm_bias, epsilon, cols);
  const ListedLayer first(name, first_tensors, first_sizes, true);
  ListedLayer second(name, second_tensors, second_sizes);
  second.scale(name, factors);
  const Tensor y = make(x, sizes_of(x));
  const float* from = x.const_data_ptr<float>();
  multiply_parts<int32_t>(kernels, {from, cols, x.size(0) * x.size(1), false, norm},
                          {{first.checked(name, first.rows(), cols), {y.mutable_data_ptr<float>(), false, from}}},
                          &second.checked(name, cols, first.rows()));
  return y;
}

} // namespace cap_hf
