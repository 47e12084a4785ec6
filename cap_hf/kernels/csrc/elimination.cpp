// The operators cap_hf::assemble, invert, invert_quickly, eliminate and reconstruct: every thread computes whole
// blocks. For blocks of these sizes that is faster than LAPACK with all threads on one block.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "assemble.h"
#include "eliminate.h"
#include "invert.h"
#include "reconstruct.h"
#include "stable.h"

namespace {

using cap_hf::check;
using cap_hf::make;
using cap_hf::ScalarType;
using cap_hf::Tensor;
using cap_hf::without_gaps;
using cap_hf::parallel_for;

// Calls `work` in every thread with what gives it the next of n blocks, or n or more when there is none: each takes one
// when it is done with another, as some blocks end early, and some cores are slower.
template <typename Work>
void each_block(int64_t n, const Work& work) {
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min<int64_t>(n, torch::stable::get_num_threads()), 1,
               [&](int64_t, int64_t) { work([&] { return next++; }); });
}

template <typename Scalar>
void assemble_blocks(const std::vector<Tensor>& strips, const Tensor& blocks, double count, double strength,
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

// Returns whether all numbers of a tensor without gaps are indices of so many things.
bool are_below(const Tensor& indices, int64_t count) {
  const int64_t* all = indices.const_data_ptr<int64_t>();
  return std::all_of(all, all + indices.numel(), [&](int64_t index) { return index >= 0 && index < count; });
}

// Returns the damped Fishers (n, B, B) in float64 of the sums `blocks` (n), see `assemble`. Strips are as in
// cap_hf/method/sums.py; moments are (m, s, s) and have `traces` (m), and `places` (n, B / s) says which a block's
// parts have.
Tensor assemble(const std::vector<Tensor>& strips, const Tensor& blocks, double count, double strength,
                const Tensor& moments, const Tensor& traces, const Tensor& places, double damp) {
  check(!strips.empty(), "strips are needed");
  const ScalarType kind = strips[0].scalar_type();
  check(kind == ScalarType::Float || kind == ScalarType::Double, "strips in float32 or float64 are needed");
  const int64_t size = strips.back().size(2), held = strips[0].size(0), known = moments.size(0);
  int64_t start = 0;
  std::vector<Tensor> whole;
  for (const Tensor& strip : strips) {
    check(strip.dim() == 3 && strip.size(0) == held && strip.size(1) == strip.size(2) - start &&
              strip.scalar_type() == kind,
          "strips do not fit together");
    start = strip.size(2);
    whole.push_back(without_gaps(strip));
  }
  check(blocks.dim() == 1 && blocks.scalar_type() == ScalarType::Long && blocks.is_contiguous() &&
            are_below(blocks, held),
        "blocks that there are no sums of");
  check(moments.dim() == 3 && moments.size(1) == moments.size(2) && moments.scalar_type() == ScalarType::Double &&
            traces.scalar_type() == ScalarType::Double && traces.numel() == known && places.dim() == 2 &&
            places.scalar_type() == ScalarType::Long && places.size(0) == blocks.size(0) &&
            (places.size(1) == 0 || places.size(1) * moments.size(1) == size) && are_below(without_gaps(places), known),
        "moments do not fit the blocks");
  const Tensor all = without_gaps(moments), sums = without_gaps(traces), place = without_gaps(places);
  const cap_hf::Moments priors{all.const_data_ptr<double>(), sums.const_data_ptr<double>(), place.size(1), all.size(1)};
  Tensor out = make(moments, {blocks.size(0), size, size});
  if (kind == ScalarType::Float) {
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
  check((kind == ScalarType::Double || kind == ScalarType::Float) && inverse.scalar_type() == kind,
        "float64 or float32 is needed, the same for both");
  check(weights.dim() == 2 && inverse.dim() == 3 && inverse.size(0) == weights.size(0) &&
            inverse.size(1) == weights.size(1) && inverse.size(2) == weights.size(1),
        "weights (n, B) and inverse (n, B, B) are needed");
  check(unit == 1 || unit == 2 || unit == 4 || unit == 8, "units of 1, 2, 4 or 8 weights are known");
  check(weights.size(1) % unit == 0, "units do not divide the weights");
  check(steps >= 0 && steps * unit <= weights.size(1), "more steps than weights");
  const Tensor w = without_gaps(weights);
  // Blocks may share one matrix, expanded.
  const Tensor a = inverse.stride(2) == 1 && inverse.stride(1) == inverse.size(2) ? inverse : without_gaps(inverse);
  Tensor order = make(w, {w.size(0), steps}, ScalarType::Long);
  Tensor losses = make(w, {w.size(0), steps});
  Tensor lost = make(w, {w.size(0)}, ScalarType::Bool);
  if (kind == ScalarType::Double) {
    eliminate_blocks<double>(w, a, steps, group, limit, unit, order, losses, lost);
  } else {
    eliminate_blocks<float>(w, a, steps, group, limit, unit, order, losses, lost);
  }
  return {order, losses, lost};
}

// Returns the lower factor of a positive definite matrix, and LAPACK's info, which is 0 for one.
Tensor factorize(const Tensor& matrix, int32_t* info) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(matrix), torch::stable::detail::from(false),
                                    torch::stable::detail::from(false)};
  cap_hf::call("aten::linalg_cholesky_ex", "", stack);
  const Tensor factor = torch::stable::detail::to<Tensor>(stack[0]);
  *info = *torch::stable::detail::to<Tensor>(stack[1]).const_data_ptr<int32_t>();
  return factor;
}

// Blocks of at most so many weights are inverted by one thread each, larger ones by all threads together.
constexpr int64_t kOneThread = 1024;

// Returns the inverses of positive definite matrices (n, B, B), and LAPACK's info (n) of each factorisation. What comes
// out for a matrix does not depend on how many others there are: LAPACK rounds otherwise with several threads, and a
// loop of one turn would leave it all of them.
std::tuple<Tensor, Tensor> invert(const Tensor& matrices) {
  check(matrices.dim() == 3 && matrices.size(1) == matrices.size(2), "matrices (n, B, B) are needed");
  const Tensor from = without_gaps(matrices);
  const int64_t n = from.size(0), size = from.size(1);
  const Tensor inverse = make(from, {n, size, size}), info = make(from, {n}, ScalarType::Int);
  const size_t bytes = size * size * from.element_size();
  const char* from_data = static_cast<const char*>(from.const_data_ptr());
  char* inverse_data = static_cast<char*>(inverse.mutable_data_ptr());
  int32_t* info_data = info.mutable_data_ptr<int32_t>();
  const auto solve = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < std::min(end, n); ++b) {
      // A tensor of its own: this thread does not have the caller's autograd and inference modes.
      const Tensor matrix = make(from, {size, size});
      std::memcpy(matrix.mutable_data_ptr(), from_data + b * bytes, bytes);
      const Tensor factor = factorize(matrix, info_data + b);
      if (info_data[b] == 0) {
        std::array<StableIValue, 2> stack{torch::stable::detail::from(factor), torch::stable::detail::from(false)};
        cap_hf::call("aten::cholesky_inverse", "", stack);
        const Tensor found = without_gaps(torch::stable::detail::to<Tensor>(stack[0]));
        std::memcpy(inverse_data + b * bytes, found.const_data_ptr(), bytes);
      } else {
        std::memset(inverse_data + b * bytes, 0, bytes);
      }
    }
  };
  if (size > kOneThread) {
    solve(0, n);
  } else {
    parallel_for(0, std::max<int64_t>(n, 2), 1, solve);
  }
  return {inverse, info};
}

// Returns the inverses, in float32, of matrices (n, B, B) in float64 times `scales` (n), and the error (n) of each, see
// `Inverter::run`.
std::tuple<Tensor, Tensor> invert_quickly(const Tensor& matrices, const Tensor& scales) {
  check(matrices.scalar_type() == ScalarType::Double && matrices.dim() == 3 && matrices.size(1) == matrices.size(2) &&
            scales.scalar_type() == ScalarType::Double && scales.dim() == 1 && scales.size(0) == matrices.size(0),
        "matrices (n, B, B) and scales (n) in float64 are needed");
  const Tensor from = without_gaps(matrices), scale = without_gaps(scales);
  const int64_t n = from.size(0), size = from.size(1), entries = size * size;
  const Tensor inverse = make(from, {n, size, size}, ScalarType::Float), error = make(scale, {n});
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

// Returns the weights (times, n, B) that are left where the first `counts` (times, n) of `index` (n, B), all places of a
// block, survive, and LAPACK's info (n) of each block's factorisation; see cap_hf/method/reconstruction.py.
std::tuple<Tensor, Tensor> reconstruct(const Tensor& weights, const Tensor& fisher, const Tensor& index,
                                       const Tensor& counts) {
  check(weights.scalar_type() == ScalarType::Double && fisher.scalar_type() == ScalarType::Double &&
            index.scalar_type() == ScalarType::Long && counts.scalar_type() == ScalarType::Long,
        "float64, and whole numbers for what survives, are needed");
  check(weights.dim() == 2 && fisher.dim() == 3 && index.dim() == 2 && counts.dim() == 2 &&
            index.size(0) == weights.size(0) && index.size(1) == weights.size(1) && fisher.size(0) == weights.size(0) &&
            fisher.size(1) == weights.size(1) && fisher.size(2) == weights.size(1) &&
            counts.size(1) == weights.size(0),
        "weights and index (n, B), fisher (n, B, B) and counts (times, n) are needed");
  const Tensor old = without_gaps(weights), places = without_gaps(index), kept = without_gaps(counts);
  const Tensor f = fisher.stride(2) == 1 && fisher.stride(1) == fisher.size(2) ? fisher : without_gaps(fisher);
  const int64_t n = old.size(0), size = old.size(1), times = kept.size(0), block_stride = f.stride(0);
  check(are_below(places, size) && are_below(kept, size + 1), "places or numbers that a block does not have");
  const Tensor result = make(old, {times, n, size}), info = make(old, {n}, ScalarType::Int);
  const double *w = old.const_data_ptr<double>(), *matrices = f.const_data_ptr<double>();
  const int64_t *place = places.const_data_ptr<int64_t>(), *count = kept.const_data_ptr<int64_t>();
  double* out = result.mutable_data_ptr<double>();
  int32_t* info_data = info.mutable_data_ptr<int32_t>();
  each_block(n, [&](auto&& next) {
    cap_hf::Reconstructor reconstructor(size);
    for (int64_t b = next(); b < n; b = next()) {
      info_data[b] = reconstructor.run(w + b * size, matrices + b * block_stride, place + b * size, count + b, times, n,
                                       out + b * size, n * size);
    }
  });
  return {result, info};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cap_hf, library) {
  library.def("eliminate(Tensor weights, Tensor inverse, int steps, int group, int limit, int unit=1)"
              " -> (Tensor, Tensor, Tensor)");
  library.def("assemble(Tensor[] strips, Tensor blocks, float count, float strength, Tensor moments, Tensor traces,"
              " Tensor places, float damp) -> Tensor");
  library.def("invert(Tensor matrices) -> (Tensor, Tensor)");
  library.def("invert_quickly(Tensor matrices, Tensor scales) -> (Tensor, Tensor)");
  library.def("reconstruct(Tensor weights, Tensor fisher, Tensor index, Tensor counts) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cap_hf, CPU, library) {
  library.impl("assemble", TORCH_BOX(&assemble));
  library.impl("eliminate", TORCH_BOX(&eliminate));
  library.impl("invert", TORCH_BOX(&invert));
  library.impl("invert_quickly", TORCH_BOX(&invert_quickly));
  library.impl("reconstruct", TORCH_BOX(&reconstruct));
}
