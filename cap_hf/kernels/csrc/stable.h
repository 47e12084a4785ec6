// What of PyTorch the operators use: LibTorch's stable ABI alone, so that one library runs with every PyTorch from 2.10
// on. No ATen, no c10: their classes differ from release to release.
#pragma once

// The oldest PyTorch that a library is for; what is newer is hidden. cap_hf/kernels/libraries.py says the same.
#define TORCH_TARGET_VERSION ((2ULL << 56) | (10ULL << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace cap_hf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws a message of all parts unless a condition holds. PyTorch's own check would add this file's place on the
// machine that compiled it.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A tensor's sizes, as text only when they are printed.
struct Sizes {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& out, const Sizes& sizes) {
  out << '[';
  for (int64_t i = 0; i < sizes.tensor.dim(); ++i) out << (i ? ", " : "") << sizes.tensor.size(i);
  return out << ']';
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// Returns x in a dtype and without gaps, x itself where it is so already.
inline Tensor without_gaps(const Tensor& x, ScalarType dtype) {
  const Tensor converted = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

inline Tensor without_gaps(const Tensor& x) { return without_gaps(x, x.scalar_type()); }

// Returns a new tensor, not filled, of these sizes: in `like`'s dtype, or another.
//   Throws PyTorch's words for a lack of memory, which the stable ABI does not pass on.
inline Tensor make(const Tensor& like, const std::vector<int64_t>& sizes,
                   std::optional<ScalarType> dtype = std::nullopt) {
  try {
    return torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::runtime_error&) {
    std::ostringstream message;
    message << "can't allocate memory for a tensor of";
    for (const int64_t size : sizes) message << ' ' << size;
    throw std::runtime_error(message.str());
  }
}

// Calls an operator of PyTorch, whose arguments become its results. What fails in it is printed by PyTorch.
template <size_t kCount>
void call(const char* name, const char* overload, std::array<StableIValue, kCount>& stack) {
  check(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) == TORCH_SUCCESS, name, " failed");
}

}  // namespace cap_hf
