// The operators cap_hf::sparse_int8_linear, the sparse product of int8 on PyTorch's tensors and threads, and
// cap_hf::quantize_tokens, which prepares a dense one.
#include "int8_instruction_sets.h"
#include "sparse_operator.h"

#include <tuple>

namespace {

using cap_hf::ScalarType;
using cap_hf::Tensor;

// Columns of a row, at most: partial sums of more products of 128 and 127 may not fit into 32 bits.
constexpr int64_t kMostCols = 0x7fffffff / (128 * 127);

// Returns y [..., rows] for x [..., cols] and bias [rows] or none. An empty `instruction_set` is the best; the other
// arguments are the fields of a cap_hf.inference.int8_packing.PackedInt8Weight.
Tensor sparse_int8_linear(const Tensor& x, const Tensor& values, const Tensor& offsets, const Tensor& starts,
                          const Tensor& order, const Tensor& row_scales, const Tensor& corrections,
                          const std::optional<Tensor>& bias, int64_t rows, int64_t cols, int64_t row_block,
                          int64_t col_block, std::string_view instruction_set) {
  const char* name = "sparse_int8_linear";
  const auto& kernels = cap_hf::choose_kernels(instruction_set, cap_hf::int8_kernels_named, cap_hf::best_int8_kernels);
  cap_hf::check_input(name, x, cols);
  cap_hf::check(cols <= kMostCols, name, ": rows of ", cols, " columns are longer than ", kMostCols);
  const cap_hf::SparseWeight<int32_t> weight{rows,
                                             (cols + 3) / 4,
                                             row_block,
                                             col_block,
                                             reinterpret_cast<const int32_t*>(values.const_data_ptr<int8_t>()),
                                             reinterpret_cast<const uint16_t*>(offsets.const_data_ptr<int16_t>()),
                                             starts.const_data_ptr<int32_t>(),
                                             order.const_data_ptr<int16_t>()};
  cap_hf::check_weight(name, weight, values.numel() / 4, values, offsets, starts, order);
  cap_hf::check(row_scales.is_contiguous() && corrections.is_contiguous() && row_scales.numel() == rows &&
                    corrections.numel() == rows,
                name, ": the parts of the packed weight do not fit each other");
  const auto offset = cap_hf::float_bias(name, bias, rows);
  const cap_hf::Scales<int32_t> scales{corrections.const_data_ptr<int32_t>(), row_scales.const_data_ptr<float>(),
                                       offset ? offset->const_data_ptr<float>() : nullptr};
  return cap_hf::multiply_sparse(kernels, weight, scales, x);
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
  torch::stable::parallel_for(0, tokens, 16, [&](int64_t first, int64_t last) {
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
      "Tensor corrections, Tensor? bias, int rows, int cols, int row_block, int col_block, str instruction_set='') -> "
      "Tensor");
  m.def("quantize_tokens(Tensor x) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cap_hf, CPU, m) {
  m.impl("sparse_int8_linear", TORCH_BOX(&sparse_int8_linear));
  m.impl("quantize_tokens", TORCH_BOX(&quantize_tokens));
}
