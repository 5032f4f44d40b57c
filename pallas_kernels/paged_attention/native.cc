// Ragged paged attention for CPUs. K [block, kv_head, head_dim, token], V [block, kv_head, token, head_dim].
//
// A work item is a tile of query tokens of one sequence, one KV head (with its group of query heads, which share each K
// and V that is loaded), and a run of keys. It walks its keys 128 at a time: scores, a softmax under way, weighted sum.
// Sixteen keys are a vector in q.K, sixteen entries of a head in the sum over V, so that neither reduces across lanes.
// What a row's result is does not depend on what else is in the batch.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "native/parallel.h"
#include "native/vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using native::bfloat16;
using native::f32x16;
using native::i32x16;
using native::kLanes;

constexpr float kMasked = -1e30f;   // a log-sum-exp of no keys
constexpr int kKeys = 128;          // of a turn: their scores, for all rows of a tile, stay in the L1 cache
constexpr int kGroups = kKeys / kLanes;
constexpr int kTileRows = 32;       // query tokens times heads that share a turn's keys
constexpr int kFewRows = 8;         // of a tile that waits for memory
constexpr int64_t kRunKeys = 2048;  // of an item, where a tile is small: many items even for one long sequence

constexpr i32x16 kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Sizes {
  int64_t tokens, sequences, table_width, kv_heads, group, head_dim, block_size;
  int64_t padded_dim() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
};

struct Options {
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
};

struct Lengths {
  const int32_t *starts, *tables, *visible;
};

struct Item {
  int64_t sequence, head;
  int64_t begin, end;            // rows of the batch
  int64_t first_key, last_key;   // [first, last)
  int64_t run, runs, partial;    // which run of the tile's keys, of how many, and where partial results of run 0 go
};

// A softmax under way, of every row of a tile: maximum, sum of the weights in sixteen lanes, weighted sum of V.
struct Partial {
  std::vector<float> maximum, values;
  std::vector<f32x16> total;
  void start(int64_t rows, int64_t width) {
    maximum.assign(rows, kMasked);
    total.assign(rows, f32x16{});
    values.assign(rows * width, 0.0f);
  }
};

struct Scratch {
  std::vector<float> q, scores, k, v;
  std::vector<int64_t> low, high;
  Partial partial;
};

// Where the keys and values of a turn lie: sixteen of them at each k[g] (rows of `k_stride`) and v[g] (of `v_stride`).
template <class T>
struct Turn {
  const T *k[kGroups], *v[kGroups];
  int64_t k_stride, v_stride;
  int64_t ahead = 0;  // to the next head's, which memory is asked for meanwhile; 0: not worth it
};

inline void ask_for(const void* p) { __builtin_prefetch(p, 0, 2); }

// scores[r][key] of Rows rows and Groups groups of keys.
template <class T, int Rows, int Groups>
inline void score(const float* q, int64_t head_dim, const Turn<T>& turn, int first, float* scores) {
  f32x16 sums[Rows][Groups] = {};
  for (int64_t h = 0; h < head_dim; ++h) {
    f32x16 k[Groups];
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g) k[g] = native::load(turn.k[first + g] + h * turn.k_stride);
    if (turn.ahead) {
#pragma GCC unroll 8
      for (int g = 0; g < Groups; ++g) ask_for(turn.k[first + g] + h * turn.k_stride + turn.ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const float x = q[r * head_dim + h];
#pragma GCC unroll 8
      for (int g = 0; g < Groups; ++g) sums[r][g] += x * k[g];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int g = 0; g < Groups; ++g) native::store(sums[r][g], scores + r * kKeys + (first + g) * kLanes);
  }
}

template <class T, int Rows>
inline void score_rows(const float* q, int64_t head_dim, const Turn<T>& turn, int groups, float* scores) {
  constexpr int kTogether = Rows > 2 ? 4 : 8;
  int g = 0;
  for (; g + kTogether <= groups; g += kTogether) score<T, Rows, kTogether>(q, head_dim, turn, g, scores);
  for (; g + 2 <= groups; g += 2) score<T, Rows, 2>(q, head_dim, turn, g, scores);
  for (; g < groups; ++g) score<T, Rows, 1>(q, head_dim, turn, g, scores);
}

// values[r] += sum over keys in [first, last) of weights[r][key] * V[key], for Width vectors of a head's entries.
template <class T, int Rows, int Width>
inline void weigh(const float* weights, const Turn<T>& turn, int first, int last, int64_t at, int64_t padded,
                  float* values) {
  f32x16 sums[Rows][Width];
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < Width; ++w) sums[r][w] = native::load(values + r * padded + at + w * kLanes);
  }
  for (int key = first; key < last; ++key) {
    const T* row = turn.v[key / kLanes] + key % kLanes * turn.v_stride + at;
    f32x16 v[Width];
#pragma GCC unroll 8
    for (int w = 0; w < Width; ++w) v[w] = native::load(row + w * kLanes);
    if (turn.ahead) {
#pragma GCC unroll 8
      for (int w = 0; w < Width; ++w) ask_for(row + w * kLanes + turn.ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const float x = weights[r * kKeys + key];
#pragma GCC unroll 8
      for (int w = 0; w < Width; ++w) sums[r][w] += x * v[w];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < Width; ++w) native::store(sums[r][w], values + r * padded + at + w * kLanes);
  }
}

template <class T, int Rows>
inline void weigh_rows(const float* weights, const Turn<T>& turn, int first, int last, int64_t padded, float* values) {
  int64_t at = 0;
  for (; at + 4 * kLanes <= padded; at += 4 * kLanes) {
    weigh<T, Rows, 4>(weights, turn, first, last, at, padded, values);
  }
  for (; at < padded; at += kLanes) weigh<T, Rows, 1>(weights, turn, first, last, at, padded, values);
}

// Calls f(row, number of rows as a constant) for all rows, four at a time.
template <class F>
inline void by_fours(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>());
  if (rows - r >= 2) {
    f(r, std::integral_constant<int, 2>());
    r += 2;
  }
  if (r < rows) f(r, std::integral_constant<int, 1>());
}

// One row's scores of a turn become its weights; what it has so far shrinks if there is a new maximum.
inline void weights_of(float* scores, int64_t first_key, int groups, int64_t low, int64_t high, float softcap,
                       float& maximum, f32x16& total, float* values, int64_t padded) {
  f32x16 best = native::all(kMasked);
  for (int g = 0; g < groups; ++g) {
    f32x16 s = native::load(scores + g * kLanes);
    if (softcap != 0) s = native::tanh(s / softcap) * softcap;
    const i32x16 key = kIota + static_cast<int32_t>(first_key + g * kLanes);
    s = ((key >= static_cast<int32_t>(low)) & (key < static_cast<int32_t>(high))) ? s : native::all(kMasked);
    best = native::max(best, s);
    native::store(s, scores + g * kLanes);
  }
  const float now = std::max(maximum, native::largest(best));
  if (now > maximum) {
    const float keep = native::exp(native::all(maximum - now))[0];
    total *= keep;
    for (int64_t h = 0; h < padded; h += kLanes) native::store(native::load(values + h) * keep, values + h);
    maximum = now;
  }
  for (int g = 0; g < groups; ++g) {
    const f32x16 s = native::load(scores + g * kLanes);
    const f32x16 weight = s > kMasked ? native::exp(s - maximum) : f32x16{};
    total += weight;
    native::store(weight, scores + g * kLanes);
  }
}

template <class Q, class KV>
class Attention {
 public:
  Attention(Sizes sizes, Options options, Lengths lengths, const Q* q, const KV* k, const KV* v, float* out, float* lse)
      : s_(sizes), o_(options), l_(lengths), q_(q), k_(k), v_(v), out_(out), lse_(lse) {
    // Blocks of other sizes, and heads that are no whole number of vectors, are copied before they are used.
    in_place_ = s_.block_size % kLanes == 0 && s_.head_dim % kLanes == 0;
  }

  void run(ffi::ThreadPool& pool) {
    plan();
    const int64_t rows = l_.starts[s_.sequences];
    std::fill(out_ + rows * row_size(), out_ + s_.tokens * row_size(), 0.0f);
    std::fill(lse_ + rows * heads(), lse_ + s_.tokens * heads(), kMasked);
    // A thread takes heads of a sequence that follow each other, as long as there is enough for all.
    const int64_t items = static_cast<int64_t>(items_.size());
    const int64_t together = std::clamp<int64_t>(items / (8 * pool.num_threads()), 1, s_.kv_heads);
    const auto work = [&](int64_t i) {
      thread_local Scratch scratch;
      for (int64_t item = i * together; item < std::min(items, (i + 1) * together); ++item) {
        attend(items_[item], scratch);
      }
    };
    const int64_t shares = (items + together - 1) / together;
    if (keys_ * s_.head_dim < 1 << 14) {  // it would take longer to wake another thread
      for (int64_t i = 0; i < shares; ++i) work(i);
    } else {
      native::parallel_for(pool, shares, work);
    }
  }

 private:
  int64_t heads() const { return s_.kv_heads * s_.group; }
  int64_t row_size() const { return heads() * s_.head_dim; }
  int64_t low_of(int64_t row) const { return o_.window ? std::max<int64_t>(0, l_.visible[row] - o_.window) : 0; }

  void plan() {
    const int64_t tile = std::max<int64_t>(1, kTileRows / s_.group);
    int64_t partials = 0;
    for (int64_t s = 0; s < s_.sequences; ++s) {
      const int64_t first = l_.starts[s], last = l_.starts[s + 1];
      const bool small = last - first <= tile;
      for (int64_t begin = first; begin < last; begin += tile) {
        const int64_t end = std::min(begin + tile, last);
        const int64_t first_key = low_of(begin) / kKeys * kKeys;
        const int64_t last_key = l_.visible[end - 1];
        const int64_t run_keys = small ? kRunKeys : std::max<int64_t>(last_key, 1);
        const int64_t runs = std::max<int64_t>(1, (last_key - first_key + run_keys - 1) / run_keys);
        for (int64_t head = 0; head < s_.kv_heads; ++head) {
          for (int64_t run = 0; run < runs; ++run) {
            const int64_t from = first_key + run * run_keys;
            items_.push_back({s, head, begin, end, from, std::min(from + run_keys, last_key), run, runs, partials});
          }
          if (runs > 1) partials += runs;
          keys_ += std::max<int64_t>(0, last_key - first_key) * (end - begin) * s_.group;
        }
      }
    }
    partials_ = std::vector<Partial>(partials);
    arrived_ = std::vector<std::atomic<int64_t>>(partials);
  }

  void attend(const Item& item, Scratch& scratch) {
    const int64_t rows = (item.end - item.begin) * s_.group, padded = s_.padded_dim();
    scratch.q.resize(rows * s_.head_dim);
    scratch.scores.resize(rows * kKeys);
    scratch.low.resize(rows);
    scratch.high.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = item.begin + r / s_.group;
      const Q* q = q_ + (token * heads() + item.head * s_.group + r % s_.group) * s_.head_dim;
      for (int64_t h = 0; h < s_.head_dim; ++h) scratch.q[r * s_.head_dim + h] = native::widened(q[h]) * o_.scale;
      scratch.low[r] = low_of(token);
      scratch.high[r] = std::min<int64_t>(l_.visible[token], item.last_key);
    }
    Partial& mine = item.runs > 1 ? partials_[item.partial + item.run] : scratch.partial;
    mine.start(rows, padded);
    for (int64_t key = item.first_key; key < item.last_key; key += kKeys) {
      // Keys below every row's window may be gone, and may be anything: they are not touched.
      const int first = static_cast<int>(std::max<int64_t>(0, scratch.low[0] - key));
      const int last = static_cast<int>(std::min<int64_t>(kKeys, item.last_key - key));
      if (first >= last) continue;
      if (in_place_) {
        turn(located(item, key, last), key, first, last, scratch, mine);
      } else {
        turn(copied(item, key, first, last, scratch), key, first, last, scratch, mine);
      }
    }
    if (item.runs == 1) return finish(item, mine);
    if (arrived_[item.partial].fetch_add(1, std::memory_order_acq_rel) + 1 == item.runs) merge(item);
  }

  template <class T>
  void turn(const Turn<T>& where, int64_t key, int first, int last, Scratch& scratch, Partial& mine) {
    const int64_t padded = s_.padded_dim(), rows = static_cast<int64_t>(mine.maximum.size());
    const int groups = (last + kLanes - 1) / kLanes;
    by_fours(rows, [&](int64_t r, auto count) {
      score_rows<T, count>(&scratch.q[r * s_.head_dim], s_.head_dim, where, groups, &scratch.scores[r * kKeys]);
    });
    for (int64_t r = 0; r < rows; ++r) {
      weights_of(&scratch.scores[r * kKeys], key, groups, scratch.low[r], scratch.high[r], o_.softcap,
                 mine.maximum[r], mine.total[r], &mine.values[r * padded], padded);
    }
    by_fours(rows, [&](int64_t r, auto count) {
      weigh_rows<T, count>(&scratch.scores[r * kKeys], where, first, last, padded, &mine.values[r * padded]);
    });
  }

  const KV* cache_row(const KV* cache, const Item& item, int64_t key) const {
    const int64_t block = l_.tables[item.sequence * s_.table_width + key / s_.block_size];
    return cache + (block * s_.kv_heads + item.head) * s_.block_size * s_.head_dim;
  }

  Turn<KV> located(const Item& item, int64_t key, int last) const {
    Turn<KV> turn;
    turn.k_stride = s_.block_size;
    turn.v_stride = s_.head_dim;
    // With more rows a turn computes for longer than memory takes.
    const bool few_rows = (item.end - item.begin) * s_.group <= kFewRows;
    turn.ahead = few_rows && item.head + 1 < s_.kv_heads ? s_.block_size * s_.head_dim : 0;
    for (int g = 0; g * kLanes < last; ++g) {
      const int64_t at = key + g * kLanes, offset = at % s_.block_size;
      turn.k[g] = cache_row(k_, item, at) + offset;
      turn.v[g] = cache_row(v_, item, at) + offset * s_.head_dim;
    }
    return turn;
  }

  Turn<float> copied(const Item& item, int64_t key, int first, int last, Scratch& scratch) const {
    const int64_t padded = s_.padded_dim();
    scratch.k.assign(kKeys * s_.head_dim, 0.0f);
    scratch.v.assign(kKeys * padded, 0.0f);
    for (int i = first; i < last; ++i) {
      const int64_t offset = (key + i) % s_.block_size;
      const KV* k = cache_row(k_, item, key + i) + offset;
      const KV* v = cache_row(v_, item, key + i) + offset * s_.head_dim;
      float* to = &scratch.k[i / kLanes * kLanes * s_.head_dim + i % kLanes];
      for (int64_t h = 0; h < s_.head_dim; ++h) {
        to[h * kLanes] = native::widened(k[h * s_.block_size]);
        scratch.v[i * padded + h] = native::widened(v[h]);
      }
    }
    Turn<float> turn;
    turn.k_stride = kLanes;
    turn.v_stride = padded;
    for (int g = 0; g < kGroups; ++g) {
      turn.k[g] = &scratch.k[g * kLanes * s_.head_dim];
      turn.v[g] = &scratch.v[g * kLanes * padded];
    }
    return turn;
  }

  // All runs of a tile's keys into the first one, in their order.
  void merge(const Item& item) {
    const int64_t padded = s_.padded_dim();
    Partial& all = partials_[item.partial];
    for (int64_t run = 1; run < item.runs; ++run) {
      const Partial& one = partials_[item.partial + run];
      for (size_t r = 0; r < all.maximum.size(); ++r) {
        const float now = std::max(all.maximum[r], one.maximum[r]);
        const float keep = std::exp(all.maximum[r] - now), add = std::exp(one.maximum[r] - now);
        all.maximum[r] = now;
        all.total[r] = all.total[r] * keep + one.total[r] * add;
        for (int64_t h = 0; h < padded; ++h) {
          all.values[r * padded + h] = all.values[r * padded + h] * keep + one.values[r * padded + h] * add;
        }
      }
    }
    finish(item, all);
  }

  void finish(const Item& item, const Partial& done) const {
    const int64_t padded = s_.padded_dim();
    for (size_t r = 0; r < done.maximum.size(); ++r) {
      const int64_t token = item.begin + static_cast<int64_t>(r) / s_.group;
      const int64_t at = token * heads() + item.head * s_.group + static_cast<int64_t>(r) % s_.group;
      const float total = native::sum(done.total[r]);
      const float factor = total > 0 ? 1 / total : 0;
      for (int64_t h = 0; h < s_.head_dim; ++h) out_[at * s_.head_dim + h] = done.values[r * padded + h] * factor;
      lse_[at] = total > 0 ? done.maximum[r] + std::log(total) : kMasked;
    }
  }

  Sizes s_;
  Options o_;
  Lengths l_;
  const Q* q_;
  const KV *k_, *v_;
  float *out_, *lse_;
  bool in_place_;
  int64_t keys_ = 0;  // that all rows see together
  std::vector<Item> items_;
  std::vector<Partial> partials_;
  std::vector<std::atomic<int64_t>> arrived_;
};

template <class Q, class KV>
void run(ffi::ThreadPool& pool, Sizes sizes, Options options, Lengths lengths, const ffi::AnyBuffer& q,
         const ffi::AnyBuffer& k, const ffi::AnyBuffer& v, float* out, float* lse) {
  Attention<Q, KV>(sizes, options, lengths, static_cast<const Q*>(q.untyped_data()),
                   static_cast<const KV*>(k.untyped_data()), static_cast<const KV*>(v.untyped_data()), out, lse)
      .run(pool);
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::BufferR1<ffi::S32> starts, ffi::BufferR2<ffi::S32> tables, ffi::BufferR1<ffi::S32> visible,
                  ffi::ResultBufferR4<ffi::F32> out, ffi::ResultBufferR3<ffi::F32> lse, float scale, float softcap,
                  int64_t window) {
  const auto queries = q.dimensions(), values = v.dimensions();
  const Sizes sizes{queries[0], static_cast<int64_t>(starts.dimensions()[0]) - 1, tables.dimensions()[1],
                    queries[1], queries[2], queries[3], values[2]};
  const Options options{scale, softcap, window};
  const Lengths lengths{starts.typed_data(), tables.typed_data(), visible.typed_data()};
  float *to = out->typed_data(), *lse_to = lse->typed_data();
  const bool wide_q = q.element_type() == ffi::F32, wide_kv = k.element_type() == ffi::F32;
  if (wide_q && wide_kv) run<float, float>(pool, sizes, options, lengths, q, k, v, to, lse_to);
  if (wide_q && !wide_kv) run<float, bfloat16>(pool, sizes, options, lengths, q, k, v, to, lse_to);
  if (!wide_q && wide_kv) run<bfloat16, float>(pool, sizes, options, lengths, q, k, v, to, lse_to);
  if (!wide_q && !wide_kv) run<bfloat16, bfloat16>(pool, sizes, options, lengths, q, k, v, to, lse_to);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::BufferR4<ffi::F32>>()
                                  .Ret<ffi::BufferR3<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
