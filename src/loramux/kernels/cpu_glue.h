// Norm, activation, rotation and cache writes: each the eager chain of a Hugging Face model in one
// pass, rounded to the storage type at the same places.
#pragma once

#include "cpu_simd.h"

namespace loramux {

enum NormMode : int64_t { kLlama = 0, kPlain = 1, kGemma = 2 };

// One row of an RMS norm; if `total` is not null the row is first x + residual, kept in `total`.
template <class T>
void norm_row(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t size,
              float eps, int64_t mode) {
  const auto get = [](const T* p, int64_t n) { return n == W ? load(p) : load_n(p, n); };
  const auto put = [](T* p, Vec v, int64_t n) { n == W ? store(p, v) : store_n(p, v, n); };
  Vec squares = {};
  by_sixteen(size, [&](int64_t i, int64_t n) {
    Vec v = get(x + i, n);
    if (total) {
      v = rounded(v + get(residual + i, n), x);
      put(total + i, v, n);
    }
    squares = fma(v, v, squares);
  });
  const float inverse = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
  const T* source = total ? total : x;
  by_sixteen(size, [&](int64_t i, int64_t n) {
    Vec v = get(source + i, n) * inverse;
    const Vec w = get(weight + i, n);
    if (mode == kLlama) v = rounded(v, x) * w;
    if (mode == kPlain) v = v * w;
    if (mode == kGemma) v = v * (w + 1.0f);
    put(out + i, v, n);
  });
}

template <class T>
void silu_mul_row(const T* gate, const T* up, T* out, int64_t size) {
  by_sixteen(size, [&](int64_t i, int64_t n) {
    const Vec g = n == W ? load(gate + i) : load_n(gate + i, n);
    const Vec u = n == W ? load(up + i) : load_n(up + i, n);
    const Vec result = rounded(g / (exp(-g) + 1.0f), gate) * u;
    n == W ? store(out + i, result) : store_n(out + i, result, n);
  });
}

// x turns in place: (lo, hi) -> (lo * cos - hi * sin, hi * cos + lo * sin).
template <class T>
void rope_row(T* x, const T* cos, const T* sin, int64_t half) {
  by_sixteen(half, [&](int64_t i, int64_t n) {
    const auto get = [n](const T* p) { return n == W ? load(p) : load_n(p, n); };
    const Vec lo = get(x + i), hi = get(x + half + i);
    const Vec new_lo = rounded(lo * get(cos + i), x) - rounded(hi * get(sin + i), x);
    const Vec new_hi =
        rounded(hi * get(cos + half + i), x) + rounded(lo * get(sin + half + i), x);
    n == W ? store(x + i, new_lo) : store_n(x + i, new_lo, n);
    n == W ? store(x + half + i, new_hi) : store_n(x + half + i, new_hi, n);
  });
}

inline bool slots_exist(const int64_t* slots, int64_t tokens, int64_t count) {
  for (int64_t t = 0; t < tokens; ++t)
    if (slots[t] < 0 || slots[t] >= count) return false;
  return true;
}

// Copies rows [T][heads][bytes] with byte strides into cache slots of heads * bytes each.
inline void write_slots(const char* from, int64_t token_stride, int64_t head_stride, char* cache,
                        int64_t block_stride, int64_t block_size, const int64_t* slots,
                        int64_t tokens, int64_t heads, int64_t bytes) {
  for (int64_t t = 0; t < tokens; ++t) {
    char* to = cache + slots[t] / block_size * block_stride +
               slots[t] % block_size * heads * bytes;
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(to + h * bytes, from + t * token_stride + h * head_stride, bytes);
  }
}

}  // namespace loramux
