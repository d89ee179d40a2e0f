// Attention of few queries per sequence over the paged cache. A unit is one KV head of one sequence
// over a range of positions; all query heads that share the KV head ride along, so K and V are
// read once. Ranges of one head are merged afterwards (flash decoding).
#pragma once

#include <algorithm>
#include <vector>

#include "cpu_simd.h"

namespace loramux {

struct AttentionArgs {
  const void *q, *k, *v;
  void* out;                            // [T, H, Dv], contiguous
  const int32_t* tables;                // [Q, table_stride]
  const int32_t *starts, *contexts;     // [Q + 1], [Q]
  const int32_t* chosen;                // [num_chosen] indices of the sequences to do
  const float* sinks;                   // [H] a score more of each head's softmax, or null
  const int32_t* last_keys;             // [T] see AttentionBatch, or null
  int64_t num_chosen, table_stride, q_token, q_head, k_block, v_block;
  int64_t heads, kv_heads, dim, v_dim, block_size, window, dtype, threads, num_blocks;
  double scaling, softcap;
};

struct AttentionUnit {
  int32_t sequence, kv_head;
  int64_t first, last;  // positions
  int64_t partial;      // offset of [rows][2 + v_pad] floats (max, sum, acc), or -1: writes `out`
  int32_t splits;       // units that share this head, this one included; 0: not the first of them
};

// Copies `rows` rows of `size` elements to float rows of `pad` (zero-filled), one pointer each.
template <class T>
inline void widen_row(const T* from, float* to, int64_t size, int64_t pad, float scale) {
  by_sixteen(size, [&](int64_t i, int64_t n) {
    store(to + i, (n == W ? load(from + i) : load_n(from + i, n)) * scale);
  });
  for (int64_t i = (size + W - 1) / W * W; i < pad; ++i) to[i] = 0;
}

inline Vec dot_sixteen(const float* q, const float* tile, int64_t pad) {
  Vec acc[W] = {};
  for (int64_t i = 0; i < pad; i += W) {
    const Vec qs = load(q + i);
    for (int j = 0; j < W; ++j) acc[j] = fma(qs, load(tile + j * pad + i), acc[j]);
  }
  return sums(acc);
}

// Takes up to 16 positions into one row's running (max, sum, acc).
inline void absorb(Vec scores, int64_t lo, int64_t hi, const float* values, int64_t pad,
                   float* state) {
  const float low = -std::numeric_limits<float>::infinity();
  const float top = std::max(state[0], largest(keep(scores, lo, hi, low)));
  const Vec p = keep(exp(scores - top), lo, hi, 0.0f);
  const float shrink = std::exp(state[0] - top);
  float weights[W];
  store(weights, p);
  state[0] = top;
  state[1] = state[1] * shrink + sum(p);
  float* acc = state + W;
  for (int64_t i = 0; i < pad; i += W) {
    Vec even = load(acc + i) * shrink, odd = {};
    int64_t j = lo;
    for (; j + 2 <= hi; j += 2) {
      even = fma(splat(weights[j]), load(values + j * pad + i), even);
      odd = fma(splat(weights[j + 1]), load(values + (j + 1) * pad + i), odd);
    }
    if (j < hi) even = fma(splat(weights[j]), load(values + j * pad + i), even);
    store(acc + i, even + odd);
  }
}

template <class T>
class Attention {
 public:
  explicit Attention(const AttentionArgs& args)
      : a_(args),
        group_(args.heads / args.kv_heads),
        pad_((args.dim + W - 1) / W * W),
        v_pad_((args.v_dim + W - 1) / W * W) {}

  // Whether every block that will be read exists.
  bool is_valid() const {
    for (int64_t c = 0; c < a_.num_chosen; ++c) {
      const int64_t i = a_.chosen[c];
      const int64_t last = (a_.contexts[i] + a_.block_size - 1) / a_.block_size;
      for (int64_t b = first_position(i) / a_.block_size; b < last; ++b) {
        const int64_t block = a_.tables[i * a_.table_stride + b];
        if (block < 0 || block >= a_.num_blocks) return false;
      }
    }
    return true;
  }

  void run() {
    plan();
    const int64_t count = int64_t(units_.size());
    const int threads = work_ < kParallelWork ? 1 : int(a_.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) do_unit(units_[i], scratch);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < count; ++i)
        if (units_[i].splits > 1) merge(i);
    }
  }

 private:
  static constexpr int64_t kParallelWork = 1 << 15;  // elements of K read
  static constexpr int64_t kShortest = 128;          // positions in a split

  int64_t queries(int64_t i) const { return a_.starts[i + 1] - a_.starts[i]; }
  int64_t state_size() const { return W + v_pad_; }

  int64_t first_position(int64_t i) const {
    return a_.window ? std::max<int64_t>(0, a_.contexts[i] - queries(i) + 1 - a_.window) : 0;
  }

  void plan() {
    int64_t positions = 0, floats = 0;
    for (int64_t c = 0; c < a_.num_chosen; ++c)
      positions += a_.contexts[a_.chosen[c]] - first_position(a_.chosen[c]);
    work_ = positions * a_.kv_heads * a_.dim;
    const int64_t fair = positions * a_.kv_heads / (a_.threads * 8);
    const int64_t longest = a_.threads > 1 ? std::max(kShortest, fair) : INT64_MAX;
    for (int64_t c = 0; c < a_.num_chosen; ++c) {
      const int64_t i = a_.chosen[c], first = first_position(i), size = a_.contexts[i] - first;
      const int64_t splits = size <= longest ? 1 : (size + longest - 1) / longest;
      const int64_t each = ((size + splits - 1) / splits + W - 1) / W * W;
      for (int64_t head = 0; head < a_.kv_heads; ++head)
        for (int64_t s = 0; s < splits; ++s) {
          const int64_t lo = std::min(first + s * each, first + size);
          const int64_t hi = std::min(lo + each, first + size);
          units_.push_back({int32_t(i), int32_t(head), lo, hi, splits > 1 ? floats : -1,
                            int32_t(s == 0 ? splits : 0)});
          if (splits > 1) floats += queries(i) * group_ * state_size();
        }
    }
    partials_.resize(floats);
  }

  void do_unit(const AttentionUnit& unit, std::vector<float>& scratch) {
    const int64_t rows = queries(unit.sequence) * group_;
    const int64_t q_size = rows * pad_, tiles = W * (pad_ + v_pad_);
    scratch.resize(q_size + tiles + rows * state_size());
    float* q = scratch.data();
    float* keys = q + q_size;
    float* values = keys + W * pad_;
    float* states = unit.partial < 0 ? values + W * v_pad_ : partials_.data() + unit.partial;
    const int64_t start = a_.starts[unit.sequence];
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = (const T*)a_.q + (start + r / group_) * a_.q_token +
                      (unit.kv_head * group_ + r % group_) * a_.q_head;
      widen_row(from, q + r * pad_, a_.dim, pad_, float(a_.scaling));
      float* state = states + r * state_size();
      std::fill_n(state, state_size(), 0.0f);
      state[0] = kLow;
    }
    std::fill_n(keys, W * pad_, 0.0f);
    for (int64_t p = unit.first; p < unit.last; p += W) {
      const int64_t n = std::min(W, unit.last - p);
      read_tile(unit, p, n, keys, values);
      do_tile(unit, p, n, q, keys, values, states);
    }
    if (unit.partial < 0) write(unit, states);
  }

  void read_tile(const AttentionUnit& unit, int64_t position, int64_t n, float* keys,
                 float* values) const {
    const int32_t* table = a_.tables + unit.sequence * a_.table_stride;
    int64_t block = position / a_.block_size, offset = position % a_.block_size;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t row = offset * a_.kv_heads + unit.kv_head;
      const T* k = (const T*)a_.k + table[block] * a_.k_block + row * a_.dim;
      const T* v = (const T*)a_.v + table[block] * a_.v_block + row * a_.v_dim;
      widen_row(k, keys + j * pad_, a_.dim, pad_, 1.0f);
      widen_row(v, values + j * v_pad_, a_.v_dim, v_pad_, 1.0f);
      if (++offset == a_.block_size) offset = 0, ++block;
    }
  }

  void do_tile(const AttentionUnit& unit, int64_t position, int64_t n, const float* q,
               const float* keys, const float* values, float* states) const {
    const int64_t count = queries(unit.sequence), context = a_.contexts[unit.sequence];
    const int32_t* furthest = a_.last_keys ? a_.last_keys + a_.starts[unit.sequence] : nullptr;
    for (int64_t r = 0; r < count * group_; ++r) {
      const int64_t own = context - count + r / group_ - position;  // relative to the tile
      const int64_t last = furthest ? std::max(own, furthest[r / group_] - position) : own;
      const int64_t hi = std::min(n, last + 1);
      const int64_t lo = a_.window ? std::max<int64_t>(0, own - a_.window + 1) : 0;
      if (lo >= hi) continue;
      Vec scores = dot_sixteen(q + r * pad_, keys, pad_);
      if (a_.softcap > 0) scores = tanh(scores / float(a_.softcap)) * float(a_.softcap);
      absorb(scores, lo, hi, values, v_pad_, states + r * state_size());
    }
  }

  void merge(int64_t at) {
    const AttentionUnit& unit = units_[at];
    const int64_t rows = queries(unit.sequence) * group_, size = state_size();
    float* into = partials_.data() + unit.partial;
    for (int64_t s = 1; s < unit.splits; ++s)
      for (int64_t r = 0; r < rows; ++r) {
        float* mine = into + r * size;
        const float* other = partials_.data() + units_[at + s].partial + r * size;
        const float top = std::max(mine[0], other[0]);
        if (top == kLow) continue;
        const float one = std::exp(mine[0] - top), two = std::exp(other[0] - top);
        mine[0] = top;
        mine[1] = mine[1] * one + other[1] * two;
        for (int64_t i = W; i < size; i += W)
          store(mine + i, fma(load(mine + i), splat(one), load(other + i) * two));
      }
    write(unit, into);
  }

  void write(const AttentionUnit& unit, const float* states) const {
    const int64_t rows = queries(unit.sequence) * group_, start = a_.starts[unit.sequence];
    for (int64_t r = 0; r < rows; ++r) {
      const float* state = states + r * state_size();
      const int64_t head = unit.kv_head * group_ + r % group_;
      T* to = (T*)a_.out + ((start + r / group_) * a_.heads + head) * a_.v_dim;
      // Here, where the parts of a row are one, a sink counts once.
      const float sink = a_.sinks ? std::exp(a_.sinks[head] - state[0]) : 0.0f;
      const float total = state[1] + sink;
      by_sixteen(a_.v_dim, [&](int64_t i, int64_t n) {
        const Vec result = load(state + W + i) / total;
        n == W ? store(to + i, result) : store_n(to + i, result, n);
      });
    }
  }

  static constexpr float kLow = -std::numeric_limits<float>::infinity();
  const AttentionArgs& a_;
  const int64_t group_, pad_, v_pad_;
  int64_t work_ = 0;
  std::vector<AttentionUnit> units_;
  std::vector<float> partials_;
};

}  // namespace loramux
