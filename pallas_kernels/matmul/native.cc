// Matrix product for CPUs: x [M, K] times w [K, N], both float32 or both bfloat16, added up in float32.
//
// A work item is a strip of columns. Of it a run of rows of w is copied into panels of 64 columns, as the multiply-adds
// take them, and every row of x meets it there, six rows at a time: 24 vectors of sums. Up to six rows of x in all use w
// as they read it. What an element of the result is depends on its row of x and its column of w alone, not on how many
// rows there are: products are added in the order of K everywhere.
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
constexpr int64_t kSteps = 64;              // that are packed at a time: 16 KiB, half of an L1 cache
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

struct Sizes {
  int64_t rows, depth, columns;
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
    if (s_.rows * s_.depth * s_.columns < kWorthSharing) {
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

  // One panel of rows [k, k + kStep) of w, zeros where there is none.
  void load(int64_t k, int64_t panel, f32x16* to) const {
    const int64_t column = panel * kPanel, columns = std::min<int64_t>(kPanel, s_.columns - column);
    const T* from = w_ + k * s_.columns + column;
    if (columns == kPanel && k + F::kStep <= s_.depth) return F::load(from, s_.columns, to);
    T rows[F::kStep * kPanel] = {};
    for (int64_t i = 0; i < F::kStep && k + i < s_.depth; ++i) {
      std::copy_n(from + i * s_.columns, columns, rows + i * kPanel);
    }
    F::load(rows, kPanel, to);
  }

  // Sums of one row of x over one panel, to the result.
  void finish(int64_t row, int64_t panel, f32x16* sums) const {
    F::in_order(sums);
    const int64_t column = panel * kPanel, columns = std::min<int64_t>(kPanel, s_.columns - column);
    T* to = y_ + row * s_.columns + column;
    float values[kPanel];
    std::memcpy(values, sums, sizeof(values));
    for (int64_t i = 0; i < columns; ++i) native::narrow(values[i], to + i);
  }

  // Eight steps of K at a time over the whole strip, whose sums stay in the L1 cache: w is read in eight long runs.
  void few_rows(int64_t first, int64_t last) const {
    thread_local std::vector<f32x16> sums;
    sums.assign(s_.rows * (last - first) * kVectors, f32x16{});
    for (int64_t k = 0; k < s_.depth; k += kTogether * F::kStep) {
      for (int64_t panel = first; panel < last; ++panel) {
        with_rows(s_.rows, [&](auto rows) { few<rows>(k, panel, &sums[(panel - first) * rows * kVectors]); });
      }
    }
    for (int64_t panel = first; panel < last; ++panel) {
      for (int64_t r = 0; r < s_.rows; ++r) finish(r, panel, &sums[((panel - first) * s_.rows + r) * kVectors]);
    }
  }

  template <int Rows>
  void few(int64_t first, int64_t panel, f32x16* to) const {
    f32x16 sums[Rows][kVectors];
    std::memcpy(sums, to, sizeof(sums));
    const int64_t end = std::min(first + kTogether * F::kStep, s_.depth);
    const int64_t ahead = (panel + 1) * kPanel <= s_.columns ? s_.depth - kTogether * F::kStep : 0;
    for (int64_t k = first; k < end; k += F::kStep) {
      for (int j = 0; j < F::kStep && k + j < ahead; ++j) {
        const T* next = w_ + (k + j + kTogether * F::kStep) * s_.columns + panel * kPanel;
        for (int l = 0; l < kLines; ++l) __builtin_prefetch(reinterpret_cast<const char*>(next) + l * kLineBytes, 0, 2);
      }
      f32x16 w[kVectors];
      load(k, panel, w);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = F::add_product(sums[r][v], w[v], x_ + r * x_stride_ + k);
      }
    }
    std::memcpy(to, sums, sizeof(sums));
  }

  void many_rows(int64_t panel, int64_t next_panel) const {
    thread_local std::vector<float> sums;
    alignas(64) float packed[kSteps * kPanel];
    constexpr int64_t run = kSteps * F::kStep;  // rows of w
    for (int64_t row = 0; row < s_.rows; row += kManyRows) {
      const int64_t rows = std::min(kManyRows, s_.rows - row);
      sums.assign(rows * kPanel, 0.0f);
      for (int64_t k = 0; k < s_.depth; k += run) {
        const int64_t end = std::min(k + run, s_.depth), steps = (end - k + F::kStep - 1) / F::kStep;
        const int64_t tiles = (rows + kRows - 1) / kRows;
        Ahead ahead = end < s_.depth ? ahead_of(end, panel, tiles) : ahead_of(0, next_panel, tiles);
        pack(k, steps, panel, packed);
        for (int64_t r = 0; r < rows; r += kRows) {
          with_rows(std::min<int64_t>(kRows, rows - r), [&](auto count) {
            tile<count>(packed, steps, x_ + (row + r) * x_stride_ + k, &sums[r * kPanel], ahead);
          });
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        f32x16 values[kVectors];
        std::memcpy(values, &sums[r * kPanel], sizeof(values));
        finish(row + r, panel, values);
      }
    }
  }

  void pack(int64_t k, int64_t steps, int64_t panel, float* to) const {
    const bool whole = (panel + 1) * kPanel <= s_.columns && k + steps * F::kStep <= s_.depth;
    const T* from = w_ + k * s_.columns + panel * kPanel;
    for (int64_t i = 0; i < steps; ++i, from += F::kStep * s_.columns, to += kPanel) {
      f32x16 w[kVectors];
      if (whole) {
        F::load(from, s_.columns, w);
      } else {
        load(k + i * F::kStep, panel, w);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) native::store(w[v], to + v * kLanes);
    }
  }

  // What is packed next of one panel: tiles ask memory for it while they compute, each for some lines of every row.
  struct Ahead {
    const char* from;
    int64_t stride;  // bytes from row to row
    int64_t steps;
    int lines_a_tile;
    int line = 0;
  };

  Ahead ahead_of(int64_t k, int64_t panel, int64_t tiles) const {
    const bool whole = (panel + 1) * kPanel <= s_.columns;
    return {reinterpret_cast<const char*>(w_ + k * s_.columns + panel * kPanel), s_.columns * kBytes,
            whole ? std::min(kSteps, (s_.depth - k) / F::kStep) : 0, static_cast<int>((kLines + tiles - 1) / tiles)};
  }

  template <int Rows>
  void tile(const float* panel, int64_t steps, const T* x, float* to, Ahead& ahead) const {
    f32x16 sums[Rows][kVectors];
    for (int r = 0; r < Rows; ++r) std::memcpy(sums[r], to + r * kPanel, sizeof(sums[r]));
    const int lines = std::min(ahead.lines_a_tile, kLines - ahead.line);
    const char* wanted = ahead.from + ahead.line * kLineBytes;
    const int64_t asking = lines > 0 ? ahead.steps : 0;
    for (int64_t i = 0; i < steps; ++i, panel += kPanel, x += F::kStep) {
      if (i < asking) {
        for (int j = 0; j < F::kStep; ++j, wanted += ahead.stride) {
          for (int l = 0; l < lines; ++l) __builtin_prefetch(wanted + l * kLineBytes, 0, 2);
        }
      }
      f32x16 w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) w[v] = native::load(panel + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = F::add_product(sums[r][v], w[v], x + r * x_stride_);
      }
    }
    ahead.line += lines;
    for (int r = 0; r < Rows; ++r) std::memcpy(to + r * kPanel, sums[r], sizeof(sums[r]));
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

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y) {
  const Sizes sizes{x.dimensions()[0], x.dimensions()[1], w.dimensions()[1]};
  if (x.element_type() == ffi::F32) {
    run<float>(pool, sizes, x, w, *y);
  } else {
    run<bfloat16>(pool, sizes, x, w, *y);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    matmul, Matmul,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
