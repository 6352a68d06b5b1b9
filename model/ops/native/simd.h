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
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) x[j] = Vector<Real>{};
}

// The first `count` numbers at p, and zeros after them.
template <class Real, int NV>
EBB_INLINE void load(Vector<Real> (&x)[NV], const Real* p, int64_t count) {
  constexpr int lanes = LANES<Real>;
  if (count >= NV * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) x[j] = load(p + j * lanes);
  } else {
    Real padded[NV * lanes] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) x[j] = load(padded + j * lanes);
  }
}

template <class Real, int NV>
EBB_INLINE void store(Real* p, const Vector<Real> (&x)[NV], int64_t count) {
  constexpr int lanes = LANES<Real>;
  if (count >= NV * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(p + j * lanes, x[j]);
  } else {
    Real padded[NV * lanes];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(padded + j * lanes, x[j]);
    for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
  }
}

template <class Real>
EBB_INLINE Vector<Index<Real>> lane_numbers() {
  Vector<Index<Real>> x;
#pragma GCC unroll 16
  for (int i = 0; i < LANES<Real>; ++i) x[i] = i;
  return x;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using Type = Indices<I...>;
};

// Of two vectors as two rows of blocks of `half` lanes: a with every second block from b, and b with
// every other one from a. Twice the same is nothing.
template <class Real, int half, int... I>
EBB_INLINE void exchange(Vector<Real>& a, Vector<Real>& b, Indices<I...>) {
  constexpr int lanes = LANES<Real>;
#if defined(__clang__)
  const Vector<Real> x =
      __builtin_shufflevector(a, b, ((I & half) ? lanes + (I ^ half) : I)...);
  b = __builtin_shufflevector(a, b, ((I & half) ? lanes + I : (I ^ half))...);
#else
  using Mask = Vector<Index<Real>>;
  const Vector<Real> x = __builtin_shuffle(a, b, Mask{((I & half) ? lanes + (I ^ half) : I)...});
  b = __builtin_shuffle(a, b, Mask{((I & half) ? lanes + I : (I ^ half))...});
#endif
  a = x;
}

// The sums of as many rows as there are lanes, each row one vector, stored one after the other:
// a tree of exchanges, its leaves the rows. `first` holds the bits below `half` of those meant.
template <class Real, int half = 1, int first = 0>
EBB_INLINE Vector<Real> row_sums(const Real* rows) {
  if constexpr (half == LANES<Real>) {
    return load(rows + first * half);
  } else {
    Vector<Real> a = row_sums<Real, 2 * half, first>(rows);
    Vector<Real> b = row_sums<Real, 2 * half, first + half>(rows);
    exchange<Real, half>(a, b, typename CountTo<LANES<Real>>::Type{});
    return a + b;
  }
}

template <class Real, int half>
EBB_INLINE void transpose_square(Vector<Real> (&x)[LANES<Real>]) {
  if constexpr (half < LANES<Real>) {
    transpose_square<Real, 2 * half>(x);
#pragma GCC unroll 16
    for (int i = 0; i < LANES<Real>; ++i)
      if (!(i & half))
        exchange<Real, half>(x[i], x[i | half], typename CountTo<LANES<Real>>::Type{});
  }
}

// to[j][i] = from[i][j], rows apart by the strides; what stands beside them in `to` is kept.
template <class Real>
EBB_TARGET void transpose(Real* to, int64_t to_stride, const Real* from, int64_t from_stride,
                          int64_t rows, int64_t columns) {
  constexpr int lanes = LANES<Real>;
  for (int64_t i = 0; i < rows; i += lanes) {
    for (int64_t j = 0; j < columns; j += lanes) {
      if (rows - i >= lanes && columns - j >= lanes) {
        Vector<Real> x[lanes];
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r) x[r] = load(from + (i + r) * from_stride + j);
        transpose_square<Real, 1>(x);
#pragma GCC unroll 16
        for (int r = 0; r < lanes; ++r) store(to + (j + r) * to_stride + i, x[r]);
      } else {
        for (int64_t r = i; r < rows && r < i + lanes; ++r)
          for (int64_t c = j; c < columns && c < j + lanes; ++c)
            to[c * to_stride + r] = from[r * from_stride + c];
      }
    }
  }
}
