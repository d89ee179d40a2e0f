// Sixteen floats at a time, in GCC's portable vectors; intrinsics where the compiler would do badly.
// Storage types are f32, bf16, f16; arithmetic is always f32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LORAMUX_AVX512 1
#include <immintrin.h>
#endif

namespace loramux {

constexpr int64_t W = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Not Vec{} + v, which the compiler may not fold: -0.0 + 0.0 is 0.0.
inline Vec splat(float v) { return Vec{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }

// ---- one value -------------------------------------------------------------------------------

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return as_float(uint32_t(value.bits) << 16); }

inline float widen(f16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Times 2^112 rebias the exponent; subnormals come out right because f32 can hold them.
  return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));
}

inline void narrow(float value, float* out) { *out = value; }

inline void narrow(float value, bf16* out) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t(std::isnan(value) ? 0x7fc0u : rounded);
}

inline void narrow(float value, f16* out) {
  const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {
    // Adding 0.5 lets the FPU round at f16's smallest step, 2^-24.
    half = as_bits(as_float(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

// ---- sixteen values --------------------------------------------------------------------------

#ifdef LORAMUX_AVX512

inline __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1u); }
inline Vec from_bf16(__m256i raw) {
  return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline Vec load(const float* p) { return (Vec)_mm512_loadu_ps(p); }
inline Vec load(const bf16* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const f16* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline Vec load_n(const float* p, int64_t n) { return (Vec)_mm512_maskz_loadu_ps(first(n), p); }
inline Vec load_n(const bf16* p, int64_t n) {
  return from_bf16(_mm256_maskz_loadu_epi16(first(n), p));
}
inline Vec load_n(const f16* p, int64_t n) {
  return (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}

inline __m256i to_bf16(Vec v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);
#else
  const __m512i bits = _mm512_castps_si512((__m512)v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  sum = _mm512_mask_set1_epi32(sum, nan, 0x7fc00000);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
#endif
}
inline __m256i to_f16(Vec v) { return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, (__m512)v); }
inline void store(bf16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, to_bf16(v)); }
inline void store(f16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, to_f16(v)); }
inline void store_n(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
inline void store_n(bf16* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), to_bf16(v));
}
inline void store_n(f16* p, Vec v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), to_f16(v)); }

inline Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
// Sets the lanes outside [lo, hi) to `other`.
inline Vec keep(Vec v, int64_t lo, int64_t hi, float other) {
  const __mmask16 mask = __mmask16(first(hi) & ~first(lo));
  return (Vec)_mm512_mask_blend_ps(mask, _mm512_set1_ps(other), (__m512)v);
}

// Lane j of the result is the sum of v[j]'s lanes.
inline Vec sums(const Vec* v) {
  __m512 quads[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 a = (__m512)v[4 * i], b = (__m512)v[4 * i + 1];
    const __m512 c = (__m512)v[4 * i + 2], d = (__m512)v[4 * i + 3];
    const __m512d ab =
        _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd =
        _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return (Vec)fold(fold(quads[0], quads[1]), fold(quads[2], quads[3]));
}

#else

template <class T>
inline Vec load_n(const T* p, int64_t n) {
  Vec v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
}
template <class T>
inline Vec load(const T* p) {
  float wide[W];
  for (int64_t i = 0; i < W; ++i) wide[i] = widen(p[i]);
  Vec v;
  std::memcpy(&v, wide, sizeof v);
  return v;
}
template <class T>
inline void store_n(T* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(v[i], p + i);
}
template <class T>
inline void store(T* p, Vec v) {
  float wide[W];
  std::memcpy(wide, &v, sizeof v);
  for (int64_t i = 0; i < W; ++i) narrow(wide[i], p + i);
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float sum(Vec v) {
  float total = 0;
  for (int64_t i = 0; i < W; ++i) total += v[i];
  return total;
}
inline float largest(Vec v) {
  float top = v[0];
  for (int64_t i = 1; i < W; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
inline Vec keep(Vec v, int64_t lo, int64_t hi, float other) {
  for (int64_t i = 0; i < W; ++i) v[i] = i >= lo && i < hi ? v[i] : other;
  return v;
}
inline Vec sums(const Vec* v) {
  Vec out;
  for (int64_t j = 0; j < W; ++j) out[j] = sum(v[j]);
  return out;
}

#endif

// One trip through the storage type and back: the rounding that eager code does between two ops.
inline Vec rounded(Vec v, const float*) { return v; }
template <class T>
inline Vec rounded(Vec v, const T*) {
  T stored[W];
  store(stored, v);
  return load(stored);
}

// e^x to about 1 ulp for x <= 88; below -87.3 it stays at e^-87.3, about 1e-38.
inline Vec exp(Vec x) {
  x = x < splat(-87.3f) ? splat(-87.3f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f, 1.0f, 1.0f})
    p = fma(p, r, splat(c));
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

inline Vec tanh(Vec x) { return 1.0f - 2.0f / (exp(x * 2.0f) + 1.0f); }

// Calls body(part, n) over 0..size in steps of 16; n < 16 only in the last.
template <class Body>
inline void by_sixteen(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + W <= size; i += W) body(i, W);
  if (i < size) body(i, size - i);
}

enum Dtype : int64_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

// Calls body(T{}) with the storage type that `dtype` names.
template <class Body>
inline void with_dtype(int64_t dtype, Body body) {
  if (dtype == kF32) body(float{});
  if (dtype == kBF16) body(bf16{});
  if (dtype == kF16) body(f16{});
}

}  // namespace loramux
