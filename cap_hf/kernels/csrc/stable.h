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
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
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

// Throws what PyTorch says where there is no more memory: libraries and cap_hf look for these words, and the stable ABI
// does not pass them on.
[[noreturn]] inline void no_room(const std::string& what) {
  throw std::runtime_error("DefaultCPUAllocator: can't allocate memory for " + what);
}

// Returns what `make` returns, a tensor of these sizes; the only thing that can fail in it is its memory.
template <class Make>
Tensor with_room(const std::vector<int64_t>& sizes, const Make& make) {
  try {
    return make();
  } catch (const std::runtime_error&) {
    std::ostringstream what;
    what << "a tensor of";
    for (const int64_t size : sizes) what << ' ' << size;
    no_room(what.str());
  }
}

// Returns x in a dtype and without gaps, x itself where it is so already.
inline Tensor without_gaps(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype && x.is_contiguous()) return x;
  return with_room(sizes_of(x), [&] {
    const Tensor converted = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
    return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
  });
}

inline Tensor without_gaps(const Tensor& x) { return without_gaps(x, x.scalar_type()); }

// Returns a new tensor, not filled, of these sizes: in `like`'s dtype, or another.
inline Tensor make(const Tensor& like, const std::vector<int64_t>& sizes,
                   std::optional<ScalarType> dtype = std::nullopt) {
  return with_room(sizes, [&] { return torch::stable::new_empty(like, sizes, dtype); });
}

// Runs `work` on parts of [begin, end) on PyTorch's threads. What it throws is thrown here, with its own words, and not
// in PyTorch's code, which would replace them; of several the first.
template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  std::exception_ptr failure;
  std::mutex lock;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      work(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(lock);
      if (!failure) failure = std::current_exception();
    }
  });
  if (!failure) return;
  try {
    std::rethrow_exception(failure);
  } catch (const std::bad_alloc&) {
    no_room("working memory");
  }
}

// Calls an operator of PyTorch, whose arguments become its results. What fails in it is printed by PyTorch.
template <size_t kCount>
void call(const char* name, const char* overload, std::array<StableIValue, kCount>& stack) {
  check(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) == TORCH_SUCCESS, name, " failed");
}

}  // namespace cap_hf
