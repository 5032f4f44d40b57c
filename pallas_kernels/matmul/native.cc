// Matrix product for CPUs: x [M, K] times w [K, N], both float32 or both bfloat16, added up in float32. Gated: w is
// [K, 2, N], and of each column's two sums, gate and up, the result is activation(gate) * up.
//
// A work item is a panel of 64 columns. Of it a run of rows of w is copied, as the multiply-adds take them, and every row
// of x meets it there, six rows at a time: 24 vectors of sums. Up to six rows of x in all use w as they read it. What an
// element of the result is depends on its row of x and its column of w alone, not on how many rows there are: products
// are added in the order of K everywhere.
#include <algorithm>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "native/parallel.h"
#include "native/vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using native::bfloat16;
using native::f32x16;
using native::kLanes;

constexpr int kVectors = 4;                 // of a panel
constexpr int kPanel = kVectors * kLanes;   // columns
constexpr int kRows = 6;                    // of x that share what is loaded of a panel
constexpr int64_t kManyRows = 512;          // of x, whose sums of a panel stay in the L2 cache
constexpr int64_t kSteps = 112;             // that are packed at a time: 28 KiB, most of an L1 cache
constexpr int64_t kTogether = 8;            // steps of K, where rows are few
constexpr int64_t kWorthSharing = 1 << 20;  // multiply-adds: with fewer, waking a thread takes longer

// How a dtype is multiplied. `kStep` rows of w go into one vector of a panel.
template <class T>
struct Format {
  static constexpr int kStep = 1;
  static void load(const T* w, int64_t, f32x16* panel) {
    for (int v = 0; v < kVectors; ++v) panel[v] = native::load(w + v * kLanes);
  }
  static f32x16 add_product(f32x16 sum, f32x16 w, const T* x) { return sum + native::widened(*x) * w; }
  static void in_order(f32x16*) {}
};

#ifdef __AVX512BF16__
// Pairs of rows: the instruction multiplies two bfloat16 by two and adds both products. Interleaving keeps to quarters of
// a vector, so that columns lie in another order until the sums are stored.
template <>
struct Format<bfloat16> {
  static constexpr int kStep = 2;
  static void load(const bfloat16* w, int64_t stride, f32x16* panel) {
    for (int half = 0; half < 2; ++half, w += 2 * kLanes) {
      const __m512i even = _mm512_loadu_si512(w), odd = _mm512_loadu_si512(w + stride);
      panel[2 * half] = native::bits_of<f32x16>(_mm512_unpacklo_epi16(even, odd));
      panel[2 * half + 1] = native::bits_of<f32x16>(_mm512_unpackhi_epi16(even, odd));
    }
  }
  static f32x16 add_product(f32x16 sum, f32x16 w, const bfloat16* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof(pair));
    const __m512i both = _mm512_set1_epi32(pair);
    return native::bits_of<f32x16>(_mm512_dpbf16_ps(native::bits_of<__m512>(sum), native::bits_of<__m512bh>(both),
                                                    native::bits_of<__m512bh>(w)));
  }
  static void in_order(f32x16* panel) {
    for (int half = 0; half < 2; ++half) {
      const f32x16 low = panel[2 * half], high = panel[2 * half + 1];
      panel[2 * half] =
          __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      panel[2 * half + 1] =
          __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  }
};
#endif

// Calls f with the number of rows as a constant.
template <class F>
inline void with_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    default:
      return f(std::integral_constant<int, kRows>());
  }
}

enum Activation : int64_t { kNone, kSilu, kGeluTanh };

inline f32x16 activated(f32x16 x, Activation activation) {
  if (activation == kSilu) return x / (1.0f + native::exp(-x));
  const f32x16 inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + native::tanh(inner));
}

struct Sizes {
  int64_t rows, depth, columns;  // columns: of the result
  Activation activation;
  int64_t parts() const { return activation == kNone ? 1 : 2; }
};

// Of w that one panel of the result needs: `count` columns from `first` on.
struct Columns {
  int64_t first, count;
};

template <class T>
class Product {
  using F = Format<T>;

 public:
  Product(Sizes sizes, const T* x, const T* w, T* y) : s_(sizes), x_(x), w_(w), y_(y) {
    if (s_.depth % F::kStep) pad_depth();
  }

  void run(ffi::ThreadPool& pool) {
    const int64_t panels = (s_.columns + kPanel - 1) / kPanel, threads = pool.num_threads();
    // Where rows are few, strips are wide: long runs of memory. But all threads must end together.
    const bool few = s_.rows <= kRows;
    int64_t strip = few ? 16 : 1;
    while (strip > 1 && panels < 4 * strip * threads) strip /= 2;
    const int64_t items = (panels + strip - 1) / strip;
    const auto work = [&](int64_t i) {
      if (few) {
        few_rows(i * strip, std::min((i + 1) * strip, panels));
      } else {
        many_rows(i, std::min(i + threads, panels - 1));
      }
    };
    if (s_.rows * s_.depth * w_stride() < kWorthSharing) {
      for (int64_t i = 0; i < items; ++i) work(i);
    } else {
      native::parallel_for(pool, items, work);
    }
  }

 private:
  // x with a zero behind each row; w is read as if it had another row of zeros.
  void pad_depth() {
    padded_.resize(s_.rows * (s_.depth + 1));
    for (int64_t r = 0; r < s_.rows; ++r) {
      std::copy_n(x_ + r * s_.depth, s_.depth, &padded_[r * (s_.depth + 1)]);
    }
    x_ = padded_.data();
    x_stride_ = s_.depth + 1;
  }

  int64_t w_stride() const { return s_.columns * s_.parts(); }

  // Of a panel of the result, in gate (0) or up (1).
  Columns columns_of(int64_t panel, int64_t part) const {
    const int64_t column = panel * kPanel;
    return {part * s_.columns + column, std::min<int64_t>(kPanel, s_.columns - column)};
  }

  // Rows [k, k + kStep) of w, zeros where there is none.
  void load(int64_t k, Columns columns, f32x16* to) const {
    const T* from = w_ + k * w_stride() + columns.first;
    if (columns.count == kPanel && k + F::kStep <= s_.depth) return F::load(from, w_stride(), to);
    T rows[F::kStep * kPanel] = {};
    for (int64_t i = 0; i < F::kStep && k + i < s_.depth; ++i) {
      std::copy_n(from + i * w_stride(), columns.count, rows + i * kPanel);
    }
    F::load(rows, kPanel, to);
  }

  // Sums of one row of x over one panel, of gate and then of up, to the result.
  void finish(int64_t row, int64_t panel, f32x16* sums, const f32x16* up) const {
    F::in_order(sums);
    if (up != nullptr) {
      f32x16 factors[kVectors];
      std::copy_n(up, kVectors, factors);
      F::in_order(factors);
      for (int v = 0; v < kVectors; ++v) sums[v] = activated(sums[v], s_.activation) * factors[v];
    }
    T values[kPanel];
    for (int v = 0; v < kVectors; ++v) native::store(sums[v], values + v * kLanes);
    std::copy_n(values, columns_of(panel, 0).count, y_ + row * s_.columns + panel * kPanel);
  }

  // Eight steps of K at a time over the whole strip, whose sums stay in the L1 cache: w is read in eight long runs.
  void few_rows(int64_t first, int64_t last) const {
    thread_local std::vector<f32x16> sums;
    const int64_t of_part = s_.rows * (last - first) * kVectors;
    sums.assign(of_part * s_.parts(), f32x16{});
    for (int64_t k = 0; k < s_.depth; k += kTogether * F::kStep) {
      for (int64_t part = 0; part < s_.parts(); ++part) {
        for (int64_t panel = first; panel < last; ++panel) {
          f32x16* to = &sums[part * of_part + (panel - first) * s_.rows * kVectors];
          with_rows(s_.rows, [&](auto rows) { few<rows>(k, columns_of(panel, part), to); });
        }
      }
    }
    for (int64_t panel = first; panel < last; ++panel) {
      for (int64_t r = 0; r < s_.rows; ++r) {
        f32x16* of_row = &sums[((panel - first) * s_.rows + r) * kVectors];
        finish(r, panel, of_row, s_.parts() == 2 ? of_row + of_part : nullptr);
      }
    }
  }

  template <int Rows>
  void few(int64_t first, Columns columns, f32x16* to) const {
    f32x16 sums[Rows][kVectors];
    std::memcpy(sums, to, sizeof(sums));
    const int64_t end = std::min(first + kTogether * F::kStep, s_.depth);
    const int64_t ahead = columns.count == kPanel ? s_.depth - kTogether * F::kStep : 0;
    for (int64_t k = first; k < end; k += F::kStep) {
      for (int j = 0; j < F::kStep && k + j < ahead; ++j) {
        const T* next = w_ + (k + j + kTogether * F::kStep) * w_stride() + columns.first;
        for (int l = 0; l < kLines; ++l) __builtin_prefetch(reinterpret_cast<const char*>(next) + l * kLineBytes, 0, 2);
      }
      f32x16 w[kVectors];
      load(k, columns, w);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = F::add_product(sums[r][v], w[v], x_ + r * x_stride_ + k);
      }
    }
    std::memcpy(to, sums, sizeof(sums));
  }

  void many_rows(int64_t panel, int64_t next_panel) const {
    thread_local std::vector<f32x16> sums;
    for (int64_t row = 0; row < s_.rows; row += kManyRows) {
      const int64_t rows = std::min(kManyRows, s_.rows - row), of_part = rows * kVectors;
      sums.assign(of_part * s_.parts(), f32x16{});
      for (int64_t part = 0; part < s_.parts(); ++part) {
        const bool last = part + 1 == s_.parts();
        const Columns next = last ? columns_of(next_panel, 0) : columns_of(panel, part + 1);
        add_up(row, rows, columns_of(panel, part), next, &sums[part * of_part]);
      }
      for (int64_t r = 0; r < rows; ++r) {
        f32x16* of_row = &sums[r * kVectors];
        finish(row + r, panel, of_row, s_.parts() == 2 ? of_row + of_part : nullptr);
      }
    }
  }

  // Sums of rows of x over columns of w; `next`: what is wanted after these.
  void add_up(int64_t row, int64_t rows, Columns columns, Columns next, f32x16* sums) const {
    alignas(64) float packed[kSteps * kPanel];
    constexpr int64_t run = kSteps * F::kStep;  // rows of w
    const int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t k = 0; k < s_.depth; k += run) {
      const int64_t end = std::min(k + run, s_.depth), steps = (end - k + F::kStep - 1) / F::kStep;
      Ahead ahead = end < s_.depth ? ahead_of(end, columns, tiles) : ahead_of(0, next, tiles);
      pack(k, steps, columns, packed);
      for (int64_t r = 0; r < rows; r += kRows) {
        with_rows(std::min<int64_t>(kRows, rows - r), [&](auto count) {
          tile<count>(packed, steps, x_ + (row + r) * x_stride_ + k, sums + r * kVectors, ahead);
        });
      }
    }
  }

  void pack(int64_t k, int64_t steps, Columns columns, float* to) const {
    const bool whole = columns.count == kPanel && k + steps * F::kStep <= s_.depth;
    const T* from = w_ + k * w_stride() + columns.first;
    for (int64_t i = 0; i < steps; ++i, from += F::kStep * w_stride(), to += kPanel) {
      f32x16 w[kVectors];
      if (whole) {
        F::load(from, w_stride(), w);
      } else {
        load(k + i * F::kStep, columns, w);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) native::store(w[v], to + v * kLanes);
    }
  }

  // The rows of a panel of w that are packed next: tiles ask memory for them while they compute, a step of them every
  // `pace` steps of their own.
  struct Ahead {
    const char* from;
    int64_t stride;  // bytes from row to row
    int64_t steps, pace;
    int64_t wait = 0;

    void ask() {
      if (--wait >= 0 || steps == 0) return;
      wait = pace - 1;
      --steps;
      for (int i = 0; i < F::kStep; ++i, from += stride) {
        for (int l = 0; l < kLines; ++l) __builtin_prefetch(from + l * kLineBytes);
      }
    }
  };

  Ahead ahead_of(int64_t k, Columns columns, int64_t tiles) const {
    const char* from = reinterpret_cast<const char*>(w_ + k * w_stride() + columns.first);
    const int64_t steps = columns.count == kPanel ? std::min(kSteps, (s_.depth - k) / F::kStep) : 0;
    return {from, w_stride() * kBytes, steps, tiles};
  }

  template <int Rows>
  void tile(const float* panel, int64_t steps, const T* x, f32x16* to, Ahead& ahead) const {
    f32x16 sums[Rows][kVectors];
    for (int r = 0; r < Rows; ++r) std::memcpy(sums[r], to + r * kVectors, sizeof(sums[r]));
    for (int64_t i = 0; i < steps; ++i, panel += kPanel, x += F::kStep) {
      ahead.ask();
      f32x16 w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) w[v] = native::load(panel + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = F::add_product(sums[r][v], w[v], x + r * x_stride_);
      }
    }
    for (int r = 0; r < Rows; ++r) std::memcpy(to + r * kVectors, sums[r], sizeof(sums[r]));
  }

  static constexpr int kLineBytes = 64;
  static constexpr int64_t kBytes = sizeof(T);
  static constexpr int kLines = kPanel * kBytes / kLineBytes;

  Sizes s_;
  const T *x_, *w_;
  T* y_;
  int64_t x_stride_ = s_.depth;
  std::vector<T> padded_;
};

template <class T>
void run(ffi::ThreadPool& pool, Sizes sizes, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, ffi::AnyBuffer& y) {
  Product<T>(sizes, static_cast<const T*>(x.untyped_data()), static_cast<const T*>(w.untyped_data()),
             static_cast<T*>(y.untyped_data()))
      .run(pool);
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                  int64_t activation) {
  const Sizes sizes{x.dimensions()[0], x.dimensions()[1], y->dimensions()[1], static_cast<Activation>(activation)};
  if (x.element_type() == ffi::F32) {
    run<float>(pool, sizes, x, w, *y);
  } else {
    run<bfloat16>(pool, sizes, x, w, *y);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(matmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("activation"));
