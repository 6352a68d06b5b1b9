// The scan of scan.h forward, over one panel of the state: K rows of up to NV vectors of columns.
//
// Columns of the state do not depend on each other, so a panel is scanned on its own, in L1. Vectors
// lie along V: sums over K, which is all there is, need no sums within a vector. Each row of the
// state is loaded and stored once a token. Included once for each instruction set.

// What the row loops of one token read, one number a row.
template <class Real>
struct Token {
  const Real *q, *k, *a, *b, *decay;
  int64_t decay_step;
};

template <class Real>
EBB_INLINE Token<Real> token_at(const Scan<Real>& s, const Head<Real>& h, int64_t t) {
  static const Real one = 1;
  const int64_t at = h.key_offset + t * h.key_step;
  Token<Real> x{s.q + at, s.k + at, s.a + at, s.b + at, &one, 0};
  if (s.decay_channels) {
    x.decay = s.decay + (s.decay_channels == 1 ? h.decay_offset(s, t) : at);
    x.decay_step = s.decay_channels > 1;
  }
  return x;
}

// The weight of a token's own value where the state is read before the write: q . (u k).
template <class Real>
EBB_INLINE Real own_weight(const Scan<Real>& s, const Head<Real>& h, const Token<Real>& x) {
  const Real* u = s.bonus + h.head * s.key_dim;
  Real sum = 0;
  for (int64_t i = 0; i < s.key_dim; ++i) sum += x.q[i] * u[i] * x.k[i];
  return sum;
}

template <class Real>
EBB_INLINE bool starts(const Scan<Real>& s, const Head<Real>& h, int64_t t) {
  return s.reset && s.reset[h.row * s.time + t];
}

template <class Real>
EBB_INLINE Real* checkpoint_at(const Scan<Real>& s, int64_t index, int64_t t) {
  const int64_t chunks = (s.time + s.chunk - 1) / s.chunk;
  return s.checkpoints + (index * chunks + t / s.chunk) * s.key_dim * padded_width(s.value_dim);
}

// A row of the state through one token: read, written, and what it adds to the sums over rows.
template <class Real, int NV, bool DELTA, bool BONUS>
EBB_INLINE void through_row(Real* p, const Token<Real>& x, const Real* a, int64_t i,
                            const Vector<Real> (&v)[NV], const Vector<Real> (&removed)[NV],
                            Vector<Real> (&o)[NV], Vector<Real> (&next)[NV]) {
  constexpr int lanes = LANES<Real>;
  const Real decay = x.decay[i * x.decay_step], k = x.k[i], q = x.q[i];
  const Real put_back = DELTA ? x.b[i] : 0, remove = DELTA ? a[i] : 0;
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const Vector<Real> old = load(p + j * lanes);
    Vector<Real> now = old * decay + v[j] * k;
    if constexpr (DELTA) now += removed[j] * put_back;
    store(p + j * lanes, now);
    o[j] += (BONUS ? old : now) * q;
    if constexpr (DELTA) next[j] += now * remove;
  }
}

template <class Real, int NV, bool DELTA, bool BONUS>
EBB_INLINE void forward_panel(const Scan<Real>& s, int64_t index, int64_t column, Real* scratch) {
  using V = Vector<Real>;
  constexpr int lanes = LANES<Real>, width = NV * lanes;
  const Head<Real> h(s, index);
  const int64_t K = s.key_dim;
  const int64_t columns = s.value_dim - column < width ? s.value_dim - column : width;
  Real* const S = scratch;
  V removed[NV], next[NV], o[NV], odd_next[NV], odd_o[NV], v[NV], row[NV];
  clear<Real>(removed);
  clear<Real>(next);
  for (int64_t i = 0; i < K; ++i) {
    clear<Real>(row);
    if (s.initial) load<Real>(row, s.initial + (index * K + i) * s.value_dim + column, columns);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(S + i * width + j * lanes, row[j]);
    if constexpr (DELTA)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) removed[j] += row[j] * s.a[h.key_offset + i];
  }

  for (int64_t t = 0; t < s.time; ++t) {
    const Token<Real> x = token_at(s, h, t);
    const int64_t at = h.value_offset + t * h.value_step + column;
    if (starts(s, h, t)) {
      __builtin_memset(S, 0, sizeof(Real) * K * width);
      clear<Real>(removed);
    }
    if (s.checkpoints && t % s.chunk == 0) {
      Real* const to = checkpoint_at(s, index, t) + column;
      for (int64_t i = 0; i < K; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j)
          store(to + i * padded_width(s.value_dim) + j * lanes, load(S + i * width + j * lanes));
    }
    // What the next token removes is summed while the rows are at hand.
    const Real* a = DELTA && t + 1 < s.time ? x.a + h.key_step : x.a;
    load<Real>(v, s.v + at, columns);
    clear<Real>(o);
    clear<Real>(next);
    // Narrow panels sum even and odd rows apart: an addition waits for the one before it.
    constexpr bool apart = NV <= 2;
    int64_t i = 0;
    if constexpr (apart) {
      clear<Real>(odd_o);
      clear<Real>(odd_next);
      for (; i + 1 < K; i += 2) {
        through_row<Real, NV, DELTA, BONUS>(S + i * width, x, a, i, v, removed, o, next);
        through_row<Real, NV, DELTA, BONUS>(S + (i + 1) * width, x, a, i + 1, v, removed, odd_o,
                                            odd_next);
      }
    }
    for (; i < K; ++i)
      through_row<Real, NV, DELTA, BONUS>(S + i * width, x, a, i, v, removed, o, next);
    if constexpr (apart)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        o[j] += odd_o[j];
        if constexpr (DELTA) next[j] += odd_next[j];
      }
    if constexpr (BONUS) {
      const Real own = own_weight(s, h, x);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) o[j] += v[j] * own;
    }
    if constexpr (DELTA)
      if (s.removed) store<Real>(s.removed + at, removed, columns);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      o[j] *= Real(s.scale);
      removed[j] = next[j];
    }
    store<Real>(s.o + at, o, columns);
  }
  for (int64_t i = 0; i < K; ++i) {
    load<Real>(row, S + i * width, width);
    store<Real>(s.final + (index * K + i) * s.value_dim + column, row, columns);
  }
}

// How many vectors of columns a panel has, where so many columns are left.
template <class Real>
constexpr int panel_vectors(int64_t left) {
  const int64_t vectors = (left + LANES<Real> - 1) / LANES<Real>;
  if (EBB_PANEL_VECTORS >= 4 && vectors >= 4) return 4;
  return vectors >= 2 ? 2 : 1;
}

template <class Real>
constexpr int64_t forward_scratch(const Scan<Real>& s) {
  return s.key_dim * EBB_PANEL_VECTORS * LANES<Real>;
}

template <class Real>
int64_t forward_panels(const Scan<Real>& s) {
  const int64_t width = EBB_PANEL_VECTORS * LANES<Real>;
  return (s.value_dim + width - 1) / width;
}

// The columns of one panel, forward: `panel` counts widths of EBB_PANEL_VECTORS.
template <class Real, bool DELTA, bool BONUS>
EBB_TARGET void scan_forward(const Scan<Real>& s, int64_t index, int64_t panel, Real* scratch) {
  const int64_t width = EBB_PANEL_VECTORS * LANES<Real>;
  const int64_t begin = panel * width;
  const int64_t end = begin + width < s.value_dim ? begin + width : s.value_dim;
  for (int64_t column = begin; column < end;) {
    const int vectors = panel_vectors<Real>(end - column);
#if EBB_PANEL_VECTORS >= 4
    if (vectors == 4) forward_panel<Real, 4, DELTA, BONUS>(s, index, column, scratch);
#endif
    if (vectors == 2) forward_panel<Real, 2, DELTA, BONUS>(s, index, column, scratch);
    if (vectors == 1) forward_panel<Real, 1, DELTA, BONUS>(s, index, column, scratch);
    column += vectors * LANES<Real>;
  }
}
