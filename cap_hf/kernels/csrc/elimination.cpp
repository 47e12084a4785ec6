// The operators cap_hf::assemble, invert, invert_quickly, eliminate and reconstruct: every thread computes whole
// blocks. For blocks of these sizes that is faster than LAPACK with all threads on one block.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "assemble.h"
#include "eliminate.h"
#include "invert.h"

namespace {

using at::Tensor;

// Calls `work` in every thread with what gives it the next of n blocks, or n or more when there is none: each takes one
// when it is done with another, as some blocks end early, and some cores are slower.
template <typename Work>
void each_block(int64_t n, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1,
                   [&](int64_t begin, int64_t end) { work([&] { return next++; }); });
}

template <typename Scalar>
void assemble_blocks(at::TensorList strips, const Tensor& blocks, double count, double strength,
                     const cap_hf::Moments& moments, const Tensor& places, double damp, Tensor& out) {
  std::vector<cap_hf::Strip<Scalar>> parts;
  int64_t start = 0;
  for (const Tensor& strip : strips) {
    parts.push_back({strip.const_data_ptr<Scalar>(), start, strip.size(2)});
    start = strip.size(2);
  }
  const int64_t n = blocks.size(0), size = out.size(1);
  const int64_t* numbers = blocks.const_data_ptr<int64_t>();
  const int64_t* place = places.const_data_ptr<int64_t>();
  double* data = out.mutable_data_ptr<double>();
  each_block(n, [&](auto&& next) {
    for (int64_t b = next(); b < n; b = next()) {
      cap_hf::assemble<Scalar>(parts, numbers[b], count, strength, moments, place + b * moments.rows, damp, size,
                               data + b * size * size);
    }
  });
}

// Returns the damped Fishers (n, B, B) in float64 of the sums `blocks` (n), see `assemble`. Strips are as in
// cap_hf/method/sums.py; moments are (m, s, s) and have `traces` (m), and `places` (n, B / s) says which a block's
// parts have.
Tensor assemble(at::TensorList strips, const Tensor& blocks, double count, double strength, const Tensor& moments,
                const Tensor& traces, const Tensor& places, double damp) {
  TORCH_CHECK(!strips.empty() && (strips[0].scalar_type() == at::kFloat || strips[0].scalar_type() == at::kDouble),
              "strips in float32 or float64 are needed");
  const int64_t size = strips.back().size(2), held = strips[0].size(0), known = moments.size(0);
  int64_t start = 0;
  std::vector<Tensor> whole;
  for (const Tensor& strip : strips) {
    TORCH_CHECK(strip.dim() == 3 && strip.size(0) == held && strip.size(1) == strip.size(2) - start &&
                    strip.scalar_type() == strips[0].scalar_type(), "strips do not fit together");
    start = strip.size(2);
    whole.push_back(strip.contiguous());
  }
  TORCH_CHECK(blocks.dim() == 1 && blocks.scalar_type() == at::kLong && blocks.is_contiguous() &&
                  (blocks.numel() == 0 || (blocks.min().item<int64_t>() >= 0 && blocks.max().item<int64_t>() < held)),
              "blocks that there are no sums of");
  TORCH_CHECK(moments.dim() == 3 && moments.size(1) == moments.size(2) && moments.scalar_type() == at::kDouble &&
                  traces.scalar_type() == at::kDouble && traces.numel() == known && places.dim() == 2 &&
                  places.scalar_type() == at::kLong && places.size(0) == blocks.size(0) &&
                  (places.size(1) == 0 || places.size(1) * moments.size(1) == size) &&
                  (places.numel() == 0 || (places.min().item<int64_t>() >= 0 && places.max().item<int64_t>() < known)),
              "moments do not fit the blocks");
  const Tensor all = moments.contiguous(), sums = traces.contiguous(), place = places.contiguous();
  const cap_hf::Moments priors{all.const_data_ptr<double>(), sums.const_data_ptr<double>(), place.size(1), all.size(1)};
  Tensor out = at::empty({blocks.size(0), size, size}, moments.options());
  if (strips[0].scalar_type() == at::kFloat) {
    assemble_blocks<float>(whole, blocks, count, strength, priors, place, damp, out);
  } else {
    assemble_blocks<double>(whole, blocks, count, strength, priors, place, damp, out);
  }
  return out;
}

// Removes weights of n blocks in Scalar, and notes in `lost` whose pivots were not all positive and finite.
template <typename Scalar>
void eliminate_blocks(const Tensor& w, const Tensor& a, int64_t steps, int64_t group, int64_t limit, int64_t unit,
                      Tensor& order, Tensor& losses, Tensor& lost) {
  const int64_t n = w.size(0), size = w.size(1), block_stride = a.stride(0);
  const Scalar* w_data = w.const_data_ptr<Scalar>();
  const Scalar* a_data = a.const_data_ptr<Scalar>();
  int64_t* order_data = order.mutable_data_ptr<int64_t>();
  Scalar* losses_data = losses.mutable_data_ptr<Scalar>();
  bool* lost_data = lost.mutable_data_ptr<bool>();
  each_block(n, [&](auto&& next) {
    cap_hf::Eliminator<Scalar> eliminator(size);
    for (int64_t b = next(); b < n; b = next()) {
      lost_data[b] = !eliminator.run(w_data + b * size, a_data + b * block_stride, size, steps, group, limit, unit,
                                     order_data + b * steps, losses_data + b * steps);
    }
  });
}

// Returns the order (n, steps) and losses (n, steps) of the removals in n blocks, and which blocks (n) had a pivot that
// is not positive and finite. At most `limit` of `group` consecutive weights go (group 0: any number). With units of
// several weights these go as a whole, and steps, order and losses are the units'.
std::tuple<Tensor, Tensor, Tensor> eliminate(const Tensor& weights, const Tensor& inverse, int64_t steps,
                                             int64_t group, int64_t limit, int64_t unit) {
  const auto kind = weights.scalar_type();
  TORCH_CHECK((kind == at::kDouble || kind == at::kFloat) && inverse.scalar_type() == kind,
              "float64 or float32 is needed, the same for both");
  TORCH_CHECK(weights.dim() == 2 && inverse.dim() == 3 && inverse.size(0) == weights.size(0) &&
                  inverse.size(1) == weights.size(1) && inverse.size(2) == weights.size(1),
              "weights (n, B) and inverse (n, B, B) are needed");
  TORCH_CHECK(unit == 1 || unit == 2 || unit == 4 || unit == 8, "units of 1, 2, 4 or 8 weights are known");
  TORCH_CHECK(weights.size(1) % unit == 0, "units do not divide the weights");
  TORCH_CHECK(steps >= 0 && steps * unit <= weights.size(1), "more steps than weights");
  const Tensor w = weights.contiguous();
  // Blocks may share one matrix, expanded.
  const Tensor a = inverse.stride(2) == 1 && inverse.stride(1) == inverse.size(2) ? inverse : inverse.contiguous();
  Tensor order = at::empty({w.size(0), steps}, w.options().dtype(at::kLong));
  Tensor losses = at::empty({w.size(0), steps}, w.options());
  Tensor lost = at::zeros({w.size(0)}, w.options().dtype(at::kBool));
  if (kind == at::kDouble) {
    eliminate_blocks<double>(w, a, steps, group, limit, unit, order, losses, lost);
  } else {
    eliminate_blocks<float>(w, a, steps, group, limit, unit, order, losses, lost);
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

// Returns the inverses, in float32, of matrices (n, B, B) in float64 times `scales` (n), and the error (n) of each, see
// `Inverter::run`.
std::tuple<Tensor, Tensor> invert_quickly(const Tensor& matrices, const Tensor& scales) {
  TORCH_CHECK(matrices.scalar_type() == at::kDouble && matrices.dim() == 3 && matrices.size(1) == matrices.size(2) &&
                  scales.scalar_type() == at::kDouble && scales.dim() == 1 && scales.size(0) == matrices.size(0),
              "matrices (n, B, B) and scales (n) in float64 are needed");
  const Tensor from = matrices.contiguous(), scale = scales.contiguous();
  const int64_t n = from.size(0), size = from.size(1), entries = size * size;
  Tensor inverse = at::empty(from.sizes(), from.options().dtype(at::kFloat)), error = at::empty_like(scale);
  const double* from_data = from.const_data_ptr<double>();
  const double* scale_data = scale.const_data_ptr<double>();
  float* inverse_data = inverse.mutable_data_ptr<float>();
  double* error_data = error.mutable_data_ptr<double>();
  each_block(n, [&](auto&& next) {
    cap_hf::Inverter inverter(size);
    for (int64_t b = next(); b < n; b = next()) {
      error_data[b] = inverter.run(from_data + b * entries, scale_data[b], inverse_data + b * entries);
    }
  });
  return {inverse, error};
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
  library.def("eliminate(Tensor weights, Tensor inverse, int steps, int group, int limit, int unit=1)"
              " -> (Tensor, Tensor, Tensor)");
  library.def("assemble(Tensor[] strips, Tensor blocks, float count, float strength, Tensor moments, Tensor traces,"
              " Tensor places, float damp) -> Tensor");
  library.def("invert(Tensor matrices) -> (Tensor, Tensor)");
  library.def("invert_quickly(Tensor matrices, Tensor scales) -> (Tensor, Tensor)");
  library.def("reconstruct(Tensor weights, Tensor fisher, Tensor keep) -> (Tensor, Tensor)");
  library.impl("assemble", c10::DispatchKey::CPU, TORCH_FN(assemble));
  library.impl("eliminate", c10::DispatchKey::CPU, TORCH_FN(eliminate));
  library.impl("invert", c10::DispatchKey::CPU, TORCH_FN(invert));
  library.impl("invert_quickly", c10::DispatchKey::CPU, TORCH_FN(invert_quickly));
  library.impl("reconstruct", c10::DispatchKey::CPU, TORCH_FN(reconstruct));
}
