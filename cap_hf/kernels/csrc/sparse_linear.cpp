// The operator cap_hf::sparse_linear: the sparse product of floats on PyTorch's tensors and threads.
#include "instruction_sets.h"
#include "sparse_operator.h"

namespace {

using cap_hf::Tensor;

// Returns y [..., rows] for x [..., cols] and bias [rows] or none. `instruction_set` is one of kInstructionSets; the other
// arguments are the fields of a cap_hf.inference.packing.PackedWeight.
Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& offsets, const Tensor& starts,
                     const Tensor& order, const std::optional<Tensor>& bias, int64_t rows, int64_t cols,
                     int64_t row_block, int64_t col_block, int64_t instruction_set, bool gelu) {
  const auto& kernels = cap_hf::choose_kernels(instruction_set, cap_hf::kernels_named, cap_hf::best_kernels);
  cap_hf::check_input("sparse_linear", x, cols);
  const cap_hf::SparseWeight<float> weight{rows,
                                           cols,
                                           row_block,
                                           col_block,
                                           values.const_data_ptr<float>(),
                                           reinterpret_cast<const uint16_t*>(offsets.const_data_ptr<int16_t>()),
                                           starts.const_data_ptr<int32_t>(),
                                           order.const_data_ptr<int16_t>()};
  cap_hf::check_weight("sparse_linear", weight, values.numel(), values, offsets, starts, order);
  const auto start = cap_hf::float_bias("sparse_linear", bias, rows);
  const cap_hf::Scales<float> scales{start ? start->const_data_ptr<float>() : nullptr, nullptr, nullptr, gelu};
  return cap_hf::multiply_sparse(kernels, {weight, scales}, x);
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cap_hf, m) {
  m.def(
      "sparse_linear(Tensor x, Tensor values, Tensor offsets, Tensor starts, Tensor order, Tensor? bias, int rows, "
      "int cols, int row_block, int col_block, int instruction_set, bool gelu=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cap_hf, CPU, m) { m.impl("sparse_linear", TORCH_BOX(&sparse_linear)); }
