// Sixteen floats at a time, in the vector extension that GCC and Clang share: each compiles them to the registers that
// the machine has.
#pragma once

#include <cstdint>
#include <cstring>

namespace native {

constexpr int kLanes = 16;

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

// The bits of a bfloat16: the upper half of a float's.
struct bfloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_of(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

inline float widened(float x) { return x; }
inline float widened(bfloat16 x) { return bits_of<float>(uint32_t{x.bits} << 16); }

// To the nearest, ties to even; NaN stays NaN.
inline void narrow(float x, float* y) { *y = x; }
inline void narrow(float x, bfloat16* y) {
  const uint32_t bits = bits_of<uint32_t>(x);
  y->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
inline float rounded_to(float x) {
  T y;
  narrow(x, &y);
  return widened(y);
}

inline f32x16 load(const float* from) {
  f32x16 x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline f32x16 load(const bfloat16* from) {
  u16x16 x;
  std::memcpy(&x, from, sizeof(x));
  return bits_of<f32x16>(__builtin_convertvector(x, u32x16) << 16);
}

inline void store(f32x16 x, float* to) { std::memcpy(to, &x, sizeof(x)); }

inline void store(f32x16 x, bfloat16* to) {
  const u32x16 bits = bits_of<u32x16>(x);
  const u32x16 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const u16x16 y = __builtin_convertvector(x == x ? rounded : u32x16{} + 0x7fc0, u16x16);
  std::memcpy(to, &y, sizeof(y));
}

inline f32x16 all(float x) { return f32x16{} + x; }

inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

inline float largest(f32x16 x) {
  float y = x[0];
  for (int i = 1; i < kLanes; ++i) y = x[i] > y ? x[i] : y;
  return y;
}

inline float sum(f32x16 x) {
  float y = 0;
  for (int i = 0; i < kLanes; ++i) y += x[i];
  return y;
}

// exp within 2 units in the last place, of x that is taken to be at least -87 and at most 88. Reduction and polynomial as in Cephes'
// expf: e^x = 2^n e^r with |r| <= ln(2) / 2.
inline f32x16 exp(f32x16 x) {
  x = max(x, all(-87.0f));
  x = x < 88.0f ? x : all(88.0f);
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is in its low bits
  const f32x16 shifted = x * 1.44269504088896341f + kToInteger;
  const f32x16 n = shifted - kToInteger;
  f32x16 r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  f32x16 p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const i32x16 exponent = (bits_of<i32x16>(shifted) - bits_of<int32_t>(kToInteger)) << 23;
  return bits_of<f32x16>(bits_of<i32x16>(p) + exponent);
}

// tanh, within 2e-7: by exp where that does not cancel, by its series below a quarter.
inline f32x16 tanh(f32x16 x) {
  const f32x16 size = x < 0.0f ? -x : x;
  const f32x16 e = exp(size * -2.0f);
  const f32x16 far = (1.0f - e) / (1.0f + e);
  const f32x16 s = x * x;
  const f32x16 near =
      size + size * s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835))));
  const f32x16 y = size < 0.25f ? near : far;
  return x < 0.0f ? -y : y;
}

}  // namespace native
