// The operator cap_hf::sparse_linear: the sparse product on PyTorch's tensors and threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "instruction_sets.h"

namespace {

// Floats of working memory for tiles, at most (unless one tile takes more): half of a usual L3 cache.
constexpr int64_t kScratch = int64_t{1} << 21;

// Returns at least `size` floats that start at a cache line and are the calling thread's until its next call. They are
// kept between calls: memory that is given back to the system costs a page fault per 4 KiB when it is taken again,
// which was a third of a small model's time.
float* scratch(int64_t size) {
  constexpr int64_t kLine = 16;
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < size + kLine) {
    memory = std::vector<float>();  // freed first, so that the old and the new are never there together
    memory.resize(size + kLine);
  }
  const auto misfit = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % kLine;
  return memory.data() + (kLine - misfit) % kLine;
}

// Returns y [..., rows] for x [..., cols] and bias [rows] or none. An empty `instruction_set` is the best; the other
// arguments are the fields of a cap_hf.inference.packing.PackedWeight.
at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& offsets,
                         const at::Tensor& starts, const at::Tensor& order, const std::optional<at::Tensor>& bias,
                         int64_t rows, int64_t cols, int64_t row_block, int64_t col_block,
                         std::string_view instruction_set) {
  const cap_hf::Kernels* kernels = cap_hf::kernels_named(
      instruction_set.empty() ? cap_hf::best_instruction_set() : std::string(instruction_set).c_str());
  TORCH_CHECK(kernels != nullptr, "this processor has no instruction set ", std::string(instruction_set));
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == cols, "sparse_linear: x has shape ", x.sizes(), ", its last size must be ",
              cols);
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
              "sparse_linear: x must be float32, float16 or bfloat16, not ", x.scalar_type());
  const cap_hf::SparseWeight weight{rows,
                                    cols,
                                    row_block,
                                    col_block,
                                    values.const_data_ptr<float>(),
                                    reinterpret_cast<const uint16_t*>(offsets.const_data_ptr<int16_t>()),
                                    starts.const_data_ptr<int32_t>(),
                                    order.const_data_ptr<int16_t>()};
  TORCH_CHECK(rows > 0 && cols > 0 && row_block > 0 && row_block % cap_hf::kSlice == 0 &&
                  row_block <= cap_hf::kRowBlock && col_block > 0 && col_block <= cap_hf::kColBlock,
              "sparse_linear: no packed weight has these sizes");
  TORCH_CHECK(values.is_contiguous() && offsets.is_contiguous() && starts.is_contiguous() && order.is_contiguous() &&
                  values.numel() == offsets.numel() && starts.numel() == weight.segments() + 1 &&
                  order.numel() == weight.segments() * cap_hf::kSlice,
              "sparse_linear: the parts of the packed weight do not fit each other");
  TORCH_CHECK(!bias || (bias->is_floating_point() && bias->numel() == rows), "sparse_linear: bias must be ", rows,
              " floating point numbers");
  // Inputs and outputs may be half precision; the sums are float32.
  const at::Tensor input = x.to(at::kFloat).contiguous();
  const at::Tensor offset = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  auto shape = input.sizes().vec();
  shape.back() = rows;
  at::Tensor y = at::empty(shape, input.options());
  const int64_t tokens = input.numel() / cols;
  if (tokens == 0) return y.to(x.scalar_type());
  const int64_t tile_size = cols * cap_hf::kTile;
  const int64_t tiles_at_once = std::clamp(kScratch / tile_size, int64_t{1}, cap_hf::Product::tiles(tokens));
  float* buffer = scratch(tiles_at_once * tile_size);
  const auto ready = std::make_unique<std::atomic<uint8_t>[]>(tiles_at_once);
  const int64_t threads = at::get_num_threads();
  const int64_t step = tiles_at_once * cap_hf::kTile;
  for (int64_t first = 0; first < tokens; first += step) {
    for (int64_t tile = 0; tile < tiles_at_once; ++tile) ready[tile] = 0;
    cap_hf::Product product(*kernels, weight, input.const_data_ptr<float>() + first * cols,
                            std::min(step, tokens - first), bias ? offset.const_data_ptr<float>() : nullptr,
                            y.mutable_data_ptr<float>() + first * rows, buffer, ready.get(), threads);
    // One call per thread, with its number: number i is the same thread in every operator of PyTorch, and has the same
    // tokens in each. Where PyTorch makes one call for all numbers, the first of them does the work of all queues.
    at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) { product.work(thread); });
  }
  return y.to(x.scalar_type());
}

} // namespace

TORCH_LIBRARY_FRAGMENT(cap_hf, m) {
  m.def(
      "sparse_linear(Tensor x, Tensor values, Tensor offsets, Tensor starts, Tensor order, Tensor? bias, int rows, "
      "int cols, int row_block, int col_block, str instruction_set='') -> Tensor");
}

TORCH_LIBRARY_IMPL(cap_hf, CPU, m) { m.impl("sparse_linear", &sparse_linear); }

// For inference only: a backward pass is an error that names the operator, instead of gradients that lack a part.
TORCH_LIBRARY_IMPL(cap_hf, Autograd, m) {
  m.impl("sparse_linear", torch::autograd::autogradNotImplementedFallback());
}
