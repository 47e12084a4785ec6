// y = x W^T + b for a sparse W and a dense x: the packed weight, and the product over any instruction set.
//
// Nothing of PyTorch is included here, so that the product can be compiled and checked by itself in a second.
//
// Words
//   token         a row of x, and of y
//   tile          kTile tokens, transposed: [column][token], so that one weight meets 32 contiguous floats
//   row block     up to kRowBlock rows of W, whose sums for one tile are in a buffer
//   column block  columns of W for which a tile's part stays in the L1 cache while all rows of a row block pass over it
//   slice         four rows of a row block, taken together; rows are sorted by their number of weights in the column
//                 block, so that a slice's rows have about as many (the SELL-C-sigma format, arXiv 1307.6209)
//   segment       the weights of one slice in one column block
//   step          one weight of each row of a slice (0 for a row that has no more), four numbers in one load; the sums
//                 of four rows x 32 tokens are in registers, four independent chains
//   offset        where a weight's column starts in its column block of a tile, in units of 8 bytes
//   queue         the tiles that one thread begins with
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
constexpr int64_t kColBlock = 4095; // columns in a block, at most: 16 times a column, its offset, has 16 bits

// Segments are numbered by row block, then column block, then slice; the last row block has as many slices as the
// others. Segment s holds the steps from starts[s] to before starts[s + 1].
struct SparseWeight {
  int64_t rows;
  int64_t cols;
  int64_t row_block;       // a multiple of kSlice, at most kRowBlock
  int64_t col_block;       // at most 4095
  const float* values;     // [steps][4]; 0 where a row has no more weights
  const uint16_t* offsets; // [steps][4]: 16 x the column, counted in its column block
  const int32_t* starts;   // [segments + 1]
  const int16_t* order;    // [segments][4]: the rows of the slice, counted in their row block

  int64_t row_blocks() const { return (rows + row_block - 1) / row_block; }
  int64_t col_blocks() const { return (cols + col_block - 1) / col_block; }
  int64_t slices() const { return row_block / kSlice; }
  int64_t segments() const { return row_blocks() * col_blocks() * slices(); }
};

// The functions that are compiled for every instruction set.
struct Kernels {
  // tile[col][token] = x[token][col]; 0 for tokens past the last.
  void (*load_tile)(const float* x, int64_t tokens, int64_t cols, float* tile);
  // sums[row][token] += the product of one row block with a tile of kTile (or, if half, kHalf) tokens.
  void (*multiply)(const SparseWeight& weight, int64_t row_block, const float* tile, bool half, float* sums);
  // y[token * stride + row] = sums[row][token].
  void (*store_tile)(const float* sums, int64_t rows, int64_t tokens, float* y, int64_t stride);
};

// One product, shared by the threads that call work(). Every thread has a queue of consecutive tiles, the same in every
// layer: what a thread writes here it reads in the next layer, and moving that between the caches of two cores would
// cost more than sparsity saves. The tasks of a queue are, in order, to transpose each of its tiles, and to multiply
// each row block with each tile. A thread whose queue is empty takes tasks from the others'. A tile that is multiplied
// must be transposed; the thread that took that task is at work on it, so the wait is short and ends.
class Product {
 public:
  // x [tokens][cols], bias [rows] or null, y [tokens][rows]; buffer [tiles][cols][kTile] and ready [tiles], all 0,
  // are working memory.
  Product(const Kernels& kernels, const SparseWeight& weight, const float* x, int64_t tokens, const float* bias,
          float* y, float* buffer, std::atomic<uint8_t>* ready, int64_t queues)
      : kernels_(kernels), weight_(weight), x_(x), tokens_(tokens), bias_(bias), y_(y), buffer_(buffer),
        ready_(ready), tiles_(tiles(tokens)), queues_(queues) {}

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
        kernels_.load_tile(x_ + tile * kTile * weight_.cols, tokens_in(tile), weight_.cols, tile_at(tile));
        ready_[tile].store(1, std::memory_order_release);
      } else {
        while (!ready_[tile].load(std::memory_order_acquire)) std::this_thread::yield();
        compute(task / count - 1, tile);
      }
    }
  }

  int64_t tokens_in(int64_t tile) const {
    const int64_t left = tokens_ - tile * kTile;
    return left < kTile ? left : kTile;
  }
  float* tile_at(int64_t tile) const { return buffer_ + tile * weight_.cols * kTile; }

  void compute(int64_t row_block, int64_t tile) const {
    alignas(64) float sums[kRowBlock * kTile];
    const int64_t first = row_block * weight_.row_block;
    const int64_t rows = weight_.rows - first < weight_.row_block ? weight_.rows - first : weight_.row_block;
    const int64_t tokens = tokens_in(tile);
    // Also rows past the last of W, as slices are whole: the numbers that they add to must be there.
    for (int64_t row = 0; row < weight_.row_block; ++row) {
      const float start = bias_ != nullptr && row < rows ? bias_[first + row] : 0.0f;
      for (int64_t token = 0; token < kTile; ++token) sums[row * kTile + token] = start;
    }
    kernels_.multiply(weight_, row_block, tile_at(tile), tokens <= kHalf, sums);
    kernels_.store_tile(sums, rows, tokens, y_ + tile * kTile * weight_.rows + first, weight_.rows);
  }

  const Kernels& kernels_;
  const SparseWeight& weight_;
  const float* x_;
  const int64_t tokens_;
  const float* bias_;
  float* y_;
  float* buffer_;
  std::atomic<uint8_t>* ready_;
  const int64_t tiles_;
  std::vector<Queue> queues_;
};

} // namespace cap_hf
