// Matrix product for CPUs: x [M, K] times w, both float32 or both bfloat16, added up in float32, to either. Gated: w has as many
// columns again, and of each column's two sums, gate and up, the result is activation(gate) * up.
//
// w comes in panels of 64 columns (`Panels` in __init__.py), each a run of memory that is read from its beginning to its
// end: 256 bytes a step, one row of K in float32, two in bfloat16. Six rows of x meet a panel at a time: 24 vectors of sums,
// in registers along all of K, while the panel stays in the L2 cache for the next six rows. What an element of the result
// is depends on its row of x and its column of w alone, not on how many rows there are.
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

constexpr int kVectors = 4;                 // of a step of a panel
constexpr int kPanel = kVectors * kLanes;   // columns
constexpr int kRows = 6;                    // of x that meet a panel together
constexpr int64_t kSoon = 16;               // steps until what few rows ask for is there
constexpr int64_t kStrip = 16;              // panels that few rows take together, a longer run of memory
constexpr int64_t kWorthSharing = 1 << 20;  // multiply-adds: with fewer, waking a thread takes longer

// How a dtype is multiplied: `kStep` rows of w at a time.
template <class T>
struct Format;

template <>
struct Format<float> {
  static constexpr int kStep = 1;
  static f32x16 add_product(f32x16 sum, f32x16 w, const float* x) { return sum + *x * w; }
};

// Each lane holds two rows of a column, the first in its low half.
template <>
struct Format<bfloat16> {
  static constexpr int kStep = 2;
  static f32x16 add_product(f32x16 sum, f32x16 w, const bfloat16* x) {
#ifdef __AVX512BF16__
    int32_t pair;
    std::memcpy(&pair, x, sizeof(pair));
    const __m512i both = _mm512_set1_epi32(pair);
    return native::bits_of<f32x16>(_mm512_dpbf16_ps(native::bits_of<__m512>(sum), native::bits_of<__m512bh>(both),
                                                    native::bits_of<__m512bh>(w)));
#else
    const native::u32x16 bits = native::bits_of<native::u32x16>(w);
    sum = sum + native::widened(x[0]) * native::bits_of<f32x16>(bits << 16);
    return sum + native::widened(x[1]) * native::bits_of<f32x16>(bits & 0xffff0000);
#endif
  }
};

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
  int64_t steps;  // of a panel
};

template <class T, class Y>
class Product {
  using F = Format<T>;

 public:
  Product(Sizes sizes, const T* x, const float* w, Y* y) : s_(sizes), x_(x), w_(w), y_(y) {
    if (s_.depth % F::kStep) pad_depth();
  }

  void run(ffi::ThreadPool& pool) {
    const int64_t threads = pool.num_threads();
    int64_t strip = s_.rows <= kRows ? kStrip : 1;
    while (strip > 1 && panels_ < 4 * strip * threads) strip /= 2;  // all threads must end together
    const auto work = [&](int64_t item) {
      for (int64_t i = item * strip; i < std::min((item + 1) * strip, panels_); ++i) {
        compute(i, std::min(i + threads, panels_ - 1));
      }
    };
    const int64_t items = (panels_ + strip - 1) / strip;
    if (s_.rows * s_.depth * panels_ * parts_ * kPanel < kWorthSharing) {
      for (int64_t i = 0; i < items; ++i) work(i);
    } else {
      native::parallel_for(pool, items, work);
    }
  }

 private:
  // x with a zero behind each row.
  void pad_depth() {
    padded_.resize(s_.rows * (s_.depth + 1));
    for (int64_t r = 0; r < s_.rows; ++r) {
      std::copy_n(x_ + r * s_.depth, s_.depth, &padded_[r * (s_.depth + 1)]);
    }
    x_ = padded_.data();
    x_stride_ = s_.depth + 1;
  }

  const float* panel(int64_t i) const { return w_ + i * s_.steps * kPanel; }

  // What is read next: tiles ask memory for it while they compute, a step every `pace` steps of their own.
  struct Ahead {
    const float* from;
    int64_t steps, pace;
    int64_t wait = 0;

    void ask() {
      if (--wait >= 0 || steps == 0) return;
      wait = pace - 1;
      --steps;
      for (int v = 0; v < kVectors; ++v, from += kLanes) __builtin_prefetch(from);
    }
  };

  // A panel of the result; `next`: the one that this thread is likely to compute after it.
  void compute(int64_t i, int64_t next) const {
    const int64_t tiles = (s_.rows + kRows - 1) / kRows;
    Ahead ahead[2];
    for (int64_t part = 0; part < parts_; ++part) {
      const float* w = panel(i + part * panels_);
      ahead[part] = {tiles == 1 ? w + kSoon * kPanel : panel(next + part * panels_), s_.steps, tiles};
    }
    for (int64_t row = 0; row < s_.rows; row += kRows) {
      with_rows(std::min<int64_t>(kRows, s_.rows - row), [&](auto rows) { tile<rows>(row, i, ahead); });
    }
  }

  template <int Rows>
  void tile(int64_t row, int64_t i, Ahead* ahead) const {
    f32x16 sums[Rows][kVectors];
    add_up<Rows>(row, panel(i), sums, ahead[0]);
    if (parts_ == 2) {
      f32x16 up[Rows][kVectors];
      add_up<Rows>(row, panel(i + panels_), up, ahead[1]);
      for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < kVectors; ++v) sums[r][v] = activated(sums[r][v], s_.activation) * up[r][v];
      }
    }
    const int64_t count = std::min<int64_t>(kPanel, s_.columns - i * kPanel);
    for (int r = 0; r < Rows; ++r) {
      Y values[kPanel];
      for (int v = 0; v < kVectors; ++v) native::store(sums[r][v], values + v * kLanes);
      std::copy_n(values, count, y_ + (row + r) * s_.columns + i * kPanel);
    }
  }

  // Sums of rows of x over a panel.
  template <int Rows>
  void add_up(int64_t row, const float* panel, f32x16 (&to)[Rows][kVectors], Ahead& ahead) const {
    const T* x = x_ + row * x_stride_;
    f32x16 sums[Rows][kVectors] = {};
    for (int64_t i = 0; i < s_.steps; ++i, panel += kPanel, x += F::kStep) {
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
    std::memcpy(to, sums, sizeof(sums));
  }

  Sizes s_;
  const T* x_;
  const float* w_;  // of either dtype: vectors of 64 bytes
  Y* y_;
  int64_t parts_ = s_.activation == kNone ? 1 : 2;
  int64_t panels_ = (s_.columns + kPanel - 1) / kPanel;  // of the result
  int64_t x_stride_ = s_.depth;
  std::vector<T> padded_;
};

template <class T, class Y>
void run(ffi::ThreadPool& pool, Sizes sizes, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, ffi::AnyBuffer& y) {
  Product<T, Y>(sizes, static_cast<const T*>(x.untyped_data()), static_cast<const float*>(w.untyped_data()),
                static_cast<Y*>(y.untyped_data()))
      .run(pool);
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                  int64_t activation) {
  const Sizes sizes{x.dimensions()[0], x.dimensions()[1], y->dimensions()[1], static_cast<Activation>(activation),
                    w.dimensions()[1]};
  if (x.element_type() == ffi::F32) {
    run<float, float>(pool, sizes, x, w, *y);
  } else if (y->element_type() == ffi::F32) {
    run<bfloat16, float>(pool, sizes, x, w, *y);
  } else {
    run<bfloat16, bfloat16>(pool, sizes, x, w, *y);
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
