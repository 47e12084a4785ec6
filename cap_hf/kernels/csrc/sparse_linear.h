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
// for, y is the GELU of that (by the error function, not by tanh), and that times the row's factor (LayerScale).
template <class Word>
struct Scales {
  const Word* start;   // [rows] or null: where sums begin. The bias of floats
  const float* rows;   // [rows]; int8 only
  const float* bias;   // [rows] or null; int8 only: floats begin with it
  bool gelu;
  const float* factors = nullptr; // [rows] or null; int8 only
};

// A layer: its weight, and what its sums become.
template <class Word>
struct Layer {
  SparseWeight<Word> weight;
  Scales<Word> scales;
};

// LayerNorm of a token's numbers before they go into a product; int8 only.
struct Norm {
  const float* weight = nullptr; // [cols], or null: they go in as they are
  const float* bias = nullptr;   // [cols]
  float epsilon = 0.0f;
};

// Patches of images [images][channels][height][width] as tokens: [channel][row][col] of each, row by row of patches.
struct Patches {
  int64_t channels, height, width;
  int64_t patch_height, patch_width;

  int64_t across() const { return width / patch_width; }
  int64_t per_image() const { return height / patch_height * across(); }
  int64_t numbers() const { return channels * patch_height * patch_width; }

  // to[number] = those of one patch of all images x.
  void take(const float* x, int64_t patch, float* to) const {
    const int64_t image = patch / per_image(), top = patch % per_image() / across() * patch_height,
                  left = patch % per_image() % across() * patch_width;
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t row = 0; row < patch_height; ++row, to += patch_width)
        __builtin_memcpy(to, x + ((image * channels + channel) * height + top + row) * width + left,
                         patch_width * sizeof(float));
  }
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
  // y[token * stride + row] = what sums[row][token] becomes, + added[token * stride + row] unless that is null (int8
  // only); `first` is the row block's first row.
  void (*store_tile)(const Word* sums, int64_t first, int64_t rows, int64_t tokens, const Scales<Word>& scales,
                     const float* of_tokens, const float* added, float* y, int64_t stride);
  // values[row][token] = what sums[row][token] becomes, with kTile tokens; int8 only.
  void (*finish)(const Word* sums, int64_t first, int64_t rows, const Scales<Word>& scales, const float* of_tokens,
                 float* values);
  // What load_tile does for kTile tokens whose floats are tiled, values[col][token]; int8 only.
  void (*load_tiled)(const float* values, int64_t cols, Word* tile, float* scales);
  // y[token][col] = LayerNorm of x[token][col]; int8 only.
  void (*normalise)(const float* x, int64_t tokens, int64_t cols, const Norm& norm, float* y);
  // Attention of one head for the queries `first` to before `last`, see attention.h; int8 only. `next` is the head that
  // is read after it, or null.
  void (*attend)(const Head& head, const Head* next, int64_t first, int64_t last, Word* memory);
};

// What goes into a product: x [tokens][cols], or, tiled, [tiles][cols][kTile], or images, whose patches are the tokens.
struct Input {
  const float* x;
  int64_t cols;
  int64_t tokens;
  bool tiled;
  Norm norm = {};                   // not if tiled
  const Patches* patches = nullptr; // of the images x, or null; then without norm
  int64_t first_patch = 0;
};

// What comes out of it: y [tokens][rows], or, tiled, [tiles][rows][kTile].
struct Output {
  float* y;
  bool tiled;
  const float* added = nullptr; // as y, or null: what it is added to (the residual); not if tiled
};

// One of the layers that get the same input, and what comes out of it.
template <class Word>
struct Part {
  Layer<Word> layer;
  Output output;
};

// The products of layers that get the same input, shared by the threads that call work(). Every thread has a queue of
// consecutive tiles, the same in every layer: what a thread writes here it reads in the next layer, and moving that
// between the caches of two cores would cost more than sparsity saves. The tasks of a queue are, in order, to transpose
// each of its tiles, and to multiply each row block with each tile. A thread whose queue is empty takes tasks from the
// others'. A tile that is multiplied must be transposed; the thread that took that task is at work on it, so the wait is
// short and ends.
template <class Word>
class Product {
 public:
  // buffer [tiles][cols][kTile], of_tokens [tiles][kTile] and ready [tiles], all 0, are working memory.
  Product(const Kernels<Word>& kernels, const std::vector<Part<Word>>& parts, const Input& input, Word* buffer,
          float* of_tokens, std::atomic<uint8_t>* ready, int64_t queues)
      : kernels_(kernels), parts_(parts), input_(input), buffer_(buffer), of_tokens_(of_tokens), ready_(ready),
        tiles_(tiles(input.tokens)), queues_(queues) {
    for (const Part<Word>& part : parts) row_blocks_ += part.layer.weight.row_blocks();
  }

  static int64_t tiles(int64_t tokens) { return (tokens + kTile - 1) / kTile; }

  // Takes tasks, from queue `own` first, until none is left.
  void work(int64_t own) {
    // Before a task is taken: another thread would wait for ever for one that fails for want of memory.
    if ((input_.norm.weight != nullptr || input_.patches != nullptr) &&
        static_cast<int64_t>(rows().size()) < kTile * input_.cols)
      rows().resize(kTile * input_.cols);
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
    const int64_t tasks = count * (1 + row_blocks_);
    for (int64_t task; (task = queues_[queue].next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      const int64_t tile = first + task % count;
      if (task < count) {
        load(tile);
        ready_[tile].store(1, std::memory_order_release);
      } else {
        while (!ready_[tile].load(std::memory_order_acquire)) std::this_thread::yield();
        int64_t row_block = task / count - 1;
        const Part<Word>* part = parts_.data();
        for (; row_block >= part->layer.weight.row_blocks(); ++part) row_block -= part->layer.weight.row_blocks();
        compute(*part, row_block, tile);
      }
    }
  }

  // A tile's tokens [token][col] after LayerNorm, or its patches; kept between calls, as all working memory is.
  static std::vector<float>& rows() {
    thread_local std::vector<float> tile;
    return tile;
  }

  void load(int64_t tile) const {
    const float* x = input_.x + tile * kTile * input_.cols;
    float* of_tokens = of_tokens_ + tile * kTile;
    if (input_.tiled) {
      kernels_.load_tiled(x, input_.cols, tile_at(tile), of_tokens);
    } else if (input_.patches != nullptr) {
      for (int64_t token = 0; token < tokens_in(tile); ++token)
        input_.patches->take(input_.x, input_.first_patch + tile * kTile + token, rows().data() + token * input_.cols);
      kernels_.load_tile(rows().data(), tokens_in(tile), input_.cols, tile_at(tile), of_tokens);
    } else if (input_.norm.weight == nullptr) {
      kernels_.load_tile(x, tokens_in(tile), input_.cols, tile_at(tile), of_tokens);
    } else {
      kernels_.normalise(x, tokens_in(tile), input_.cols, input_.norm, rows().data());
      kernels_.load_tile(rows().data(), tokens_in(tile), input_.cols, tile_at(tile), of_tokens);
    }
  }

  int64_t tokens_in(int64_t tile) const {
    const int64_t left = input_.tokens - tile * kTile;
    return left < kTile ? left : kTile;
  }
  Word* tile_at(int64_t tile) const { return buffer_ + tile * parts_[0].layer.weight.cols * kTile; }

  void compute(const Part<Word>& part, int64_t row_block, int64_t tile) const {
    alignas(64) Word sums[kRowBlock * kTile];
    const auto& [weight, scales] = part.layer;
    const int64_t first = row_block * weight.row_block;
    const int64_t rows = weight.rows - first < weight.row_block ? weight.rows - first : weight.row_block;
    const int64_t tokens = tokens_in(tile);
    // Also rows past the last of W, as slices are whole: what they begin with must be there.
    Word starts[kRowBlock] = {};
    const bool half = tokens <= kHalf;
    for (int64_t row = 0; row < rows && scales.start != nullptr; ++row) starts[row] = scales.start[first + row];
    kernels_.multiply(weight, row_block, tile_at(tile), starts, half, sums);
    // What is not computed goes nowhere, but is looked at.
    for (int64_t row = 0; half && row < rows; ++row)
      for (int64_t token = kHalf; token < kTile; ++token) sums[row * kTile + token] = Word{0};
    const float* of_tokens = of_tokens_ + tile * kTile;
    const int64_t start = tile * kTile * weight.rows;
    float* y = part.output.y + start;
    const float* added = part.output.added != nullptr ? part.output.added + start + first : nullptr;
    if (part.output.tiled)
      kernels_.finish(sums, first, rows, scales, of_tokens, y + first * kTile);
    else
      kernels_.store_tile(sums, first, rows, tokens, scales, of_tokens, added, y + first, weight.rows);
  }

  const Kernels<Word>& kernels_;
  const std::vector<Part<Word>>& parts_; // one at least, of the same number of columns
  int64_t row_blocks_ = 0;
  const Input input_;
  Word* buffer_;
  float* of_tokens_;
  std::atomic<uint8_t>* ready_;
  const int64_t tiles_;
  std::vector<Queue> queues_;
};

} // namespace cap_hf
