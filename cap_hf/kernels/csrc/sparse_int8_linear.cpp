// The operators of int8 on PyTorch's tensors and threads: cap_hf::sparse_int8_linear, the sparse product,
// cap_hf::sparse_int8_mlp, two of them with GELU between, cap_hf::quantize_tokens, which prepares a dense product, and
// those of int8_attention.h and int8_branches.h.
#include "int8_attention.h"
#include "int8_branches.h"
#include "int8_layer.h"

#include <tuple>

namespace {

using cap_hf::ScalarType;
using cap_hf::Tensor;

// Returns y [..., rows] for x [..., cols]. `instruction_set` is one of kInstructionSets.
Tensor sparse_int8_linear(const Tensor& x, const Tensor& values, const Tensor& offsets, const Tensor& starts,
                          const Tensor& order, const Tensor& row_scales, const Tensor& corrections,
                          const std::optional<Tensor>& bias, int64_t rows, int64_t cols, int64_t row_block,
                          int64_t col_block, int64_t instruction_set, bool gelu) {
  const char* name = "sparse_int8_linear";
  const auto& kernels = cap_hf::kernels_for(instruction_set);
  cap_hf::check_input(name, x, cols);
  std::optional<Tensor> kept;
  const auto layer = cap_hf::layer_of(
      name, {values, offsets, starts, order, row_scales, corrections, bias, rows, cols, row_block, col_block}, gelu, kept);
  return cap_hf::multiply_sparse(kernels, layer, x);
}

// Returns y [..., rows2] for x [..., cols]: the second layer of the GELU of the first.
Tensor sparse_int8_mlp(const Tensor& x, const Tensor& values, const Tensor& offsets, const Tensor& starts,
                       const Tensor& order, const Tensor& row_scales, const Tensor& corrections,
                       const std::optional<Tensor>& bias, int64_t rows, int64_t cols, int64_t row_block,
                       int64_t col_block, const Tensor& values2, const Tensor& offsets2, const Tensor& starts2,
                       const Tensor& order2, const Tensor& row_scales2, const Tensor& corrections2,
                       const std::optional<Tensor>& bias2, int64_t rows2, int64_t cols2, int64_t row_block2,
                       int64_t col_block2, int64_t instruction_set) {
  const char* name = "sparse_int8_mlp";
  const auto& kernels = cap_hf::kernels_for(instruction_set);
  cap_hf::check_input(name, x, cols);
  cap_hf::check(cols2 == rows, name, ": the second layer takes ", cols2, " numbers and the first one gives ", rows);
  std::optional<Tensor> kept, kept2;
  const auto layer = cap_hf::layer_of(
      name, {values, offsets, starts, order, row_scales, corrections, bias, rows, cols, row_block, col_block}, true, kept);
  const auto next = cap_hf::layer_of(name,
                             {values2, offsets2, starts2, order2, row_scales2, corrections2, bias2, rows2, cols2,
                              row_block2, col_block2},
                             false, kept2);
  return cap_hf::multiply_sparse(kernels, layer, x, &next);
}

// Returns y [images, patches, rows] for images x [images, channels, height, width], of whose patches each is a token;
// what is left of an image on the right and below is not looked at.
Tensor sparse_int8_patches(const Tensor& x, const Tensor& values, const Tensor& offsets, const Tensor& starts,
                           const Tensor& order, const Tensor& row_scales, const Tensor& corrections,
                           const std::optional<Tensor>& bias, int64_t rows, int64_t cols, int64_t row_block,
                           int64_t col_block, int64_t patch_height, int64_t patch_width,
                           int64_t instruction_set) {
  const char* name = "sparse_int8_patches";
  const auto& kernels = cap_hf::kernels_for(instruction_set);
  cap_hf::check(x.dim() == 4, name, ": x must have 4 dimensions, not ", x.dim());
  cap_hf::check_input(name, x, x.size(3));
  const cap_hf::Patches patches{x.size(1), x.size(2), x.size(3), patch_height, patch_width};
  cap_hf::check(patch_height > 0 && patch_width > 0 && patches.numbers() == cols, name, ": patches of ", patch_height,
                " x ", patch_width, " of images ", cap_hf::Sizes{x}, " are not ", cols, " numbers");
  std::optional<Tensor> kept;
  const auto layer = cap_hf::layer_of(
      name, {values, offsets, starts, order, row_scales, corrections, bias, rows, cols, row_block, col_block}, false,
      kept);
  const Tensor input = cap_hf::without_gaps(x, ScalarType::Float);
  const Tensor y = cap_hf::make(input, {x.size(0), patches.per_image(), rows});
  cap_hf::multiply_parts<int32_t>(
      kernels, {input.const_data_ptr<float>(), cols, x.size(0) * patches.per_image(), false, {}, &patches},
      {{layer, {y.mutable_data_ptr<float>(), false}}});
  return cap_hf::without_gaps(y, x.scalar_type());
}

// Returns x [..., cols] quantised as the sparse product does it, plus 128, and the scales [..., 1] of its tokens.
std::tuple<Tensor, Tensor> quantize_tokens(const Tensor& x) {
  cap_hf::check(x.dim() > 0 && x.size(-1) > 0, "quantize_tokens: x has shape ", cap_hf::Sizes{x});
  cap_hf::check_input("quantize_tokens", x, x.size(-1));
  const Tensor input = cap_hf::without_gaps(x, ScalarType::Float);
  std::vector<int64_t> shape = cap_hf::sizes_of(x);
  const int64_t cols = shape.back(), tokens = input.numel() / cols;
  const Tensor quantized = cap_hf::make(input, shape, ScalarType::Byte);
  shape.back() = 1;
  const Tensor scales = cap_hf::make(input, shape);
  const float* from = input.const_data_ptr<float>();
  uint8_t* to = quantized.mutable_data_ptr<uint8_t>();
  float* scale = scales.mutable_data_ptr<float>();
  cap_hf::parallel_for(0, tokens, 16, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const float inverse = cap_hf::portable_int8::measure(from + token * cols, cols, scale + token);
      cap_hf::portable_int8::quantize(from + token * cols, cols, inverse, to + token * cols);
    }
  });
  return {quantized, scales};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cap_hf, m) {
  m.def(
      "sparse_int8_linear(Tensor x, Tensor values, Tensor offsets, Tensor starts, Tensor order, Tensor row_scales, "
      "Tensor corrections, Tensor? bias, int rows, int cols, int row_block, int col_block, int instruction_set, "
      "bool gelu=False) -> Tensor");
  m.def(
      "sparse_int8_mlp(Tensor x, Tensor values, Tensor offsets, Tensor starts, Tensor order, Tensor row_scales, "
      "Tensor corrections, Tensor? bias, int rows, int cols, int row_block, int col_block, Tensor values2, "
      "Tensor offsets2, Tensor starts2, Tensor order2, Tensor row_scales2, Tensor corrections2, Tensor? bias2, "
      "int rows2, int cols2, int row_block2, int col_block2, int instruction_set) -> Tensor");
  m.def(
      "sparse_int8_patches(Tensor x, Tensor values, Tensor offsets, Tensor starts, Tensor order, Tensor row_scales, "
      "Tensor corrections, Tensor? bias, int rows, int cols, int row_block, int col_block, int patch_height, "
      "int patch_width, int instruction_set) -> Tensor");
  m.def("quantize_tokens(Tensor x) -> (Tensor, Tensor)");
  m.def("int8_attention(Tensor q, Tensor k, Tensor v, float scale, int instruction_set) -> Tensor");
  m.def(
      "sparse_int8_attention_branch(Tensor x, Tensor norm_weight, Tensor norm_bias, float epsilon, Tensor[] query, "
      "int[] query_sizes, Tensor[] key, int[] key_sizes, Tensor[] value, int[] value_sizes, int heads, float scale, "
      "Tensor[] output, int[] output_sizes, Tensor? factors, int instruction_set) -> Tensor");
  m.def(
      "sparse_int8_mlp_branch(Tensor x, Tensor norm_weight, Tensor norm_bias, float epsilon, Tensor[] first, "
      "int[] first_sizes, Tensor[] second, int[] second_sizes, Tensor? factors, int instruction_set) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cap_hf, CPU, m) {
  m.impl("sparse_int8_linear", TORCH_BOX(&sparse_int8_linear));
  m.impl("sparse_int8_mlp", TORCH_BOX(&sparse_int8_mlp));
  m.impl("sparse_int8_patches", TORCH_BOX(&sparse_int8_patches));
  m.impl("quantize_tokens", TORCH_BOX(&quantize_tokens));
  m.impl("sparse_int8_attention_branch", TORCH_BOX(&cap_hf::sparse_int8_attention_branch));
  m.impl("sparse_int8_mlp_branch", TORCH_BOX(&cap_hf::sparse_int8_mlp_branch));
  m.impl("int8_attention", TORCH_BOX(&cap_hf::int8_attention));
}
