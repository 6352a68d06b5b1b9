// exp and exp - 1 of numbers <= 0, and the decays that they make. Included once for each
// instruction set.

template <class Real>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float lowest = -87, shift = 12582912;  // 1.5 * 2^23: rounds to whole numbers
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int terms = 8, mantissa = 23, bias = 127;
};
template <>
struct Exponential<double> {
  static constexpr double lowest = -708, shift = 6755399441055744;  // 1.5 * 2^52
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr int terms = 13, mantissa = 52, bias = 1023;
};

// exp(x) = power (1 + rest) with power = 2^n, rest = exp(r) - 1 for x = n ln 2 + r: Taylor's series
// for |r| <= ln(2) / 2, as long as its terms count. Not for x below `lowest`, where exp(x) is 0 here.
template <class Real>
struct Split {
  Vector<Real> power, rest;
  Vector<Index<Real>> is_zero;
};

// 1 / n!, as constants: formed where they are used they would cost a division each.
template <class Real>
struct InverseFactorials {
  Real of[Exponential<Real>::terms + 1] = {1};
  constexpr InverseFactorials() {
    Real factorial = 1;
    for (int i = 1; i <= Exponential<Real>::terms; ++i) of[i] = 1 / (factorial *= i);
  }
};

template <class Real>
EBB_INLINE Split<Real> split_exponential(Vector<Real> x) {
  using V = Vector<Real>;
  using Constants = Exponential<Real>;
  using Whole = Vector<Index<Real>>;
  const V lowest = V{} + Constants::lowest;
  const Whole is_zero = x < lowest;
  const V bounded = is_zero ? lowest : x;
  const V shifted = bounded * Real(1.4426950408889634) + Constants::shift;
  const V n = shifted - Constants::shift;
  const V r = bounded - n * Constants::ln2_high - n * Constants::ln2_low;
  constexpr InverseFactorials<Real> inverse;
  V sum = V{} + inverse.of[Constants::terms];
#pragma GCC unroll 16
  for (int i = Constants::terms - 1; i >= 2; --i) sum = sum * r + inverse.of[i];
  const Whole one = Whole{} + (Index<Real>(Constants::bias) << Constants::mantissa);
  const Whole power = ((Whole)shifted << Constants::mantissa) + one;
  return {(V)power, r + r * r * sum, is_zero};
}

template <class Real>
EBB_INLINE Vector<Real> exp_of_negative(Vector<Real> x) {
  const Split<Real> e = split_exponential<Real>(x);
  return e.is_zero ? Vector<Real>{} : e.power + e.power * e.rest;
}

// The decays of some channels of one row, from their logs, [T, channels].
//
// A weak decay is nearly 1, and rounding it to float32 is the same mistake at every step: after
// thousands of steps digits are gone. So what rounding takes from 1 + (exp(g) - 1) is handed on to
// the next step: no product of successive decays is off by more than a rounding or two.
template <class Real>
EBB_TARGET void decay_channels(const Real* log_decay, Real* decay, int64_t time, int64_t stride,
                               int64_t count) {
  constexpr int N = 4;
  using V = Vector<Real>;
  V g[N], w[N], owed[N];
  clear<Real>(owed);
  for (int64_t t = 0; t < time; ++t) {
    load<Real>(g, log_decay + t * stride, count);
    for (int j = 0; j < N; ++j) {
      const Split<Real> e = split_exponential<Real>(g[j]);
      const V exact = e.power * e.rest + (e.power - 1) + owed[j], rounded = exact + 1;
      const auto is_weak = e.power > Real(0.25);
      w[j] = is_weak ? rounded : e.is_zero ? V{} : e.power + e.power * e.rest;
      owed[j] = is_weak ? exact - (rounded - 1) : V{};
    }
    store<Real>(decay + t * stride, w, count);
  }
}

template <class Real>
constexpr DecayKernels<Real> DECAY_KERNELS = {4 * LANES<Real>, decay_channels<Real>};
