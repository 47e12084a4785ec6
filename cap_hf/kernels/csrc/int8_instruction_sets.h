// The parts of the sparse int8 product that differ between instruction sets: AVX-512 VNNI, AVX-VNNI, AVX2 and portable
// C++. All of them give the same bits. x is unsigned, W signed; four products are added to each of the 32-bit sums.
#pragma once

#include <cstring>

#include "attention.h"
#include "instruction_sets.h"

namespace cap_hf {

namespace portable_int8 {
typedef int32_t Word;
typedef int32_t Vector __attribute__((vector_size(16)));
typedef int16_t Pairs __attribute__((vector_size(16)));
typedef const int32_t* Four;
// A word's first and third number in the two halves of 32 bits, and its second and fourth.
struct Weights {
  Pairs even, odd;
};
constexpr int64_t kWidth = 4;
constexpr int kFullPass = 2, kHalfPass = 2;
inline Vector load(const int32_t* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}
inline void store(int32_t* to, Vector vector) { __builtin_memcpy(to, &vector, sizeof vector); }
inline Vector fill(int32_t word) { return Vector{word, word, word, word}; }
inline Four four(const int32_t* from) { return from; }
inline Weights spread(const int32_t* from) {
  const Pairs word = reinterpret_cast<Pairs>(fill(*from));
  return {(word << 8) >> 8, word >> 8};
}
template <int i>
inline Weights lane(Four from) {
  return spread(from + i);
}
// A product of 255 and -127 fits into 16 bits, a sum of two does not.
inline Vector multiply_add(Weights weights, Vector x, Vector sum) {
  const Pairs even = reinterpret_cast<Pairs>(x & 0x00ff00ff) * weights.even;
  const Pairs odd = reinterpret_cast<Pairs>(x >> 8 & 0x00ff00ff) * weights.odd;
  const Vector a = reinterpret_cast<Vector>(even), b = reinterpret_cast<Vector>(odd);
  return sum + (((a << 16) >> 16) + (a >> 16)) + (((b << 16) >> 16) + (b >> 16));
}
using portable::transpose;
#include "kernels.inc"
#include "int8.inc"
#include "attention.inc"
} // namespace portable_int8

#ifdef CAP_HF_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2_int8 {
typedef int32_t Word;
typedef __m256i Vector;
typedef __m256i Four;
struct Weights {
  Vector even, odd;
};
constexpr int64_t kWidth = 8;
constexpr int kFullPass = 2, kHalfPass = 2;
inline Vector load(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store(int32_t* to, Vector vector) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), vector); }
inline Vector fill(int32_t word) { return _mm256_set1_epi32(word); }
inline Four four(const int32_t* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Weights widened(Vector word) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(word, 8), 8), _mm256_srai_epi16(word, 8)};
}
template <int i>
inline Weights lane(Four from) {
  return widened(_mm256_shuffle_epi32(from, i * 0x55));
}
inline Weights spread(const int32_t* from) { return widened(fill(*from)); }
// vpmaddubsw would add pairs in 16 bits, where two large products do not fit: the numbers are widened first.
inline Vector multiply_add(Weights weights, Vector x, Vector sum) {
  const Vector even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0xff)), weights.even);
  const Vector odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), weights.odd);
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
using avx2::transpose;
#include "kernels.inc"
#include "int8.inc"
#include "attention.inc"
} // namespace avx2_int8
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avxvnni,avx2,fma")
namespace avx_vnni_int8 {
typedef int32_t Word;
typedef __m256i Vector;
typedef __m256i Four;
constexpr int64_t kWidth = 8;
constexpr int kFullPass = 2, kHalfPass = 2;
inline Vector load(const int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store(int32_t* to, Vector vector) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), vector); }
inline Vector fill(int32_t word) { return _mm256_set1_epi32(word); }
inline Four four(const int32_t* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
template <int i>
inline Vector lane(Four from) {
  return _mm256_shuffle_epi32(from, i * 0x55);
}
inline Vector spread(const int32_t* from) { return fill(*from); }
inline Vector multiply_add(Vector weights, Vector x, Vector sum) { return _mm256_dpbusd_avx_epi32(sum, x, weights); }
using avx2::transpose;
#include "kernels.inc"
#include "int8.inc"
#include "attention.inc"
} // namespace avx_vnni_int8
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx2,fma")
namespace avx512_vnni_int8 {
typedef int32_t Word;
typedef __m512i Vector;
typedef __m512i Four;
constexpr int64_t kWidth = 16;
constexpr int kFullPass = 2, kHalfPass = 1;
inline Vector load(const int32_t* from) { return _mm512_loadu_si512(from); }
inline void store(int32_t* to, Vector vector) { _mm512_storeu_si512(to, vector); }
inline Vector fill(int32_t word) { return _mm512_set1_epi32(word); }
inline Four four(const int32_t* from) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
template <int i>
inline Vector lane(Four from) {
  return _mm512_shuffle_epi32(from, static_cast<_MM_PERM_ENUM>(i * 0x55));
}
inline Vector spread(const int32_t* from) { return fill(*from); }
inline Vector multiply_add(Vector weights, Vector x, Vector sum) { return _mm512_dpbusd_epi32(sum, x, weights); }
using avx512::transpose;
#include "kernels.inc"
#include "int8.inc"
#include "attention.inc"
} // namespace avx512_vnni_int8
#pragma GCC pop_options
#endif

// Returns the kernels of "avx512_vnni", "avx_vnni", "avx2" or "portable"; null if the processor lacks them or the name
// is another. "avx512", which is the float32 kernel's and has no VNNI, stands for "avx2" here.
inline const Kernels<int32_t>* int8_kernels_named(const char* name) {
  if (std::strcmp(name, "portable") == 0) return &portable_int8::kKernels;
#ifdef CAP_HF_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if ((std::strcmp(name, "avx2") == 0 || std::strcmp(name, "avx512") == 0) && avx2) return &avx2_int8::kKernels;
  if (std::strcmp(name, "avx_vnni") == 0 && avx2 && __builtin_cpu_supports("avxvnni")) return &avx_vnni_int8::kKernels;
  if (std::strcmp(name, "avx512_vnni") == 0 && kernels_named("avx512") != nullptr &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
    return &avx512_vnni_int8::kKernels;
#endif
  return nullptr;
}

// Returns the fastest kernels that this processor has.
inline const Kernels<int32_t>* best_int8_kernels() {
  for (const char* name : {"avx512_vnni", "avx_vnni", "avx2"})
    if (int8_kernels_named(name) != nullptr) return int8_kernels_named(name);
  return int8_kernels_named("portable");
}

} // namespace cap_hf
