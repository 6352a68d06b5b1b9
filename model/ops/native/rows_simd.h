// Vectors along the rows of rows.h, the last one of a row perhaps in part. Included once for each
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

// Zeros from lane `count` on.
template <class Real>
EBB_INLINE Vector<Real> first_lanes(Vector<Real> x, int64_t count) {
  if (count < LANES<Real>)
    for (int64_t i = count; i < LANES<Real>; ++i) x[i] = 0;
  return x;
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

template <class Real>
EBB_INLINE Vector<Real> sigmoid(Vector<Real> x) {
  const Vector<Real> e = exp_of_negative<Real>(x < Real(0) ? x : -x);
  return (x < Real(0) ? e : splat<Real>(1)) / (Real(1) + e);
}
