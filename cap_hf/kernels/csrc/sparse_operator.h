// What the operators of the sparse products share: their arguments' checks, working memory and PyTorch's threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "sparse_linear.h"
#include "stable.h"

namespace cap_hf {

// Words of working memory for tiles, at most (unless one tile takes more): half of a usual L3 cache.
constexpr int64_t kScratch = int64_t{1} << 21;

// Returns at least `size` words that start at a cache line and are the calling thread's until its next call. They are
// kept between calls: memory that is given back to the system costs a page fault per 4 KiB when it is taken again,
// which was a third of a small model's time.
template <class Word>
Word* scratch(int64_t size) {
  constexpr int64_t kLine = 16;
  thread_local std::vector<Word> memory;
  if (static_cast<int64_t>(memory.size()) < size + kLine) {
    memory = std::vector<Word>();  // freed first, so that the old and the new are never there together
    try {
      memory.resize(size + kLine);
    } catch (const std::bad_alloc&) {
      no_room("working memory");
    }
  }
  const auto misfit = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(Word) % kLine;
  return memory.data() + (kLine - misfit) % kLine;
}

// The instruction sets by number, as operators are told of them: 0 is what the environment asks for, else the best.
// cap_hf/inference/operators.py says the same. Numbers, as PyTorch 2.13 never frees a string that it hands to an operator;
// without a default, which the code that torch.compile keeps would write out.
constexpr const char* kInstructionSets[] = {"", "portable", "avx2", "avx_vnni", "avx512", "avx512_vnni"};

// Returns the kernels of an instruction set.
//   Throws if this processor lacks it, or there is none of this number or name.
template <class Word>
const Kernels<Word>& choose_kernels(int64_t instruction_set, const Kernels<Word>* named(const char*),
                                    const Kernels<Word>* best()) {
  check(instruction_set >= 0 && instruction_set < static_cast<int64_t>(std::size(kInstructionSets)),
        "no instruction set has the number ", instruction_set);
  const char* name = kInstructionSets[instruction_set];
  const char* forced = std::getenv("CAP_HF_INSTRUCTION_SET");
  if (*name == '\0' && forced != nullptr) name = forced;
  const Kernels<Word>* kernels = *name == '\0' ? best() : named(name);
  check(kernels != nullptr, "this processor has no instruction set ", name,
        ", as CAP_HF_INSTRUCTION_SET or an argument asks: avx512_vnni, avx512, avx_vnni, avx2 and portable are known");
  return *kernels;
}

// Throws unless the parts of a packed weight fit each other. `words` is how many there are in `values`.
template <class Word>
void check_weight(const char* name, const SparseWeight<Word>& weight, int64_t words, const Tensor& values,
                  const Tensor& offsets, const Tensor& starts, const Tensor& order) {
  check(weight.rows > 0 && weight.cols > 0 && weight.row_block > 0 && weight.row_block % kSlice == 0 &&
            weight.row_block <= kRowBlock && weight.col_block > 0 && weight.col_block <= kColBlock,
        name, ": no packed weight has these sizes");
  check(values.is_contiguous() && offsets.is_contiguous() && starts.is_contiguous() && order.is_contiguous() &&
            words == offsets.numel() && starts.numel() == weight.segments() + 1 &&
            order.numel() == weight.segments() * kSlice,
        name, ": the parts of the packed weight do not fit each other");
}

// Throws unless x is [..., cols] in a dtype that the operators take.
inline void check_input(const char* name, const Tensor& x, int64_t cols) {
  check(x.dim() > 0 && x.size(-1) == cols, name, ": x has shape ", Sizes{x}, ", its last size must be ", cols);
  const ScalarType kind = x.scalar_type();
  check(kind == ScalarType::Float || kind == ScalarType::Half || kind == ScalarType::BFloat16, name,
        ": x must be float32, float16 or bfloat16, not ", kind);
}

// Returns a bias as contiguous float32, or none; throws if it does not fit.
inline std::optional<Tensor> float_bias(const char* name, const std::optional<Tensor>& bias, int64_t rows) {
  if (!bias) return std::nullopt;
  const ScalarType kind = bias->scalar_type();
  const bool floats = kind == ScalarType::Float || kind == ScalarType::Double || kind == ScalarType::Half ||
                      kind == ScalarType::BFloat16;
  check(floats && bias->numel() == rows, name, ": bias must be ", rows, " floating point numbers");
  return without_gaps(*bias, ScalarType::Float);
}

// Computes what layers make of the same input, each part's output being y [tokens][rows]; or, of one layer, what `next`
// makes of that, which is then the output. Between the two are floats that do not leave the working memory.
template <class Word>
void multiply_parts(const Kernels<Word>& kernels, const Input& input, std::vector<Part<Word>> parts,
                    const Layer<Word>* next = nullptr) {
  if (input.tokens == 0) return;
  const Layer<Word>& first_layer = parts[0].layer;
  const int64_t words = std::max(first_layer.weight.cols, next != nullptr ? next->weight.cols : 0);
  const int64_t between = next != nullptr ? first_layer.weight.rows : 0;
  const int64_t tile_size = (words + between + 1) * kTile; // with the scales of its tokens
  const int64_t tiles = Product<Word>::tiles(input.tokens);
  const int64_t most = std::clamp(kScratch / tile_size, int64_t{1}, tiles);
  const int64_t steps = (tiles + most - 1) / most;
  const int64_t tiles_at_once = (tiles + steps - 1) / steps;
  Word* buffer = scratch<Word>(tiles_at_once * (words + between) * kTile);
  float* hidden = reinterpret_cast<float*>(buffer + tiles_at_once * words * kTile);
  const auto of_tokens = std::make_unique<float[]>(tiles_at_once * kTile);
  const auto ready = std::make_unique<std::atomic<uint8_t>[]>(tiles_at_once);
  const int64_t threads = torch::stable::get_num_threads();
  const auto run = [&](const std::vector<Part<Word>>& all, const Input& from) {
    for (int64_t tile = 0; tile < tiles_at_once; ++tile) ready[tile] = 0;
    Product<Word> product(kernels, all, from, buffer, of_tokens.get(), ready.get(), threads);
    // One call per thread, with its number: number i is the same thread in every operator of PyTorch, and has the same
    // tokens in each. Where PyTorch makes one call for all numbers, the first of them does the work of all queues.
    parallel_for(0, threads, 1, [&](int64_t thread, int64_t) { product.work(thread); });
  };
  for (int64_t first = 0; first < input.tokens; first += tiles_at_once * kTile) {
    const int64_t count = std::min(tiles_at_once * kTile, input.tokens - first);
    const float* x = input.patches != nullptr ? input.x : input.x + first * input.cols;
    const Input from{x, input.cols, count, false, input.norm, input.patches, first};
    if (next == nullptr) {
      run(parts, from);
    } else {
      run({{first_layer, {hidden, true}}}, from);
      run({{*next, parts[0].output}}, {hidden, between, count, true});
    }
    for (Part<Word>& part : parts) {
      const int64_t done = count * (next != nullptr ? next->weight.rows : part.layer.weight.rows);
      part.output.y += done;
      if (part.output.added != nullptr) part.output.added += done;
    }
  }
}

// Returns y [..., rows] in x's dtype for x [..., cols]: what a layer makes of it, or what `next` makes of that.
template <class Word>
Tensor multiply_sparse(const Kernels<Word>& kernels, const Layer<Word>& layer, const Tensor& x,
                       const Layer<Word>* next = nullptr) {
  // Inputs and outputs may be half precision; what is outside the sums is float32.
  const Tensor input = without_gaps(x, ScalarType::Float);
  std::vector<int64_t> shape = sizes_of(x);
  const int64_t cols = shape.back();
  shape.back() = next != nullptr ? next->weight.rows : layer.weight.rows;
  const Tensor y = make(input, shape);
  multiply_parts<Word>(kernels, {input.const_data_ptr<float>(), cols, input.numel() / cols, false},
                       {{layer, {y.mutable_data_ptr<float>(), false}}}, next);
  return without_gaps(y, x.scalar_type());
}

} // namespace cap_hf
