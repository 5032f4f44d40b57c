// KV write for CPUs: per-head norm, rotary embedding, and K and V into the paged caches, in one pass over the QKV
// product. K [block, kv_head, head_dim, token], V [block, kv_head, token, head_dim].
#include <algorithm>
#include <cmath>
#include <vector>

#include "native/parallel.h"
#include "native/vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using native::bfloat16;

struct Sizes {
  int64_t tokens, kv_heads, group, head_dim, half_rotary, block_size;
};

struct Norm {
  float eps, offset;
};

// Tokens of a work item: with fewer, it takes longer to hand one to a thread than to do it.
constexpr int64_t kTokens = 16;

template <class T>
void normalize(float* x, int64_t size, const T* weight, Norm norm) {
  float squares = 0;
  for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];
  const float factor = 1 / std::sqrt(squares / static_cast<float>(size) + norm.eps);
  for (int64_t i = 0; i < size; ++i) {
    x[i] = native::rounded_to<T>(x[i] * factor * (native::widened(weight[i]) + norm.offset));
  }
}

void rotate(float* x, int64_t half, const float* cos, const float* sin) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

template <class T, class KV>
void write(ffi::ThreadPool& pool, Sizes s, Norm norm, const T* qkv, const int32_t* slots, const float* cos,
           const float* sin, const T* q_weight, const T* k_weight, T* q_out, KV* k_cache, KV* v_cache) {
  const auto head = [&](const T* from, const T* weight, int64_t token, float* x) {
    for (int64_t i = 0; i < s.head_dim; ++i) x[i] = native::widened(from[i]);
    if (weight != nullptr) normalize(x, s.head_dim, weight, norm);
    if (s.half_rotary) rotate(x, s.half_rotary, cos + token * s.half_rotary, sin + token * s.half_rotary);
  };
  const auto some_tokens = [&](int64_t item) {
    thread_local std::vector<float> x;
    x.resize(s.head_dim);
    for (int64_t t = item * kTokens; t < std::min(s.tokens, (item + 1) * kTokens); ++t) {
      const int64_t block = slots[t] / s.block_size, offset = slots[t] % s.block_size;
      for (int64_t k = 0; k < s.kv_heads; ++k) {
        const T* from = qkv + (t * s.kv_heads + k) * (s.group + 2) * s.head_dim;
        for (int64_t g = 0; g < s.group; ++g, from += s.head_dim) {
          head(from, q_weight, t, x.data());
          T* to = q_out + ((t * s.kv_heads + k) * s.group + g) * s.head_dim;
          for (int64_t i = 0; i < s.head_dim; ++i) native::narrow(x[i], to + i);
        }
        // Padding tokens' slots are those of block 0, which nobody reads, and several threads may write: left out.
        if (block == 0) continue;
        const int64_t at = (block * s.kv_heads + k) * s.block_size * s.head_dim;
        head(from, k_weight, t, x.data());
        for (int64_t i = 0; i < s.head_dim; ++i) {
          // First to the product's dtype, as that of K on its own would be.
          native::narrow(native::rounded_to<T>(x[i]), k_cache + at + i * s.block_size + offset);
          native::narrow(native::widened(from[s.head_dim + i]), v_cache + at + offset * s.head_dim + i);
        }
      }
    }
  };
  const int64_t items = (s.tokens + kTokens - 1) / kTokens;
  native::parallel_for(pool, items, some_tokens);
}

template <class T, class KV>
void run(ffi::ThreadPool& pool, Sizes sizes, Norm norm, const ffi::AnyBuffer& qkv, const int32_t* slots,
         const float* cos, const float* sin, const ffi::AnyBuffer& q_weight, const ffi::AnyBuffer& k_weight,
         ffi::AnyBuffer& q, ffi::AnyBuffer& k_cache, ffi::AnyBuffer& v_cache) {
  const auto weight = [](const ffi::AnyBuffer& x) {
    return x.element_count() ? static_cast<const T*>(x.untyped_data()) : nullptr;
  };
  write<T, KV>(pool, sizes, norm, static_cast<const T*>(qkv.untyped_data()), slots, cos, sin, weight(q_weight),
               weight(k_weight), static_cast<T*>(q.untyped_data()), static_cast<KV*>(k_cache.untyped_data()),
               static_cast<KV*>(v_cache.untyped_data()));
}

// The caches that come in are the ones that go out, in the same memory.
ffi::Error Write(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::BufferR1<ffi::S32> slots, ffi::BufferR2<ffi::F32> cos,
                 ffi::BufferR2<ffi::F32> sin, ffi::AnyBuffer q_weight, ffi::AnyBuffer k_weight, ffi::AnyBuffer k_in,
                 ffi::AnyBuffer v_in, ffi::Result<ffi::AnyBuffer> q, ffi::Result<ffi::AnyBuffer> k_cache,
                 ffi::Result<ffi::AnyBuffer> v_cache, float eps, float offset) {
  if (k_in.untyped_data() != k_cache->untyped_data() || v_in.untyped_data() != v_cache->untyped_data()) {
    return ffi::Error::Internal("kv_write: XLA gave other memory for the caches it returns");
  }
  const auto d = qkv.dimensions();
  const Sizes sizes{d[0], d[1], d[2] - 2, d[3], cos.dimensions()[1], v_cache->dimensions()[2]};
  const Norm norm{eps, offset};
  const bool wide = qkv.element_type() == ffi::F32, wide_kv = k_cache->element_type() == ffi::F32;
  const auto go = [&](auto* call) {
    call(pool, sizes, norm, qkv, slots.typed_data(), cos.typed_data(), sin.typed_data(), q_weight, k_weight, *q,
         *k_cache, *v_cache);
  };
  if (wide && wide_kv) go(run<float, float>);
  if (wide && !wide_kv) go(run<float, bfloat16>);
  if (!wide && wide_kv) go(run<bfloat16, float>);
  if (!wide && !wide_kv) go(run<bfloat16, bfloat16>);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kv_write, Write,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<float>("offset"));
