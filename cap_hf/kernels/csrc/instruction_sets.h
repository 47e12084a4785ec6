// The parts of the sparse product that differ between instruction sets: AVX-512, AVX2 and portable C++. The best that
// the processor has is chosen when the program runs, so that one library serves all processors.
#pragma once

#include <cstring>

#include "sparse_linear.h"

namespace cap_hf {

namespace portable {
typedef float Word;
// Four floats: what SSE2 and NEON hold in a register; elsewhere the compiler splits them.
typedef float Vector __attribute__((vector_size(16)));
typedef const float* Four;
constexpr int64_t kWidth = 4;
constexpr int kFullPass = 2, kHalfPass = 2;
inline Vector load(const float* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}
inline void store(float* to, Vector vector) { __builtin_memcpy(to, &vector, sizeof vector); }
inline Vector fill(float word) { return Vector{word, word, word, word}; }
inline Four four(const float* from) { return from; }
template <int i>
inline Vector lane(Four from) {
  return Vector{from[i], from[i], from[i], from[i]};
}
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
template <class Any>
inline void transpose(const Any* from, int64_t from_stride, Any* to, int64_t to_stride) {
  for (int64_t i = 0; i < kWidth; ++i)
    for (int64_t j = 0; j < kWidth; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}
#include "kernels.inc"
#include "float32.inc"
} // namespace portable

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CAP_HF_X86
} // namespace cap_hf
#include <immintrin.h>
namespace cap_hf {

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
typedef float Word;
typedef __m256 Vector;
typedef __m256 Four;
constexpr int64_t kWidth = 8;
constexpr int kFullPass = 2, kHalfPass = 2;
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector vector) { _mm256_storeu_ps(to, vector); }
inline Vector fill(float word) { return _mm256_set1_ps(word); }
inline Four four(const float* from) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)); }
template <int i>
inline Vector lane(Four from) {
  return _mm256_permute_ps(from, i * 0x55);
}
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
template <class Any> // 32 bits; only moved
inline void transpose(const Any* words, int64_t from_stride, Any* transposed, int64_t to_stride) {
  const float* from = reinterpret_cast<const float*>(words);
  float* to = reinterpret_cast<float*>(transposed);
  Vector a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = load(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  // Every 128-bit lane now holds four rows of one column.
  for (int i = 0; i < 4; ++i) {
    store(to + i * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    store(to + (i + 4) * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#include "kernels.inc"
#include "float32.inc"
} // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
typedef float Word;
typedef __m512 Vector;
typedef __m512 Four;
constexpr int64_t kWidth = 16;
constexpr int kFullPass = 2, kHalfPass = 1;
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector vector) { _mm512_storeu_ps(to, vector); }
inline Vector fill(float word) { return _mm512_set1_ps(word); }
inline Four four(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
template <int i>
inline Vector lane(Four from) {
  return _mm512_permute_ps(from, i * 0x55);
}
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
template <class Any> // 32 bits; only moved
inline void transpose(const Any* words, int64_t from_stride, Any* transposed, int64_t to_stride) {
  const float* from = reinterpret_cast<const float*>(words);
  float* to = reinterpret_cast<float*>(transposed);
  Vector a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = load(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  // Every 128-bit lane now holds four rows of one column: lane l of a[4 * g + i] those of column 4 * l + i.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector low01 = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x44);
    const Vector high01 = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xee);
    const Vector low23 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x44);
    const Vector high23 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xee);
    store(to + i * to_stride, _mm512_shuffle_f32x4(low01, low23, 0x88));
    store(to + (i + 4) * to_stride, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    store(to + (i + 8) * to_stride, _mm512_shuffle_f32x4(high01, high23, 0x88));
    store(to + (i + 12) * to_stride, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
}
#include "kernels.inc"
#include "float32.inc"
} // namespace avx512
#pragma GCC pop_options
#endif

// Returns the kernels of "avx512", "avx2" or "portable"; null if the processor lacks them or the name is another. The
// names of the int8 kernels stand for what they build on, so that one name can be forced on a whole model.
inline const Kernels<float>* kernels_named(const char* name) {
  if (std::strcmp(name, "portable") == 0) return &portable::kKernels;
#ifdef CAP_HF_X86
  if ((std::strcmp(name, "avx2") == 0 || std::strcmp(name, "avx_vnni") == 0) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma"))
    return &avx2::kKernels;
  if ((std::strcmp(name, "avx512") == 0 || std::strcmp(name, "avx512_vnni") == 0) &&
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &avx512::kKernels;
#endif
  return nullptr;
}

// Returns the fastest kernels that this processor has.
inline const Kernels<float>* best_kernels() {
  for (const char* name : {"avx512", "avx2"})
    if (kernels_named(name) != nullptr) return kernels_named(name);
  return kernels_named("portable");
}

} // namespace cap_hf
