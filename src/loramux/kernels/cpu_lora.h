// y += LoRA deltas. First every (segment, member, slice) shrinks x to h, then every output tile is
// read once, takes all its members' rows of B and is rounded once.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu_simd.h"

namespace loramux {

struct Site {
  const void *a, *b;             // [S, R, in], [R, N]
  const int32_t* row_r;          // [S, R]
  const float* row_scale;        // [S, R]
  const int64_t* slice_starts;   // [S + 1]
  int64_t slices, rows, in, width, dtype;
};

struct Segments {
  const int32_t *starts, *ends, *member_offsets, *member_rows;
  const float* member_scales;
  int64_t count;
};

// One member of one segment in one slice; its h is [tokens, r] at `h`.
struct LoraItem {
  int64_t start, end, slice, p, r, h;
  float scale;
};
struct ShrinkUnit {
  int32_t item, token, tokens, row, rows;
};
struct ExpandUnit {
  int32_t item, items, token, tokens, column, columns;
};

constexpr int64_t kTokens = 64, kRows = 8, kColumns = 128;

struct LoraPlan {
  std::vector<LoraItem> items;
  std::vector<ShrinkUnit> shrinks;
  std::vector<ExpandUnit> expands;
  std::vector<float> h;
  int64_t work = 0;  // weight elements touched, counted once per four tokens

  // False if a segment points outside the tokens or the pool.
  bool build(const Site& site, const Segments& segments, int64_t tokens) {
    items.clear(), shrinks.clear(), expands.clear();
    work = 0;
    int64_t size = 0;
    for (int64_t g = 0; g < segments.count; ++g) {
      const int64_t start = segments.starts[g], end = segments.ends[g];
      if (start >= end) continue;
      if (start < 0 || end > tokens) return false;
      for (int64_t s = 0; s < site.slices; ++s) {
        const int64_t before = int64_t(items.size());
        for (int64_t m = segments.member_offsets[g]; m < segments.member_offsets[g + 1]; ++m) {
          const int64_t p = segments.member_rows[m], at = s * site.rows + p;
          if (p < 0 || p >= site.rows) return false;
          const int64_t r = site.row_r[at];
          if (r < 0 || p + r > site.rows) return false;
          if (r == 0) continue;
          items.push_back({start, end, s, p, r, size,
                           segments.member_scales[m] * site.row_scale[at]});
          size += (end - start) * r;
          add_shrinks(items.back());
        }
        if (int64_t(items.size()) > before) add_expands(site, before);
      }
    }
    if (int64_t(h.size()) < size) h.resize(size);
    return true;
  }

  void add_shrinks(const LoraItem& item) {
    for (int64_t t = item.start; t < item.end; t += kTokens)
      for (int64_t j = 0; j < item.r; j += kRows)
        shrinks.push_back({int32_t(items.size() - 1), int32_t(t),
                           int32_t(std::min(kTokens, item.end - t)), int32_t(j),
                           int32_t(std::min(kRows, item.r - j))});
  }

  void add_expands(const Site& site, int64_t before) {
    const LoraItem& item = items.back();
    const int64_t lo = site.slice_starts[item.slice], hi = site.slice_starts[item.slice + 1];
    for (size_t i = before; i < items.size(); ++i)
      work += items[i].r * (site.in + hi - lo) * ((item.end - item.start + 3) / 4);
    for (int64_t t = item.start; t < item.end; t += kTokens)
      for (int64_t c = lo; c < hi; c += kColumns)
        expands.push_back({int32_t(before), int32_t(items.size() - before), int32_t(t),
                           int32_t(std::min(kTokens, item.end - t)), int32_t(c),
                           int32_t(std::min(kColumns, hi - c))});
  }
};

// out[t * out_stride + j] = scale * dot(x row t, a row j) for TT rows of x and RR rows of a.
template <int TT, int RR, class X, class A>
inline void dot_tile(const X* x, int64_t x_stride, const A* a, int64_t in, float scale, float* out,
                     int64_t out_stride) {
  Vec acc[TT][RR] = {};
  const auto step = [&](auto loader, int64_t i) {
    Vec xs[TT];
    for (int t = 0; t < TT; ++t) xs[t] = loader(x + t * x_stride + i);
    for (int j = 0; j < RR; ++j) {
      const Vec as = loader(a + j * in + i);
      for (int t = 0; t < TT; ++t) acc[t][j] = fma(xs[t], as, acc[t][j]);
    }
  };
  int64_t i = 0;
#if defined(LORAMUX_AVX512) && defined(__AVX512BF16__)
  if constexpr (std::is_same_v<X, bf16> && std::is_same_v<A, bf16>) {
    for (; i + 32 <= in; i += 32) {
      __m512bh xs[TT];
      for (int t = 0; t < TT; ++t) xs[t] = (__m512bh)_mm512_loadu_si512(x + t * x_stride + i);
      for (int j = 0; j < RR; ++j) {
        const __m512bh as = (__m512bh)_mm512_loadu_si512(a + j * in + i);
        for (int t = 0; t < TT; ++t)
          acc[t][j] = (Vec)_mm512_dpbf16_ps((__m512)acc[t][j], xs[t], as);
      }
    }
  }
#endif
  for (; i + W <= in; i += W) step([](const auto* p) { return load(p); }, i);
  if (i < in) step([n = in - i](const auto* p) { return load_n(p, n); }, i);
  for (int t = 0; t < TT; ++t)
    for (int j = 0; j < RR; ++j) out[t * out_stride + j] = sum(acc[t][j]) * scale;
}

template <class X, class A>
void shrink(const Site& site, LoraPlan& plan, const ShrinkUnit& unit, const X* x,
            int64_t x_stride) {
  const LoraItem& item = plan.items[unit.item];
  const A* a = (const A*)site.a + (item.slice * site.rows + item.p) * site.in;
  const int64_t tokens = unit.token + unit.tokens, rows = unit.row + unit.rows;
  for (int64_t t = unit.token; t < tokens;) {
    const bool four = t + 4 <= tokens;
    float* h = plan.h.data() + item.h + (t - item.start) * item.r;
    const X* xt = x + t * x_stride;
    int64_t j = unit.row;
    for (; j + 4 <= rows; j += 4)
      four ? dot_tile<4, 4>(xt, x_stride, a + j * site.in, site.in, item.scale, h + j, item.r)
           : dot_tile<1, 4>(xt, x_stride, a + j * site.in, site.in, item.scale, h + j, item.r);
    for (; j < rows; ++j)
      four ? dot_tile<4, 1>(xt, x_stride, a + j * site.in, site.in, item.scale, h + j, item.r)
           : dot_tile<1, 1>(xt, x_stride, a + j * site.in, site.in, item.scale, h + j, item.r);
    t += four ? 4 : 1;
  }
}

// y tile (TT rows, CC * 16 columns, or `n` < 16 if CC == 1) += sum over items, j of h[t, j] * b[j].
template <int TT, int CC, class Y, class B>
inline void axpy_tile(const Site& site, const LoraPlan& plan, const ExpandUnit& unit, int64_t token,
                      int64_t column, int64_t n, Y* y, int64_t y_stride) {
  const auto get = [&](const auto* p) { return n == W ? load(p) : load_n(p, n); };
  Vec acc[TT][CC];
  for (int t = 0; t < TT; ++t)
    for (int c = 0; c < CC; ++c) acc[t][c] = get(y + (token + t) * y_stride + column + c * W);
  for (int64_t i = unit.item; i < unit.item + unit.items; ++i) {
    const LoraItem& item = plan.items[i];
    const float* h = plan.h.data() + item.h + (token - item.start) * item.r;
    const B* b = (const B*)site.b + item.p * site.width + column;
    for (int64_t j = 0; j < item.r; ++j, b += site.width)
      for (int c = 0; c < CC; ++c) {
        const Vec bs = get(b + c * W);
        for (int t = 0; t < TT; ++t) acc[t][c] = fma(splat(h[t * item.r + j]), bs, acc[t][c]);
      }
  }
  for (int t = 0; t < TT; ++t)
    for (int c = 0; c < CC; ++c) {
      Y* out = y + (token + t) * y_stride + column + c * W;
      n == W ? store(out, acc[t][c]) : store_n(out, acc[t][c], n);
    }
}

template <class Y, class B>
void expand(const Site& site, const LoraPlan& plan, const ExpandUnit& unit, Y* y,
            int64_t y_stride) {
  const int64_t tokens = unit.token + unit.tokens, columns = unit.column + unit.columns;
  for (int64_t t = unit.token; t < tokens;) {
    const bool four = t + 4 <= tokens;
    int64_t c = unit.column;
    if (!four)
      for (; c + 8 * W <= columns; c += 8 * W)
        axpy_tile<1, 8, Y, B>(site, plan, unit, t, c, W, y, y_stride);
    for (; c + 4 * W <= columns; c += 4 * W)
      four ? axpy_tile<4, 4, Y, B>(site, plan, unit, t, c, W, y, y_stride)
           : axpy_tile<1, 4, Y, B>(site, plan, unit, t, c, W, y, y_stride);
    for (; c < columns; c += W) {
      const int64_t n = std::min(W, columns - c);
      four ? axpy_tile<4, 1, Y, B>(site, plan, unit, t, c, n, y, y_stride)
           : axpy_tile<1, 1, Y, B>(site, plan, unit, t, c, n, y, y_stride);
    }
    t += four ? 4 : 1;
  }
}

template <class X, class A>
void run_lora(const Site& site, LoraPlan& plan, const X* x, int64_t x_stride, X* y,
              int64_t y_stride, int threads) {
  const int64_t shrinks = int64_t(plan.shrinks.size()), expands = int64_t(plan.expands.size());
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < shrinks; ++i)
      shrink<X, A>(site, plan, plan.shrinks[i], x, x_stride);
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t i = 0; i < expands; ++i) expand<X, A>(site, plan, plan.expands[i], y, y_stride);
  }
}

}  // namespace loramux
