// The operators cap_hf::eliminate, invert and reconstruct: every thread computes whole blocks. For blocks of these
// sizes that is faster than LAPACK with all threads on one block.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "eliminate.h"

namespace {

using at::Tensor;

// Removes weights of n blocks in Scalar, and notes in `lost` whose pivots were not all positive and finite.
template <typename Scalar>
void eliminate_blocks(const Tensor& w, const Tensor& a, int64_t steps, int64_t group, int64_t limit, Tensor& order,
                      Tensor& losses, Tensor& lost) {
  const int64_t n = w.size(0), size = w.size(1), block_stride = a.stride(0);
  const Scalar* w_data = w.const_data_ptr<Scalar>();
  const Scalar* a_data = a.const_data_ptr<Scalar>();
  int64_t* order_data = order.mutable_data_ptr<int64_t>();
  Scalar* losses_data = losses.mutable_data_ptr<Scalar>();
  bool* lost_data = lost.mutable_data_ptr<bool>();
  std::atomic<int64_t> next{0};
  // Each thread takes the next block when it is done with one: some blocks end early, and some cores are slower.
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    cap_hf::Eliminator<Scalar> eliminator(size);
    for (int64_t b = next++; b < n; b = next++) {
      lost_data[b] = !eliminator.run(w_data + b * size, a_data + b * block_stride, size, steps, group, limit,
                                     order_data + b * steps, losses_data + b * steps);
    }
  });
}

// Returns the order (n, steps) and losses (n, steps) of the removals in n blocks, and which blocks (n) had a pivot that
// is not positive and finite. At most `limit` of `group` consecutive weights go (group 0: any number).
std::tuple<Tensor, Tensor, Tensor> eliminate(const Tensor& weights, const Tensor& inverse, int64_t steps,
                                             int64_t group, int64_t limit) {
  const auto kind = weights.scalar_type();
  TORCH_CHECK((kind == at::kDouble || kind == at::kFloat) && inverse.scalar_type() == kind,
              "float64 or float32 is needed, the same for both");
  TORCH_CHECK(weights.dim() == 2 && inverse.dim() == 3 && inverse.size(0) == weights.size(0) &&
                  inverse.size(1) == weights.size(1) && inverse.size(2) == weights.size(1),
              "weights (n, B) and inverse (n, B, B) are needed");
  TORCH_CHECK(steps >= 0 && steps <= weights.size(1), "more steps than weights");
  const Tensor w = weights.contiguous();
  // Blocks may share one matrix, expanded.
  const Tensor a = inverse.stride(2) == 1 && inverse.stride(1) == inverse.size(2) ? inverse : inverse.contiguous();
  Tensor order = at::empty({w.size(0), steps}, w.options().dtype(at::kLong));
  Tensor losses = at::empty({w.size(0), steps}, w.options());
  Tensor lost = at::zeros({w.size(0)}, w.options().dtype(at::kBool));
  if (kind == at::kDouble) {
    eliminate_blocks<double>(w, a, steps, group, limit, order, losses, lost);
  } else {
    eliminate_blocks<float>(w, a, steps, group, limit, order, losses, lost);
  }
  return {order, losses, lost};
}

// Blocks of at most so many weights are inverted by one thread each, larger ones by all threads together.
constexpr int64_t kOneThread = 1024;

// Returns the inverses of positive definite matrices (n, B, B), and LAPACK's info (n) of each factorisation. What comes
// out for a matrix does not depend on how many others there are: LAPACK rounds otherwise with several threads, and a
// loop of one turn would leave it all of them.
std::tuple<Tensor, Tensor> invert(const Tensor& matrices) {
  Tensor inverse = at::empty_like(matrices, at::MemoryFormat::Contiguous);
  Tensor info = at::empty({matrices.size(0)}, matrices.options().dtype(at::kInt));
  const int64_t n = matrices.size(0);
  const auto solve = [&](int64_t begin, int64_t end) {
    // This thread does not have the caller's autograd and inference modes, so both are left out.
    const at::AutoDispatchBelowADInplaceOrView plain;
    for (int64_t b = begin; b < std::min(end, n); ++b) {
      auto [factor, code] = at::linalg_cholesky_ex(matrices[b]);
      info[b].copy_(code);
      if (code.item<int>() == 0) {
        inverse[b].copy_(at::cholesky_inverse(factor));
      } else {
        inverse[b].zero_();
      }
    }
  };
  if (matrices.size(-1) > kOneThread) {
    solve(0, n);
  } else {
    at::parallel_for(0, std::max<int64_t>(n, 2), 1, solve);
  }
  return {inverse, info};
}

// Does what cap_hf/method/reconstruction.py does; info (n) is LAPACK's of each block's factorisation.
std::tuple<Tensor, Tensor> reconstruct(const Tensor& weights, const Tensor& fisher, const Tensor& keep) {
  TORCH_CHECK(weights.scalar_type() == at::kDouble && fisher.scalar_type() == at::kDouble &&
                  keep.scalar_type() == at::kBool, "float64 and a bool mask are needed");
  TORCH_CHECK(weights.dim() == 2 && fisher.dim() == 3 && keep.sizes() == weights.sizes() &&
                  fisher.size(0) == weights.size(0) && fisher.size(1) == weights.size(1) &&
                  fisher.size(2) == weights.size(1), "weights and keep (n, B) and fisher (n, B, B) are needed");
  const Tensor old = weights.contiguous(), mask = keep.contiguous();
  const Tensor f = fisher.stride(2) == 1 && fisher.stride(1) == fisher.size(2) ? fisher : fisher.contiguous();
  const int64_t n = old.size(0), size = old.size(1), block_stride = f.stride(0);
  Tensor result = at::zeros_like(old);
  Tensor info = at::zeros({n}, old.options().dtype(at::kInt));
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView plain;
    std::vector<int64_t> kept(size);
    for (int64_t b = begin; b < end; ++b) {
      const double* w = old.const_data_ptr<double>() + b * size;
      const double* matrix = f.const_data_ptr<double>() + b * block_stride;
      const bool* keeps = mask.const_data_ptr<bool>() + b * size;
      int64_t count = 0;
      for (int64_t i = 0; i < size; ++i) {
        if (keeps[i]) kept[count++] = i;
      }
      if (count == 0) continue;
      Tensor system = at::empty({count, count}, old.options()), pull = at::zeros({count, 1}, old.options());
      double* system_data = system.mutable_data_ptr<double>();
      double* pull_data = pull.mutable_data_ptr<double>();
      for (int64_t i = 0; i < count; ++i) {
        const double* row = matrix + kept[i] * size;
        for (int64_t j = 0; j < count; ++j) system_data[i * count + j] = row[kept[j]];
        for (int64_t j = 0; j < size; ++j) {
          if (!keeps[j]) pull_data[i] += row[j] * w[j];
        }
      }
      auto [factor, code] = at::linalg_cholesky_ex(system);
      info[b].copy_(code);
      const Tensor moves = at::cholesky_solve(pull, factor);
      const double* moves_data = moves.const_data_ptr<double>();  // one column
      double* out = result.mutable_data_ptr<double>() + b * size;
      for (int64_t i = 0; i < count; ++i) out[kept[i]] = w[kept[i]] + moves_data[i];
    }
  });
  return {result, info};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cap_hf, library) {
  library.def("eliminate(Tensor weights, Tensor inverse, int steps, int group, int limit)"
              " -> (Tensor, Tensor, Tensor)");
  library.def("invert(Tensor matrices) -> (Tensor, Tensor)");
  library.def("reconstruct(Tensor weights, Tensor fisher, Tensor keep) -> (Tensor, Tensor)");
  library.impl("eliminate", c10::DispatchKey::CPU, TORCH_FN(eliminate));
  library.impl("invert", c10::DispatchKey::CPU, TORCH_FN(invert));
  library.impl("reconstruct", c10::DispatchKey::CPU, TORCH_FN(reconstruct));
}
