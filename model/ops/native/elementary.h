// Elementary functions of vectors, within about one unit in the last place. Included once for each
// instruction set.

template <class Real>
EBB_INLINE Vector<Real> splat(Real x) {
  return Vector<Real>{} + x;
}

template <class Real>
EBB_INLINE Vector<Real> load_some(const Real* p, int64_t count) {
  if (count >= LANES<Real>) return load(p);
  Real padded[LANES<Real>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

template <class Real>
EBB_INLINE void store_some(Real* p, Vector<Real> x, int64_t count) {
  if (count >= LANES<Real>) return store(p, x);
  Real padded[LANES<Real>];
  store(padded, x);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

template <class Real>
EBB_INLINE void add_some(Real* p, Vector<Real> x, int64_t count) {
  store_some(p, load_some(p, count) + x, count);
}

// The sum of all lanes, by halves.
template <class Real, int lanes = LANES<Real>>
EBB_INLINE Real sum_lanes(const Real* p) {
  typedef Real Half __attribute__((vector_size(lanes / 2 * sizeof(Real))));
  if constexpr (lanes == 2) {
    return p[0] + p[1];
  } else {
    Half a, b;
    __builtin_memcpy(&a, p, sizeof a);
    __builtin_memcpy(&b, p + lanes / 2, sizeof b);
    a += b;
    Real sums[lanes / 2];
    __builtin_memcpy(sums, &a, sizeof a);
    return sum_lanes<Real, lanes / 2>(sums);
  }
}

template <class Real>
EBB_INLINE Real sum_lanes(Vector<Real> x) {
  Real lanes[LANES<Real>];
  store(lanes, x);
  return sum_lanes<Real>(lanes);
}

// 1 / n!.
template <class Real>
constexpr Real COEFFICIENTS[] = {
    1,
    1,
    Real(1.0 / 2),
    Real(1.0 / 6),
    Real(1.0 / 24),
    Real(1.0 / 120),
    Real(1.0 / 720),
    Real(1.0 / 5040),
    Real(1.0 / 40320),
    Real(1.0 / 362880),
    Real(1.0 / 3628800),
    Real(1.0 / 39916800),
    Real(1.0 / 479001600),
    Real(1.0 / 6227020800),
};

// 2^n e^r with |r| <= ln(2) / 2, the latter by its Taylor series: up to the 7th power the remainder
// is below 6e-9, up to the 13th below 5e-18.
template <class Real>
EBB_INLINE Vector<Real> exponential(Vector<Real> x) {
  constexpr bool single = sizeof(Real) == 4;
  constexpr int mantissa = single ? 23 : 52, degree = single ? 7 : 13;
  constexpr Real least = single ? -87 : -708, most = single ? 88 : 709;
  // Its addition rounds to whole numbers, which then stand in the lowest bits.
  constexpr Real shifter = single ? 0x1.8p23 : 0x1.8p52;
  constexpr Real high = single ? 0x1.62e4p-1 : 0x1.62e42fefa38p-1;
  constexpr Real low = single ? 0x1.7f7d1cp-20 : 0x1.ef35793c7673p-45;
  typedef Index<Real> Bits __attribute__((vector_size(EBB_VECTOR_BYTES)));
  x = x < least ? splat<Real>(least) : x;  // a NaN stays one
  x = x > most ? splat<Real>(most) : x;
  const Vector<Real> shifted = x * Real(0x1.71547652b82fep0) + shifter;
  const Vector<Real> n = shifted - shifter;
  const Vector<Real> r = (x - n * high) - n * low;
  Vector<Real> series = splat<Real>(COEFFICIENTS<Real>[degree]);
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) series = series * r + COEFFICIENTS<Real>[i];
  Bits power;
  __builtin_memcpy(&power, &shifted, sizeof power);
  const Real one = 1;
  Index<Real> ones;
  __builtin_memcpy(&ones, &one, sizeof one);
  power = (power << mantissa) + ones;
  Vector<Real> scale;
  __builtin_memcpy(&scale, &power, sizeof scale);
  return series * scale;
}

template <class Real>
EBB_INLINE Vector<Real> sigmoid(Vector<Real> x) {
  return Real(1) / (Real(1) + exponential<Real>(-x));
}
