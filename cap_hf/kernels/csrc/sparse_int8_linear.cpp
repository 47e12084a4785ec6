// The operators of int8 on PyTorch's tensors and threads: cap_hf::sparse_int8_linear, the sparse product,
// cap_hf::quantize_tokens, which prepares a dense one, and cap_hf::int8_attention.
#include "int8_instruction_sets.h"
#include "sparse_operator.h"

#include <algorithm>
#include <tuple>

namespace {

using cap_hf::ScalarType;
using cap_hf::Tensor;

// Columns of a row, at most: partial sums of more products of 128 and 127 may not fit into 32 bits.
constexpr int64_t kMostCols = 0x7fffffff / (128 * 127);

// The fields of a cap_hf.inference.int8_packing.PackedInt8Weight, and the bias [rows] or none.
struct Packed {
  const Tensor &values, &offsets, &starts, &order, &row_scales, &corrections;
  const std::optional<Tensor>& bias;
  int64_t rows, cols, row_block, col_block;
};

// Returns the layer that they are. `bias` is where the bias is kept as contiguous float32.
cap_hf::Layer<int32_t> layer_of(const char* name, const Packed& packed, bool gelu, std::optional<Tensor>& bias) {
  cap_hf::check(packed.cols <= kMostCols, name, ": rows of ", packed.cols, " columns are longer than ", kMostCols);
  const cap_hf::SparseWeight<int32_t> weight{packed.rows,
                                             (packed.cols + 3) / 4,
                                             packed.row_block,
                                             packed.col_block,
                                             reinterpret_cast<const int32_t*>(packed.values.const_data_ptr<int8_t>()),
                                             reinterpret_cast<const uint16_t*>(packed.offsets.const_data_ptr<int16_t>()),
                                             packed.starts.const_data_ptr<int32_t>(),
                                             packed.order.const_data_ptr<int16_t>()};
  cap_hf::check_weight(name, weight, packed.values.numel() / 4, packed.values, packed.offsets, packed.starts,
                       packed.order);
  cap_hf::check(packed.row_scales.is_contiguous() && packed.corrections.is_contiguous() &&
                    packed.row_scales.numel() == packed.rows && packed.corrections.numel() == packed.rows,
                name, ": the parts of the packed weight do not fit each other");
  bias = cap_hf::float_bias(name, packed.bias, packed.rows);
  return {weight,
          {packed.corrections.const_data_ptr<int32_t>(), packed.row_scales.const_data_ptr<float>(),
           bias ? bias->const_data_ptr<float>() : nullptr, gelu}};
}

const cap_hf::Kernels<int32_t>& kernels_for(std::string_view instruction_set) {
  return cap_hf::choose_kernels(instruction_set, cap_hf::int8_kernels_named, cap_hf::best_int8_kernels);
}

// Returns y [..., rows] for x [..., cols]. An empty `instruction_set` is the best.
Tensor sparse_int8_linear(const Tensor& x, const Tensor& values, const Tensor& offsets, const Tensor& starts,
                          const Tensor& order, const Tensor& row_scales, const Tensor& corrections,
                          const std::optional<Tensor>& bias, int64_t rows, int64_t cols, int64_t row_block,
                          int64_t col_block, std::string_view instruction_set, bool gelu) {
  const char* name = "sparse_int8_linear";
  const auto& kernels = kernels_for(instruction_set);
  cap_hf::check_input(name, x, cols);
  std::optional<Tensor> kept;
  const auto layer = layer_of(
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
                       int64_t col_block2, std::string_view instruction_set) {
  const char* name = "sparse_int8_mlp";
  const auto& kernels = kernels_for(instruction_set);
  cap_hf::check_input(name, x, cols);
  cap_hf::check(cols2 == rows, name, ": the second layer takes ", cols2, " numbers and the first one gives ", rows);
  std::optional<Tensor> kept, kept2;
  const auto layer = layer_of(
      name, {values, offsets, starts, order, row_scales, corrections, bias, rows, cols, row_block, col_block}, true, kept);
  const auto next = layer_of(name,
                             {values2, offsets2, starts2, order2, row_scales2, corrections2, bias2, rows2, cols2,
                              row_block2, col_block2},
                             false, kept2);
  return cap_hf::multiply_sparse(kernels, layer, x, &next);
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

// Returns q, k or v as float32 in which the numbers of a token are next to each other.
Tensor tokens_in_float(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float && x.stride(3) == 1 ? x : cap_hf::without_gaps(x, ScalarType::Float);
}

// Returns softmax(scale q k^T) v [images, queries, heads, cols] for q [images, heads, queries, cols] and k and v
// [images, heads, keys, cols].
Tensor int8_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                      std::string_view instruction_set) {
  const char* name = "int8_attention";
  const auto& kernels = kernels_for(instruction_set);
  for (const Tensor* x : {&q, &k, &v}) {
    cap_hf::check(x->dim() == 4, name, ": q, k and v must have 4 dimensions, not ", x->dim());
    cap_hf::check_input(name, *x, x->size(3));
  }
  const int64_t images = q.size(0), heads = q.size(1), queries = q.size(2), cols = q.size(3), keys = k.size(2);
  bool fit = true;
  for (const Tensor* x : {&k, &v})
    fit = fit && x->size(0) == images && x->size(1) == heads && x->size(2) == keys && x->size(3) == cols;
  cap_hf::check(fit, name, ": q ", cap_hf::Sizes{q}, ", k ", cap_hf::Sizes{k}, " and v ", cap_hf::Sizes{v},
                " do not fit each other");
  cap_hf::check(keys > 0 && keys <= cap_hf::kMostKeys && cols > 0 && cols <= kMostCols, name, ": k has shape ",
                cap_hf::Sizes{k});
  cap_hf::check(scale > 0, name, ": scale must be positive, not ", scale);
  const Tensor queries_in = tokens_in_float(q), keys_in = tokens_in_float(k), values_in = tokens_in_float(v);
  const Tensor y = cap_hf::make(queries_in, {images, queries, heads, cols});
  float* to = y.mutable_data_ptr<float>();
  // A head is split where there are fewer heads than threads; each part quantises the keys and values by itself.
  const int64_t tiles = (queries + cap_hf::kTile - 1) / cap_hf::kTile;
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads()) / std::max(images * heads, int64_t{1});
  const int64_t parts = std::clamp(wanted, int64_t{1}, std::max(tiles, int64_t{1}));
  const auto head_at = [&](int64_t number) {
    const int64_t image = number / heads, head = number % heads;
    const auto start = [&](const Tensor& x) {
      return x.const_data_ptr<float>() + image * x.stride(0) + head * x.stride(1);
    };
    return cap_hf::Head{start(queries_in),
                        start(keys_in),
                        start(values_in),
                        to + (image * queries * heads + head) * cols,
                        queries_in.stride(2),
                        keys_in.stride(2),
                        values_in.stride(2),
                        heads * cols,
                        queries,
                        keys,
                        cols,
                        static_cast<float>(scale)};
  };
  cap_hf::parallel_for(0, images * heads * parts, 1, [&](int64_t begin, int64_t end) {
    int32_t* memory = cap_hf::scratch<int32_t>(cap_hf::attention_words(keys, cols));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      const cap_hf::Head head = head_at(task / parts);
      const bool more = part == parts - 1 && task + 1 < end;
      const cap_hf::Head next = more ? head_at(task / parts + 1) : head;
      kernels.attend(head, more ? &next : nullptr, tiles * part / parts * cap_hf::kTile,
                     std::min(tiles * (part + 1) / parts * cap_hf::kTile, queries), memory);
    }
  });
  return cap_hf::without_gaps(y, q.scalar_type());
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cap_hf, m) {
  m.def(
      "sparse_int8_linear(Tensor x, Tensor values, Tensor offsets, Tensor starts, Tensor order, Tensor row_scales, "
      "Tensor corrections, Tensor? bias, int rows, int cols, int row_block, int col_block, str instruction_set='', "
      "bool gelu=False) -> Tensor");
  m.def(
      "sparse_int8_mlp(Tensor x, Tensor values, Tensor offsets, Tensor starts, Tensor order, Tensor row_scales, "
      "Tensor corrections, Tensor? bias, int rows, int cols, int row_block, int col_block, Tensor values2, "
      "Tensor offsets2, Tensor starts2, Tensor order2, Tensor row_scales2, Tensor corrections2, Tensor? bias2, "
      "int rows2, int cols2, int row_block2, int col_block2, str instruction_set='') -> Tensor");
  m.def("quantize_tokens(Tensor x) -> (Tensor, Tensor)");
  m.def("int8_attention(Tensor q, Tensor k, Tensor v, float scale, str instruction_set='') -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cap_hf, CPU, m) {
  m.impl("sparse_int8_linear", TORCH_BOX(&sparse_int8_linear));
  m.impl("sparse_int8_mlp", TORCH_BOX(&sparse_int8_mlp));
  m.impl("quantize_tokens", TORCH_BOX(&quantize_tokens));
  m.impl("int8_attention", TORCH_BOX(&int8_attention));
}
