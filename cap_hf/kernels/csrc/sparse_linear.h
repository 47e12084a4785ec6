// y = x W^T + b for a sparse W and a dense x: the packed weight, and the product over any instruction set.
//
// Nothing of PyTorch is included here, so that the product can be compiled and checked by itself in a second.
//
// Words
//   token         a row of x, and of y
//   word          32 bits: what is multiplied at once for one token. A float, or four int8 of consecutive columns
//   tile          kTile tokens, transposed: [word][token], so that one word of W meets 32 contiguous words of x
//   row block     up to kRowBlock rows of W, whose sums for one tile are in a buffer
//   column block  words of a row for which a tile's part stays in the L1 cache while all rows of a row block pass over it
//   slice         four rows of a row block, taken together; rows are sorted by their number of words in the column
//                 block, so that a slice's rows have about as many (the SELL-C-sigma format, arXiv 1307.6209)
//   segment       the words of one slice in one column block
//   step          one word of each row of a slice (0 for a row that has no more), four in one load; the sums of four
//                 rows x 32 tokens are in registers, four independent chains
//   offset        where a word starts in its column block of a tile, in units of 8 bytes
//   queue         the tiles that one thread begins with
//   tiled         floats as [tile][col][token]: how one layer's outputs go into the next without leaving the cache
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace cap_hf {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "four offsets are loaded as one number");

constexpr int64_t kTile = 32;      // tokens in a tile
constexpr int64_t kSlice = 4;      // rows in a slice
constexpr int64_t kRowBlock = 128; // rows in a block, at most: their sums lie in a buffer on the stack
constexpr int64_t kHalf = 16;      // of a tile with no more tokens than this only the first half is computed
constexpr int64_t kColBlock = 4095; // words in a block, at most: 16 times a word, its offset, has 16 bits

// Segments are numbered by row block, then column block, then slice; the last row block has as many slices as the
// others. Segment s holds the steps from starts[s] to before starts[s + 1].
//
// Word is float, or int32_t for four int8 of consecutive columns, the first in the low bits.
template <class Word>
struct SparseWeight {
  int64_t rows;
  int64_t cols;            // words of a row
  int64_t row_block;       // a multiple of kSlice, at most kRowBlock
  int64_t col_block;       // at most 4095
  const Word* values;      // [steps][4]; 0 where a row has no more words
  const uint16_t* offsets; // [steps][4]: 16 x the word, counted in its column block
  const int32_t* starts;   // [segments + 1]
  const int16_t* order;    // [segments][4]: the rows of the slice, counted in their row block

  int64_t row_blocks() const { return (rows + row_block - 1) / row_block; }
  int64_t col_blocks() const { return (cols + col_block - 1) / col_block; }
  int64_t slices() const { return row_block / kSlice; }
  int64_t segments() const { return row_blocks() * col_blocks() * slices(); }
};

// What sums of words become: y = sum for floats, y = (sum * row's scale) * token's scale + bias for int8; then, if asked
// for, y is the GELU of that (by the error function, not by tanh).
template <class Word>
struct Scales {
  const Word* start;   // [rows] or null: where sums begin. The bias of floats
  const float* rows;   // [rows]; int8 only
  const float* bias;   // [rows] or null; int8 only: floats begin with it
  bool gelu;
};

struct Head;

// The functions that are compiled for every instruction set.
template <class Word>
struct Kernels {
  // tile[word][token] = the words of x[token][col]; 0, in int8 anything, for tokens past the last. For int8 also the
  // scales of kTile tokens.
  void (*load_tile)(const float* x, int64_t tokens, int64_t cols, Word* tile, float* scales);
  // sums[row][token] = starts[row] + the product of one row block with a tile of kTile (or, if half, kHalf) tokens.
  void (*multiply)(const SparseWeight<Word>& weight, int64_t row_block, const Word* tile, const Word* starts, bool half,
                   Word* sums);
  // y[token * stride + row] = what sums[row][token] becomes; `first` is the row block's first row.
  void (*store_tile)(const Word* sums, int64_t first, int64_t rows, int64_t tokens, const Scales<Word>& scales,
                     const float* of_tokens, float* y, int64_t stride);
  // values[row][token] = what sums[row][token] becomes, with kTile tokens; int8 only.
  void (*finish)(const Word* sums, int64_t first, int64_t rows, const Scales<Word>& scales, const float* of_tokens,
                 float* values);
  // What load_tile does for kTile tokens whose floats are tiled, values[col][token]; int8 only.
  void (*load_tiled)(const float* values, int64_t cols, Word* tile, float* scales);
  // Attention of one head for the queries `first` to before `last`, see attention.h; int8 only. `next` is the head that
  // is read after it, or null.
  void (*attend)(const Head& head, const Head* next, int64_t first, int64_t last, Word* memory);
};

// What goes into a product: x [tokens][cols], or, tiled, [tiles][cols][kTile].
struct Input {
  const float* x;
  int64_t cols;
  int64_t tokens;
  bool tiled;
};

// What comes out of it: y [tokens][rows], or, tiled, [tiles][rows][kTile].
struct Output {
  float* y;
  bool tiled;
};

// One product, shared by the threads that call work(). Every thread has a queue of consecutive tiles, the same in every
// layer: what a thread writes here it reads in the next layer, and moving that between the caches of two cores would
// cost more than sparsity saves. The tasks of a queue are, in order, to transpose each of its tiles, and to multiply
// each row block with each tile. A thread whose queue is empty takes tasks from the others'. A tile that is multiplied
// must be transposed; the thread that took that task is at work on it, so the wait is short and ends.
template <class Word>
class Product {
 public:
  // buffer [tiles][cols][kTile], of_tokens [tiles][kTile] and ready [tiles], all 0, are working memory.
  Product(const Kernels<Word>& kernels, const SparseWeight<Word>& weight, const Scales<Word>& scales,
          const Input& input, const Output& output, Word* buffer, float* of_tokens, std::atomic<uint8_t>* ready,
          int64_t queues)
      : kernels_(kernels), weight_(weight), scales_(scales), input_(input), output_(output), buffer_(buffer),
        of_tokens_(of_tokens), ready_(ready), tiles_(tiles(input.tokens)), queues_(queues) {}

  static int64_t tiles(int64_t tokens) { return (tokens + kTile - 1) / kTile; }

  // Takes tasks, from queue `own` first, until none is left.
  void work(int64_t own) {
    const int64_t queues = static_cast<int64_t>(queues_.size());
    for (int64_t i = 0; i < queues; ++i) empty((own + i) % queues);
  }

 private:
  struct alignas(64) Queue {
    std::atomic<int64_t> next{0};
  };

  void empty(int64_t queue) {
    const int64_t queues = static_cast<int64_t>(queues_.size());
    const int64_t first = tiles_ * queue / queues, count = tiles_ * (queue + 1) / queues - first;
    const int64_t tasks = count * (1 + weight_.row_blocks());
    for (int64_t task; (task = queues_[queue].next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      const int64_t tile = first + task % count;
      if (task < count) {
        load(tile);
        ready_[tile].store(1, std::memory_order_release);
      } else {
        while (!ready_[tile].load(std::memory_order_acquire)) std::this_thread::yield();
        compute(task / count - 1, tile);
      }
    }
  }

  void load(int64_t tile) const {
    const float* x = input_.x + tile * kTile * input_.cols;
    float* of_tokens = of_tokens_ + tile * kTile;
    if (input_.tiled)
      kernels_.load_tiled(x, input_.cols, tile_at(tile), of_tokens);
    else
      kernels_.load_tile(x, tokens_in(tile), input_.cols, tile_at(tile), of_tokens);
  }

  int64_t tokens_in(int64_t tile) const {
    const int64_t left = input_.tokens - tile * kTile;
    return left < kTile ? left : kTile;
  }
  Word* tile_at(int64_t tile) const { return buffer_ + tile * weight_.cols * kTile; }

  void compute(int64_t row_block, int64_t tile) const {
    alignas(64) Word sums[kRowBlock * kTile];
    const int64_t first = row_block * weight_.row_block;
    const int64_t rows = weight_.rows - first < weight_.row_block ? weight_.rows - first : weight_.row_block;
    const int64_t tokens = tokens_in(tile);
    // Also rows past the last of W, as slices are whole: what they begin with must be there.
    Word starts[kRowBlock] = {};
    const bool half = tokens <= kHalf;
    for (int64_t row = 0; row < rows && scales_.start != nullptr; ++row) starts[row] = scales_.start[first + row];
    kernels_.multiply(weight_, row_block, tile_at(tile), starts, half, sums);
    // What is not computed goes nowhere, but is looked at.
    for (int64_t row = 0; half && row < rows; ++row)
      for (int64_t token = kHalf; token < kTile; ++token) sums[row * kTile + token] = Word{0};
    const float* of_tokens = of_tokens_ + tile * kTile;
    float* y = output_.y + tile * kTile * weight_.rows;
    if (output_.tiled)
      kernels_.finish(sums, first, rows, scales_, of_tokens, y + first * kTile);
    else
      kernels_.store_tile(sums, first, rows, tokens, scales_, of_tokens, y + first, weight_.rows);
  }

  const Kernels<Word>& kernels_;
  const SparseWeight<Word>& weight_;
  const Scales<Word>& scales_;
  const Input input_;
  const Output output_;
  Word* buffer_;
  float* of_tokens_;
  std::atomic<uint8_t>* ready_;
  const int64_t tiles_;
  std::vector<Queue> queues_;
};

} // namespace cap_hf
