// The operators of int8 on PyTorch's tensors and threads: cap_hf::sparse_int8_linear, the sparse product,
// cap_hf::quantize_tokens, which prepares a dense one, and cap_hf::int8_attention.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "int8_instruction_sets.h"
#include "sparse_operator.h"

#include <algorithm>
#include <tuple>

namespace {

// Columns of a row, at most: partial sums of more products of 128 and 127 may not fit into 32 bits.
constexpr int64_t kMostCols = 0x7fffffff / (128 * 127);

// Returns y [..., rows] for x [..., cols] and bias [rows] or none. An empty `instruction_set` is the best; the other
// arguments are the fields of a cap_hf.inference.int8_packing.PackedInt8Weight.
at::Tensor sparse_int8_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& offsets,
                              const at::Tensor& starts, const at::Tensor& order, const at::Tensor& row_scales,
                              const at::Tensor& corrections, const std::optional<at::Tensor>& bias, int64_t rows,
                              int64_t cols, int64_t row_block, int64_t col_block, std::string_view instruction_set,
                              bool gelu) {
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
                                       bias ? offset.const_data_ptr<float>() : nullptr, gelu};
  return cap_hf::multiply_sparse(kernels, weight, scales, x);
}

// Returns x [..., cols] quantised as the sparse product does it, plus 128, and the scales [..., 1] of its tokens.
std::tuple<at::Tensor, at::Tensor> quantize_tokens(const at::Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "quantize_tokens: x has shape ", x.sizes());
  cap_hf::check_input("quantize_tokens", x, x.size(-1));
  const at::Tensor input = x.to(at::kFloat).contiguous();
  const int64_t cols = x.size(-1), tokens = input.numel() / cols;
  auto shape = input.sizes().vec();
  const at::Tensor quantized = at::empty(shape, input.options().dtype(at::kByte));
  shape.back() = 1;
  const at::Tensor scales = at::empty(shape, input.options());
  const float* from = input.const_data_ptr<float>();
  uint8_t* to = quantized.mutable_data_ptr<uint8_t>();
  float* scale = scales.mutable_data_ptr<float>();
  at::parallel_for(0, tokens, 16, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const float inverse = cap_hf::portable_int8::measure(from + token * cols, cols, scale + token);
      cap_hf::portable_int8::quantize(from + token * cols, cols, inverse, to + token * cols);
    }
  });
  return {quantized, scales};
}

// Returns q, k or v as float32 in which the numbers of a token are next to each other.
at::Tensor heads_in_float(const at::Tensor& x) {
  const at::Tensor input = x.to(at::kFloat);
  return input.stride(3) == 1 ? input : input.contiguous();
}

// Returns softmax(scale q k^T) v [images, queries, heads, cols] for q [images, heads, queries, cols] and k and v
// [images, heads, keys, cols].
at::Tensor int8_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
                          std::string_view instruction_set) {
  const char* name = "int8_attention";
  const auto& kernels = cap_hf::choose_kernels(instruction_set, cap_hf::int8_kernels_named, cap_hf::best_int8_kernels);
  for (const at::Tensor& x : {q, k, v}) {
    TORCH_CHECK(x.dim() == 4, name, ": q, k and v must have 4 dimensions, not ", x.sizes());
    cap_hf::check_input(name, x, x.size(3));
  }
  const int64_t images = q.size(0), heads = q.size(1), queries = q.size(2), cols = q.size(3), keys = k.size(2);
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(0) == images && k.size(1) == heads && k.size(3) == cols, name, ": q ",
              q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not fit each other");
  TORCH_CHECK(keys > 0 && keys <= cap_hf::kMostKeys && cols > 0 && cols <= kMostCols, name, ": k has shape ", k.sizes());
  TORCH_CHECK(scale > 0, name, ": scale must be positive, not ", scale);
  const at::Tensor from[] = {heads_in_float(q), heads_in_float(k), heads_in_float(v)};
  at::Tensor y = at::empty({images, queries, heads, cols}, from[0].options());
  // A head is split where there are fewer heads than threads; each part quantises the keys and values by itself.
  const int64_t tiles = (queries + cap_hf::kTile - 1) / cap_hf::kTile;
  const int64_t wanted = 4 * at::get_num_threads() / std::max(images * heads, int64_t{1});
  const int64_t parts = std::clamp(wanted, int64_t{1}, std::max(tiles, int64_t{1}));
  const auto start = [](const at::Tensor& x, int64_t image, int64_t head) {
    return x.const_data_ptr<float>() + image * x.stride(0) + head * x.stride(1);
  };
  at::parallel_for(0, images * heads * parts, 1, [&](int64_t begin, int64_t end) {
    int32_t* memory = cap_hf::scratch<int32_t>(cap_hf::attention_words(keys, cols));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / parts / heads, head = task / parts % heads, part = task % parts;
      const cap_hf::Head work{start(from[0], image, head), start(from[1], image, head), start(from[2], image, head),
                              y.mutable_data_ptr<float>() + (image * queries * heads + head) * cols,
                              from[0].stride(2), from[1].stride(2), from[2].stride(2), heads * cols, keys, cols,
                              static_cast<float>(scale)};
      kernels.attend(work, tiles * part / parts * cap_hf::kTile,
                     std::min(tiles * (part + 1) / parts * cap_hf::kTile, queries), memory);
    }
  });
  return y.to(q.scalar_type());
}

} // namespace

TORCH_LIBRARY_FRAGMENT(cap_hf, m) {
  m.def(
      "sparse_int8_linear(Tensor x, Tensor values, Tensor offsets, Tensor starts, Tensor order, Tensor row_scales, "
      "Tensor corrections, Tensor? bias, int rows, int cols, int row_block, int col_block, str instruction_set='', "
      "bool gelu=False) -> Tensor");
  m.def("quantize_tokens(Tensor x) -> (Tensor, Tensor)");
  m.def("int8_attention(Tensor q, Tensor k, Tensor v, float scale, str instruction_set='') -> Tensor");
}

TORCH_LIBRARY_IMPL(cap_hf, CPU, m) {
  m.impl("sparse_int8_linear", &sparse_int8_linear);
  m.impl("quantize_tokens", &quantize_tokens);
  m.impl("int8_attention", &int8_attention);
}

// For inference only, as sparse_linear.
TORCH_LIBRARY_IMPL(cap_hf, Autograd, m) {
  m.impl("sparse_int8_linear", torch::autograd::autogradNotImplementedFallback());
  m.impl("quantize_tokens", torch::autograd::autogradNotImplementedFallback());
  m.impl("int8_attention", torch::autograd::autogradNotImplementedFallback());
}
