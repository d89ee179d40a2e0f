// The C interface of the CPU ops; `cpu.py` calls it through ctypes. Strides are in elements (bytes
// in write_kv), dtypes are 0 f32, 1 bf16, 2 f16. Callers have checked shapes
// and dtypes; a result other than 0 means that an index points outside and nothing was done.
#include <type_traits>

#include "cpu_attention.h"
#include "cpu_glue.h"
#include "cpu_lora.h"

using namespace loramux;

namespace {
// Below this much work a second thread costs more than it saves (a region takes 3 to 10 us).
constexpr int64_t kLoraWork = 48 << 10;   // weight elements
constexpr int64_t kGlueWork = 128 << 10;  // elements
}  // namespace

extern "C" {

int64_t loramux_abi() { return 2; }

int loramux_lora_delta(const Site* site, const Segments* segments, const void* x,
                       int64_t x_stride, void* y, int64_t y_stride, int64_t tokens, int64_t dtype,
                       int64_t threads) {
  thread_local LoraPlan plan;
  if (!plan.build(*site, *segments, tokens)) return 1;
  const int used = plan.work < kLoraWork ? 1 : int(threads);
  with_dtype(dtype, [&](auto activation) {
    using X = decltype(activation);
    with_dtype(site->dtype, [&](auto weight) {
      run_lora<X, decltype(weight)>(*site, plan, (const X*)x, x_stride, (X*)y, y_stride, used);
    });
  });
  return 0;
}

int loramux_attention(const AttentionArgs* args) {
  bool valid = false;
  with_dtype(args->dtype, [&](auto type) {
    Attention<decltype(type)> attention(*args);
    valid = attention.is_valid();
    if (valid) attention.run();
  });
  return valid ? 0 : 1;
}

int loramux_write_kv(const char* k, int64_t k_token, int64_t k_head, char* k_cache,
                      int64_t k_block, int64_t k_bytes, const char* v, int64_t v_token,
                      int64_t v_head, char* v_cache, int64_t v_block, int64_t v_bytes,
                      const int64_t* slots, int64_t tokens, int64_t heads, int64_t block_size,
                     int64_t num_blocks) {
  if (!slots_exist(slots, tokens, num_blocks * block_size)) return 1;
  write_slots(k, k_token, k_head, k_cache, k_block, block_size, slots, tokens, heads, k_bytes);
  write_slots(v, v_token, v_head, v_cache, v_block, block_size, slots, tokens, heads, v_bytes);
  return 0;
}

// `residual` and `total` are null for a plain norm; out and total are contiguous.
int loramux_rms_norm(const void* x, int64_t x_stride, const void* residual, int64_t r_stride,
                      const void* weight, void* out, void* total, int64_t rows, int64_t size,
                      double eps, int64_t mode, int64_t dtype, int64_t threads) {
  const int used = rows * size < kGlueWork ? 1 : int(threads);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel for num_threads(used) if (used > 1)
    for (int64_t i = 0; i < rows; ++i)
      norm_row((const T*)x + i * x_stride, (const T*)residual + i * r_stride, (const T*)weight,
               (T*)out + i * size, total ? (T*)total + i * size : nullptr, size, float(eps), mode);
  });
  return 0;
}

int loramux_silu_mul(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                      void* out, int64_t rows, int64_t size, int64_t dtype, int64_t threads) {
  const int used = rows * size < kGlueWork / 4 ? 1 : int(threads);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel for num_threads(used) if (used > 1)
    for (int64_t i = 0; i < rows; ++i)
      silu_mul_row((const T*)gate + i * gate_stride, (const T*)up + i * up_stride,
                   (T*)out + i * size, size);
  });
  return 0;
}

int loramux_rope(void* q, int64_t q_token, int64_t q_head, int64_t q_heads, void* k,
                  int64_t k_token, int64_t k_head, int64_t k_heads, const void* cos,
                  int64_t cos_stride, const void* sin, int64_t sin_stride, int64_t tokens,
                  int64_t half, int64_t dtype, int64_t threads) {
  const int used = tokens * (q_heads + k_heads) * half < kGlueWork / 2 ? 1 : int(threads);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel for num_threads(used) if (used > 1)
    for (int64_t t = 0; t < tokens; ++t) {
      const T *c = (const T*)cos + t * cos_stride, *s = (const T*)sin + t * sin_stride;
      for (int64_t h = 0; h < q_heads; ++h)
        rope_row((T*)q + t * q_token + h * q_head, c, s, half);
      for (int64_t h = 0; h < k_heads; ++h)
        rope_row((T*)k + t * k_token + h * k_head, c, s, half);
    }
  });
  return 0;
}

}  // extern "C"
