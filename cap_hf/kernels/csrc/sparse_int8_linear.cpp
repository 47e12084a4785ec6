// The operator cap_hf::sparse_int8_linear: the sparse product of int8 on PyTorch's tensors and threads.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "int8_instruction_sets.h"
#include "sparse_operator.h"

namespace {

// Columns of a row, at most: a sum of more products of 127 and 127 may not fit into 32 bits.
constexpr int64_t kMostCols = 0x7fffffff / (127 * 127);

// Returns y [..., rows] for x [..., cols] and bias [rows] or none. An empty `instruction_set` is the best; the other
// arguments are the fields of a cap_hf.inference.int8_packing.PackedInt8Weight.
at::Tensor sparse_int8_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& offsets,
                              const at::Tensor& starts, const at::Tensor& order, const at::Tensor& row_scales,
                              const at::Tensor& corrections, const std::optional<at::Tensor>& bias, int64_t rows,
                              int64_t cols, int64_t row_block, int64_t col_block, std::string_view instruction_set) {
  const char* name = "sparse_int8_linear";
  const auto& kernels = cap_hf::choose_kernels(instruction_set, cap_hf::int8_kernels_named, cap_hf::best_int8_kernels);
  cap_hf::check_input(name, x, cols);
  TORCH_CHECK(cols <= kMostCols, name, ": rows of ", cols, " columns are longer than ", kMostCols);
  const cap_hf::SparseWeight<int32_t> weight{rows,
                                             (cols + 3) / 4,
                                             row_block,
                                             col_block,
                                             reinterpret_cast<const int32_t*>(values.const_data_ptr<int8_t>()),
                                             reinterpret_cast<const uint16_t*>(offsets.const_data_ptr<int16_t>()),
                                             starts.const_data_ptr<int32_t>(),
                                             order.const_data_ptr<int16_t>()};
  cap_hf::check_weight(name, weight, values.numel() / 4, values, offsets, starts, order);
  TORCH_CHECK(row_scales.is_contiguous() && corrections.is_contiguous() && row_scales.numel() == rows &&
                  corrections.numel() == rows,
              name, ": the parts of the packed weight do not fit each other");
  const at::Tensor offset = cap_hf::float_bias(name, bias, rows);
  const cap_hf::Scales<int32_t> scales{corrections.const_data_ptr<int32_t>(), row_scales.const_data_ptr<float>(),
                                       bias ? offset.const_data_ptr<float>() : nullptr};
  return cap_hf::multiply_sparse(kernels, weight, scales, x);
}

} // namespace

TORCH_LIBRARY_FRAGMENT(cap_hf, m) {
  m.def(
      "sparse_int8_linear(Tensor x, Tensor values, Tensor offsets, Tensor starts, Tensor order, Tensor row_scales, "
      "Tensor corrections, Tensor? bias, int rows, int cols, int row_block, int col_block, str instruction_set='') -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(cap_hf, CPU, m) { m.impl("sparse_int8_linear", &sparse_int8_linear); }

// For inference only, as sparse_linear.
TORCH_LIBRARY_IMPL(cap_hf, Autograd, m) {
  m.impl("sparse_int8_linear", torch::autograd::autogradNotImplementedFallback());
}
