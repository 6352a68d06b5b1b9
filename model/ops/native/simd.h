// Vectors of one instruction set, through the vector extension of GCC and Clang.
//
// Included once for each instruction set, with EBB_TARGET its function attribute. Every helper
// carries it: a vector operation is lowered in the function that it stands in, before inlining.

#define EBB_INLINE EBB_TARGET __attribute__((always_inline)) inline

template <class Real>
struct VectorOf {
  typedef Real Type __attribute__((vector_size(EBB_VECTOR_BYTES)));
};
template <class Real>
using Vector = typename VectorOf<Real>::Type;

template <class Real>
constexpr int LANES = EBB_VECTOR_BYTES / int(sizeof(Real));

template <class Real>
EBB_INLINE Vector<Real> load(const Real* p) {
  Vector<Real> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class Real>
EBB_INLINE void store(Real* p, Vector<Real> x) {
  __builtin_memcpy(p, &x, sizeof x);
}

template <class Real, int NV>
EBB_INLINE void clear(Vector<Real> (&x)[NV]) {
  for (int j = 0; j < NV; ++j) x[j] = Vector<Real>{};
}

// The first `count` numbers at p, and zeros after them.
template <class Real, int NV>
EBB_INLINE void load(Vector<Real> (&x)[NV], const Real* p, int64_t count) {
  constexpr int lanes = LANES<Real>;
  if (count >= NV * lanes) {
    for (int j = 0; j < NV; ++j) x[j] = load(p + j * lanes);
  } else {
    Real padded[NV * lanes] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    for (int j = 0; j < NV; ++j) x[j] = load(padded + j * lanes);
  }
}

template <class Real, int NV>
EBB_INLINE void store(Real* p, const Vector<Real> (&x)[NV], int64_t count) {
  constexpr int lanes = LANES<Real>;
  if (count >= NV * lanes) {
    for (int j = 0; j < NV; ++j) store(p + j * lanes, x[j]);
  } else {
    Real padded[NV * lanes];
    for (int j = 0; j < NV; ++j) store(padded + j * lanes, x[j]);
    for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
  }
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using Type = Indices<I...>;
};

// Lane i: a_i + a_(i ^ half) where bit `half` of i is 0, else b_i + b_(i ^ half).
template <int half, class Real, int... I>
EBB_INLINE Vector<Real> fold(Vector<Real> a, Vector<Real> b, Indices<I...>) {
  constexpr int lanes = LANES<Real>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((I & half) ? lanes + (I ^ half) : I)...) +
         __builtin_shufflevector(a, b, ((I & half) ? lanes + I : (I ^ half))...);
#else
  using Mask = Vector<Index<Real>>;
  return __builtin_shuffle(a, b, Mask{((I & half) ? lanes + (I ^ half) : I)...}) +
         __builtin_shuffle(a, b, Mask{((I & half) ? lanes + I : (I ^ half))...});
#endif
}

// The sums of as many rows as there are lanes, each row one vector, stored one after the other:
// a tree of folds, its leaves the rows. `first` holds the bits below `half` of those meant.
template <class Real, int half = 1, int first = 0>
EBB_INLINE Vector<Real> row_sums(const Real* rows) {
  if constexpr (half == LANES<Real>) {
    return load(rows + first * half);
  } else {
    return fold<half, Real>(row_sums<Real, 2 * half, first>(rows),
                            row_sums<Real, 2 * half, first + half>(rows),
                            typename CountTo<LANES<Real>>::Type{});
  }
}
