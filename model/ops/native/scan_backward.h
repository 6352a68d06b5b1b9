// The scan of scan.h backward, over a stretch of value columns of one head.
//
// Here the state stands transposed, a row for each value column, and vectors lie along K: the
// gradients of q, k, a, b and decay sum over columns and so need no sums within a vector; only those
// of v and of what was removed do. The states of a chunk are recomputed from its checkpoint: nothing
// is divided by a decay. Included once for each instruction set.

// Value columns of a stretch: with K = 64, a state that fits L1 together with its gradient.
constexpr int64_t STRETCH = 64;

template <class Real>
struct Stretch {
  const Scan<Real>& s;
  const ScanGradient<Real>& d;
  const Head<Real> h;
  int64_t column, columns;
  int64_t part;   // where the sums over columns go
  bool add;       // to what an earlier stretch has left there
  bool add_keys;  // likewise, or an earlier head that shares q and k
  int64_t keys;   // K in whole vectors
  Real *G;        // [columns, keys]: gradient of the state
  Real *states;   // [chunk + 1, columns, keys]
  Real *sums;     // [5, keys]: gradients of q, k, a, b and decay of one token
  Real *padded;   // [5, keys]: q, k, a, b and decay where they must be copied
  Real *rows;     // [2, lanes, lanes]
  Real *removed;  // [columns]: gradient of what was removed
  Real *scaled;   // [columns]: cotangent of o times scale
};

// Vectors along K, whole ones; numbers along V.
template <class Real>
struct Inputs {
  const Real *q, *k, *a, *b, *decay;
  const Real *v, *removed, *cotangent;  // the cotangent times scale
};

// What a loop over rows sums up, in the order of Stretch::sums.
enum { FOR_Q, FOR_K, FOR_A, FOR_B, FOR_DECAY };

template <class Real, bool DELTA>
EBB_INLINE Inputs<Real> inputs_at(const Stretch<Real>& p, int64_t t) {
  const Token<Real> x = token_at(p.s, p.h, t);
  const int64_t at = p.h.value_offset + t * p.h.value_step + p.column, K = p.s.key_dim;
  Inputs<Real> y{x.q, x.k, x.a, x.b, x.decay, p.s.v + at, nullptr, p.d.o + at};
  if (DELTA) y.removed = p.s.removed + at;
  if (p.s.scale != 1) {
    for (int64_t r = 0; r < p.columns; ++r) p.scaled[r] = y.cotangent[r] * Real(p.s.scale);
    y.cotangent = p.scaled;
  }
  const Real** const vectors[] = {&y.q, &y.k, &y.a, &y.b};
  if (K != p.keys)
    for (int n = 0; n < (DELTA ? 4 : 2); ++n) {
      Real* const to = p.padded + n * p.keys;  // zero beyond K, now as ever
      for (int64_t i = 0; i < K; ++i) to[i] = (*vectors[n])[i];
      *vectors[n] = to;
    }
  if (K != p.keys || !x.decay_step) {
    Real* const to = p.padded + 4 * p.keys;
    if (x.decay_step)
      for (int64_t i = 0; i < K; ++i) to[i] = x.decay[i];
    else
      for (int64_t i = 0; i < p.keys; i += LANES<Real>) store(to + i, Vector<Real>{} + *x.decay);
    y.decay = to;
  }
  return y;
}

// Fetches what a token reads: tokens of a head stand too far apart for the hardware to foresee.
template <class Real, bool DELTA>
EBB_INLINE void expect(const Stretch<Real>& p, int64_t t) {
  const int64_t line = 64 / sizeof(Real), key = p.h.key_offset + t * p.h.key_step;
  const int64_t value = p.h.value_offset + t * p.h.value_step + p.column;
  for (int64_t i = 0; i < p.s.key_dim; i += line) {
    __builtin_prefetch(p.s.k + key + i);
    if (DELTA) __builtin_prefetch(p.s.b + key + i);
    if (p.s.decay_channels > 1) __builtin_prefetch(p.s.decay + key + i);
    __builtin_prefetch(p.d.q + key + i, 1);
  }
  for (int64_t i = 0; i < p.columns; i += line) {
    __builtin_prefetch(p.s.v + value + i);
    __builtin_prefetch(p.d.o + value + i);
    if (DELTA) __builtin_prefetch(p.s.removed + value + i);
  }
}

template <class Real, int NV>
EBB_INLINE void load_all(Vector<Real> (&x)[NV], const Real* p) {
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) x[j] = load(p + j * LANES<Real>);
}

template <class Real, int NV>
EBB_INLINE void store_all(Real* p, const Vector<Real> (&x)[NV]) {
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) store(p + j * LANES<Real>, x[j]);
}

// One token forward again, for NV vectors of keys from `key` on; and the gradient of q.
template <class Real, int NV, bool DELTA, bool BONUS>
EBB_INLINE void advance(const Stretch<Real>& p, const Inputs<Real>& x, int64_t key, const Real* S,
                        Real* after) {
  using V = Vector<Real>;
  constexpr int lanes = LANES<Real>;
  V k[NV], b[NV], decay[NV], for_q[NV];
  load_all<Real>(k, x.k + key);
  if constexpr (DELTA) load_all<Real>(b, x.b + key);
  load_all<Real>(decay, x.decay + key);
  clear<Real>(for_q);
  for (int64_t r = 0; r < p.columns; ++r) {
    const int64_t at = r * p.keys + key;
    const Real v = x.v[r], cotangent = x.cotangent[r];
    const Real removed = DELTA ? x.removed[r] : 0;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const V old = load(S + at + j * lanes);
      V now = old * decay[j] + k[j] * v;
      if constexpr (DELTA) now += b[j] * removed;
      store(after + at + j * lanes, now);
      for_q[j] += (BONUS ? old : now) * cotangent;
    }
  }
  store_all<Real>(p.sums + FOR_Q * p.keys + key, for_q);
}

// Back through the read-out and the write, for some rows and NV vectors of keys: G becomes the
// gradient of the state after the write, without removal also that before the decay. Leaves in
// p.rows what sums up to the gradients of v and of what was removed.
template <class Real, int NV, bool DELTA, bool BONUS>
EBB_INLINE void through_write(const Stretch<Real>& p, const Inputs<Real>& x, int64_t key,
                              const Real* S, int64_t row, int64_t count) {
  using V = Vector<Real>;
  constexpr int lanes = LANES<Real>, square = lanes * lanes;
  V q[NV], k[NV], b[NV], decay[NV], for_k[NV], for_b[NV], for_decay[NV];
  load_all<Real>(q, x.q + key);
  load_all<Real>(k, x.k + key);
  load_all<Real>(for_k, p.sums + FOR_K * p.keys + key);
  load_all<Real>(for_decay, p.sums + FOR_DECAY * p.keys + key);
  if constexpr (DELTA) {
    load_all<Real>(b, x.b + key);
    load_all<Real>(for_b, p.sums + FOR_B * p.keys + key);
  } else {
    load_all<Real>(decay, x.decay + key);
  }
  for (int64_t r = 0; r < count; ++r) {
    Real* const G = p.G + (row + r) * p.keys + key;
    const Real* const old = S + (row + r) * p.keys + key;
    const Real v = x.v[row + r], cotangent = x.cotangent[row + r];
    const Real removed = DELTA ? x.removed[row + r] : 0;
    V for_v{}, for_removed{};
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      V g = load(G + j * lanes);
      if constexpr (!BONUS) g += q[j] * cotangent;
      for_decay[j] += g * load(old + j * lanes);
      for_k[j] += g * v;
      for_v += g * k[j];
      if constexpr (DELTA) {
        for_b[j] += g * removed;
        for_removed += g * b[j];
      } else {
        g *= decay[j];
        if constexpr (BONUS) g += q[j] * cotangent;
      }
      store(G + j * lanes, g);
    }
    Real* const sums = p.rows + r * lanes;
    store(sums, key ? load(sums) + for_v : for_v);
    if constexpr (DELTA)
      store(sums + square, key ? load(sums + square) + for_removed : for_removed);
  }
  store_all<Real>(p.sums + FOR_K * p.keys + key, for_k);
  store_all<Real>(p.sums + FOR_DECAY * p.keys + key, for_decay);
  if constexpr (DELTA) store_all<Real>(p.sums + FOR_B * p.keys + key, for_b);
}

// Back through decay and removal, likewise: G becomes the gradient of the state before them.
template <class Real, int NV>
EBB_INLINE void through_removal(const Stretch<Real>& p, const Inputs<Real>& x, int64_t key,
                                const Real* S, int64_t row, int64_t count) {
  using V = Vector<Real>;
  constexpr int lanes = LANES<Real>;
  V a[NV], decay[NV], for_a[NV];
  load_all<Real>(a, x.a + key);
  load_all<Real>(decay, x.decay + key);
  load_all<Real>(for_a, p.sums + FOR_A * p.keys + key);
  for (int64_t r = row; r < row + count; ++r) {
    Real* const G = p.G + r * p.keys + key;
    const Real* const old = S + r * p.keys + key;
    const Real removed = p.removed[r];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      for_a[j] += load(old + j * lanes) * removed;
      store(G + j * lanes, load(G + j * lanes) * decay[j] + a[j] * removed);
    }
  }
  store_all<Real>(p.sums + FOR_A * p.keys + key, for_a);
}

// Calls FUNCTION<Real, NV, ...>(..., key, ...) for all keys, in panels of NV vectors.
#define EBB_FOR_ALL_KEYS(CALL)                                   \
  for (int64_t key = 0; key < p.keys;) {                         \
    const int vectors = panel_vectors<Real>(p.keys - key);       \
    if (vectors == EBB_PANEL_VECTORS) {                          \
      constexpr int NV = EBB_PANEL_VECTORS;                      \
      CALL;                                                      \
    } else if (vectors == 2) {                                   \
      constexpr int NV = 2;                                      \
      CALL;                                                      \
    } else {                                                     \
      constexpr int NV = 1;                                      \
      CALL;                                                      \
    }                                                            \
    key += vectors * LANES<Real>;                                \
  }

// Writes the gradients of one token that sum over columns.
template <class Real>
EBB_INLINE void put(const Stretch<Real>& p, Real* to, int64_t offset, int which) {
  const Real* const sums = p.sums + which * p.keys;
  to += p.part * p.s.keys() + offset;
  constexpr int lanes = LANES<Real>;
  for (int64_t i = 0; i < p.s.key_dim; i += lanes) {
    const int64_t count = p.s.key_dim - i;
    Vector<Real> x[1] = {load(sums + i)}, old[1];
    if (p.add_keys) {
      load<Real>(old, to + i, count);
      x[0] += old[0];
    }
    store<Real>(to + i, x, count);
  }
}

// That of the log of the decay, times which is that of the decay.
template <class Real>
EBB_INLINE void put_decay(const Stretch<Real>& p, const Real* decay, int64_t t, int64_t offset) {
  Real* const sums = p.sums + FOR_DECAY * p.keys;
  if (p.s.decay_channels)
    for (int64_t i = 0; i < p.keys; i += LANES<Real>)
      store(sums + i, load(sums + i) * load(decay + i));
  if (p.s.decay_channels > 1) {
    put(p, p.d.decay, offset, FOR_DECAY);
  } else if (p.s.decay_channels == 1) {
    Real* const to = p.d.decay + p.part * p.s.batch * p.s.time * p.s.heads +
                     p.h.decay_offset(p.s, t);
    Vector<Real> sum{};
    for (int64_t i = 0; i < p.keys; i += LANES<Real>) sum += load(sums + i);
    *to = sum_lanes<Real>(sum) + (p.add ? *to : 0);
  }
}

// Where the state is read before the write: the token's own value, (q . (u k)) v.
template <class Real>
EBB_INLINE void through_bonus(const Stretch<Real>& p, const Inputs<Real>& x, Real* for_v) {
  const int64_t K = p.s.key_dim;
  const Real* const u = p.s.bonus + p.h.head * K;
  Real own = 0, weight = 0;
  for (int64_t r = 0; r < p.columns; ++r) own += x.v[r] * x.cotangent[r];
  for (int64_t i = 0; i < K; ++i) weight += x.q[i] * u[i] * x.k[i];
  double* const to = p.d.bonus + (p.part * p.s.batch * p.s.heads + p.h.index) * K;
  for (int64_t i = 0; i < K; ++i) {
    p.sums[FOR_Q * p.keys + i] = own * u[i] * x.k[i];
    p.sums[FOR_K * p.keys + i] += own * u[i] * x.q[i];
    to[i] += double(own * x.q[i] * x.k[i]);
  }
  for (int64_t r = 0; r < p.columns; ++r) for_v[r] += weight * x.cotangent[r];
}

// One token back: G, the gradient of the state after it, becomes that of the state before it, S.
template <class Real, bool DELTA, bool BONUS>
EBB_INLINE void step_back(const Stretch<Real>& p, int64_t t, const Real* S) {
  constexpr int lanes = LANES<Real>, square = lanes * lanes;
  const Inputs<Real> x = inputs_at<Real, DELTA>(p, t);
  Real* const for_v = p.d.v + (x.v - p.s.v);
  __builtin_memset(p.sums, 0, sizeof(Real) * 5 * p.keys);
  for (int64_t row = 0; row < p.columns; row += lanes) {
    const int64_t count = p.columns - row < lanes ? p.columns - row : lanes;
    EBB_FOR_ALL_KEYS((through_write<Real, NV, DELTA, BONUS>(p, x, key, S, row, count)))
    const Vector<Real> sums[1] = {row_sums<Real>(p.rows)};
    store<Real>(for_v + row, sums, count);
    if constexpr (DELTA) {
      store(p.removed + row, row_sums<Real>(p.rows + square));
      EBB_FOR_ALL_KEYS((through_removal<Real, NV>(p, x, key, S, row, count)))
    }
  }
  const int64_t offset = p.h.key_offset + t * p.h.key_step;
  if constexpr (BONUS) {
    through_bonus(p, x, for_v);
    Real* const to = p.d.q + p.part * p.s.keys() + offset;
    for (int64_t i = 0; i < p.s.key_dim; ++i) to[i] += p.sums[FOR_Q * p.keys + i];
  }
  put(p, p.d.k, offset, FOR_K);
  if constexpr (DELTA) {
    put(p, p.d.a, offset, FOR_A);
    put(p, p.d.b, offset, FOR_B);
  }
  put_decay(p, x.decay, t, offset);
}

template <class Real, bool DELTA, bool BONUS>
EBB_INLINE void backward_stretch(const Stretch<Real>& p) {
  const Scan<Real>& s = p.s;
  const int64_t K = s.key_dim, V = s.value_dim, size = p.columns * p.keys;
  const int64_t of_head = p.h.index * K * V + p.column, chunks = (s.time + s.chunk - 1) / s.chunk;
  __builtin_memset(p.G, 0, sizeof(Real) * size);
  __builtin_memset(p.states, 0, sizeof(Real) * size);
  if (p.d.final) transpose(p.G, p.keys, p.d.final + of_head, V, K, p.columns);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * s.chunk;
    const int64_t end = begin + s.chunk < s.time ? begin + s.chunk : s.time;
    const Real* const checkpoint = checkpoint_at(s, p.h.index, begin) + p.column;
    transpose(p.states, p.keys, checkpoint, padded_width(V), K, p.columns);
    for (int64_t t = begin; t < end; ++t) {
      const Inputs<Real> x = inputs_at<Real, DELTA>(p, t);
      Real* const S = p.states + (t - begin) * size;
      if (starts(s, p.h, t)) __builtin_memset(S, 0, sizeof(Real) * size);
      EBB_FOR_ALL_KEYS((advance<Real, NV, DELTA, BONUS>(p, x, key, S, S + size)))
      put(p, p.d.q, p.h.key_offset + t * p.h.key_step, FOR_Q);
      if (t + 2 < end) expect<Real, DELTA>(p, t + 2);
    }
    for (int64_t t = end - 1; t >= begin; --t) {
      step_back<Real, DELTA, BONUS>(p, t, p.states + (t - begin) * size);
      if (starts(s, p.h, t)) __builtin_memset(p.G, 0, sizeof(Real) * size);
    }
  }
  transpose(p.d.initial + of_head, V, p.G, p.keys, p.columns, K);
}

template <class Real>
int64_t keys_in_vectors(const Scan<Real>& s) {
  return (s.key_dim + LANES<Real> - 1) / LANES<Real> * LANES<Real>;
}

template <class Real>
int64_t backward_scratch(const Scan<Real>& s) {
  const int64_t keys = keys_in_vectors(s), lanes = LANES<Real>;
  return (s.chunk + 2) * STRETCH * keys + 10 * keys + 2 * lanes * lanes + 2 * STRETCH;
}

template <class Real>
int64_t backward_panels(const Scan<Real>& s) {
  return (s.value_dim + STRETCH - 1) / STRETCH;
}

// One stretch of columns backward. `part` is 0 where it adds to the one before.
template <class Real, bool DELTA, bool BONUS>
EBB_TARGET void scan_backward(const Scan<Real>& s, const ScanGradient<Real>& d, int64_t index,
                              int64_t panel, int64_t part, Real* scratch) {
  const int64_t column = panel * STRETCH, left = s.value_dim - column, keys = keys_in_vectors(s);
  Real* const states = scratch + STRETCH * keys;
  Real* const sums = states + (s.chunk + 1) * STRETCH * keys;
  Real* const padded = sums + 5 * keys;
  Real* const rows = padded + 5 * keys;
  Real* const removed = rows + 2 * LANES<Real> * LANES<Real>;
  __builtin_memset(padded, 0, sizeof(Real) * 5 * keys);
  const bool add = part == 0 && panel > 0;
  backward_stretch<Real, DELTA, BONUS>(
      {s, d, Head<Real>(s, index), column, left < STRETCH ? left : STRETCH, part, add,
       add || index % s.sharing() > 0, keys, scratch, states, sums, padded, rows, removed,
       removed + STRETCH});
}

template <class Real>
constexpr ScanKernels<Real> SCAN_KERNELS = {
    forward_scratch<Real>,
    backward_scratch<Real>,
    forward_panels<Real>,
    backward_panels<Real>,
    {scan_forward<Real, false, false>, scan_forward<Real, false, true>,
     scan_forward<Real, true, false>},
    {scan_backward<Real, false, false>, scan_backward<Real, false, true>,
     scan_backward<Real, true, false>},
};
