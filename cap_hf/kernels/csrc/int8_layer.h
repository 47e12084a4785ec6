// What the int8 operators are told of a layer, and which kernels they take.
#pragma once

#include "int8_instruction_sets.h"
#include "sparse_operator.h"

namespace cap_hf {

// Columns of a row, at most: partial sums of more products of 128 and 127 may not fit into 32 bits.
constexpr int64_t kMostCols = 0x7fffffff / (128 * 127);

// The fields of a cap_hf.inference.int8_packing.PackedInt8Weight, and the bias [rows] or none.
struct Packed {
  const Tensor &values, &offsets, &starts, &order, &row_scales, &corrections;
  const std::optional<Tensor>& bias;
  int64_t rows, cols, row_block, col_block;
};

// Returns the layer that they are. `bias` is where the bias is kept as contiguous float32.
inline Layer<int32_t> layer_of(const char* name, const Packed& packed, bool gelu, std::optional<Tensor>& bias) {
  check(packed.cols <= kMostCols, name, ": rows of ", packed.cols, " columns are longer than ", kMostCols);
  const SparseWeight<int32_t> weight{packed.rows,
                                     (packed.cols + 3) / 4,
                                     packed.row_block,
                                     packed.col_block,
                                     reinterpret_cast<const int32_t*>(packed.values.const_data_ptr<int8_t>()),
                                     reinterpret_cast<const uint16_t*>(packed.offsets.const_data_ptr<int16_t>()),
                                     packed.starts.const_data_ptr<int32_t>(),
                                     packed.order.const_data_ptr<int16_t>()};
  check_weight(name, weight, packed.values.numel() / 4, packed.values, packed.offsets, packed.starts, packed.order);
  check(packed.row_scales.is_contiguous() && packed.corrections.is_contiguous() &&
            packed.row_scales.numel() == packed.rows && packed.corrections.numel() == packed.rows,
        name, ": the parts of the packed weight do not fit each other");
  bias = float_bias(name, packed.bias, packed.rows);
  return {weight,
          {packed.corrections.const_data_ptr<int32_t>(), packed.row_scales.const_data_ptr<float>(),
           bias ? bias->const_data_ptr<float>() : nullptr, gelu}};
}

inline const Kernels<int32_t>& kernels_for(int64_t instruction_set) {
  return choose_kernels(instruction_set, int8_kernels_named, best_int8_kernels);
}

} // namespace cap_hf
