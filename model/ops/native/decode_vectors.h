// Vectors of 16 floats, whatever the registers of the CPU, and functions of them; included by decode_step.h for each instruction set.

INLINE Floats all(float x) { return Floats{} + x; }

INLINE Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

INLINE Floats load(const float* p, int64_t left) {  // zeros behind the end
  if (left >= LANES) return load(p);
  Floats x = {};
  std::memcpy(&x, p, left * sizeof(float));
  return x;
}

INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

INLINE void store(float* p, Floats x, int64_t left) {
  std::memcpy(p, &x, left >= LANES ? sizeof x : left * sizeof(float));
}

template <class Vector>
INLINE auto sum(Vector x) {
#pragma GCC unroll 4
  for (int width = LANES / 2; width; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

INLINE float largest(Floats x) {
#pragma GCC unroll 4
  for (int width = LANES / 2; width; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  return x[0];
}

INLINE Floats choose(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }

INLINE Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// exp in float32's precision: 2^n times a polynomial in what is left, |r| <= ln(2) / 2.
INLINE Floats exponential(Floats x) {
  x = choose(x > 88.0f, all(88.0f), choose(x < -87.0f, all(-87.0f), x));
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = all(1.0f / 5040.0f);
  y = y * r + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return y * (Floats)(((Ints)shifted - (0x4b400000 - 127)) << 23);  // NaN stays NaN
}

INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Near zero its Taylor series, else through exp: small values keep their digits.
INLINE Floats hyperbolic_tangent(Floats x) {
  const Floats s = x * x;
  Floats series = all(-1382.0f / 155925.0f);
  series = series * s + 62.0f / 2835.0f;
  series = series * s - 17.0f / 315.0f;
  series = series * s + 2.0f / 15.0f;
  series = series * s - 1.0f / 3.0f;
  const Floats far = 1.0f - 2.0f / (exponential(x + x) + 1.0f);
  return choose(absolute(x) < 0.25f, x + x * s * series, far);
}

// log(1 + exp(x)): log(1 + e) is 2 artanh(e / (2 + e)), a short series for e <= 1.
INLINE Floats softplus(Floats x) {
  const Floats e = exponential(-absolute(x)), z = e / (2.0f + e), s = z * z;
  Floats series = all(1.0f / 13.0f);
  series = series * s + 1.0f / 11.0f;
  series = series * s + 1.0f / 9.0f;
  series = series * s + 1.0f / 7.0f;
  series = series * s + 1.0f / 5.0f;
  series = series * s + 1.0f / 3.0f;
  series = series * s + 1.0f;
  return choose(x < 0.0f, Floats{}, x) + (z + z) * series;
}

enum Activation { NONE, TANH, SIGMOID, SQUARED_RELU, SILU, SOFTPLUS, LOG_SIGMOID, ELU_PLUS_ONE };

INLINE Floats activate(int64_t activation, Floats x) {
  switch (activation) {
    case TANH: return hyperbolic_tangent(x);
    case SIGMOID: return sigmoid(x);
    case SQUARED_RELU: { const Floats y = choose(x < 0.0f, Floats{}, x); return y * y; }
    case SILU: return x * sigmoid(x);
    case SOFTPLUS: return softplus(x);
    case LOG_SIGMOID: return -softplus(-x);
    case ELU_PLUS_ONE: return choose(x > 0.0f, x + 1.0f, exponential(x));
    default: return x;
  }
}
