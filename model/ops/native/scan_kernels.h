// The scan of scan.h over one panel of the state: K rows of up to NV vectors of value columns.
//
// Columns of the state do not depend on each other, so a panel is scanned on its own, in L1. Only
// the gradients of q, k, a, b and decay sum over columns. Included once for each instruction set.

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
    x.decay = s.decay + (s.decay_channels == 1 ? at / s.key_dim : at);
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

template <class Real, int NV>
EBB_INLINE void copy_state(Real* to, const Real* from, int64_t rows) {
  __builtin_memcpy(to, from, sizeof(Real) * NV * LANES<Real> * rows);
}

// The checkpoints of a panel, `[chunks, K, width]`. All of a head stand in one stretch.
template <class Real>
EBB_INLINE Real* checkpoints_of(const Scan<Real>& s, int64_t index, int64_t column) {
  const int64_t chunks = (s.time + s.chunk - 1) / s.chunk;
  return s.checkpoints + (index * padded_width(s.value_dim) + column) * s.key_dim * chunks;
}

template <class Real, int NV, bool DELTA, bool BONUS>
EBB_INLINE void forward_panel(const Scan<Real>& s, int64_t index, int64_t column, Real* scratch) {
  using V = Vector<Real>;
  constexpr int lanes = LANES<Real>, width = NV * lanes;
  const Head<Real> h(s, index);
  const int64_t K = s.key_dim;
  const int64_t columns = s.value_dim - column < width ? s.value_dim - column : width;
  Real* const S = scratch;
  V removed[NV], next[NV], o[NV], v[NV], row[NV];
  clear<Real>(removed);
  clear<Real>(next);
  for (int64_t i = 0; i < K; ++i) {
    clear<Real>(row);
    if (s.initial) load<Real>(row, s.initial + (index * K + i) * s.value_dim + column, columns);
    for (int j = 0; j < NV; ++j) store(S + i * width + j * lanes, row[j]);
    if constexpr (DELTA)
      for (int j = 0; j < NV; ++j) removed[j] += row[j] * s.a[h.key_offset + i];
  }
  Real* const checkpoints = s.checkpoints ? checkpoints_of(s, index, column) : nullptr;

  for (int64_t t = 0; t < s.time; ++t) {
    const Token<Real> x = token_at(s, h, t);
    const int64_t at = h.value_offset + t * h.value_step + column;
    if (starts(s, h, t)) {
      __builtin_memset(S, 0, sizeof(Real) * K * width);
      clear<Real>(removed);
    }
    if (checkpoints && t % s.chunk == 0)
      copy_state<Real, NV>(checkpoints + t / s.chunk * K * width, S, K);
    // What the next token removes is summed while the rows are at hand.
    const Real* a = DELTA && t + 1 < s.time ? x.a + h.key_step : x.a;
    load<Real>(v, s.v + at, columns);
    clear<Real>(o);
    clear<Real>(next);
    for (int64_t i = 0; i < K; ++i) {
      Real* const p = S + i * width;
      const Real decay = x.decay[i * x.decay_step], k = x.k[i], q = x.q[i];
      const Real put_back = DELTA ? x.b[i] : 0, remove = DELTA ? a[i] : 0;
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const V old = load(p + j * lanes);
        V now = old * decay + v[j] * k;
        if constexpr (DELTA) now += removed[j] * put_back;
        store(p + j * lanes, now);
        o[j] += (BONUS ? old : now) * q;
        if constexpr (DELTA) next[j] += now * remove;
      }
    }
    if constexpr (BONUS) {
      const Real own = own_weight(s, h, x);
      for (int j = 0; j < NV; ++j) o[j] += v[j] * own;
    }
    if constexpr (DELTA)
      if (s.removed) store<Real>(s.removed + at, removed, columns);
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

template <class Real, int NV>
struct Panel {
  const Scan<Real>& s;
  const ScanGradient<Real>& d;
  const Head<Real> h;
  int64_t column, columns;
  int64_t part;  // where the sums over columns go
  bool add;      // to what an earlier panel has left there
  // Scratch: the states of a chunk, the gradient of the state, rows to be summed, and a number for
  // each row of the state.
  Real *states, *G, *rows, *numbers;
};

// What is known of one token in the backward pass; the cotangent times scale.
template <class Real, int NV>
struct Values {
  Vector<Real> v[NV], removed[NV], cotangent[NV];
};

template <class Real, int NV, bool DELTA>
EBB_INLINE Values<Real, NV> values_at(const Panel<Real, NV>& p, int64_t t) {
  const int64_t at = p.h.value_offset + t * p.h.value_step + p.column;
  Values<Real, NV> x;
  load<Real>(x.v, p.s.v + at, p.columns);
  load<Real>(x.cotangent, p.d.o + at, p.columns);
  if constexpr (DELTA) load<Real>(x.removed, p.s.removed + at, p.columns);
  for (int j = 0; j < NV; ++j) x.cotangent[j] *= Real(p.s.scale);
  return x;
}

// Sets `count` numbers at `to` to the sums of as many rows, or adds them.
template <class Real>
EBB_INLINE void put_sums(Real* to, const Real* rows, int64_t count, bool add) {
  Vector<Real> sums[1] = {row_sums<Real>(rows)}, old[1];
  if (add) {
    load<Real>(old, to, count);
    sums[0] += old[0];
  }
  store<Real>(to, sums, count);
}

// Gradients through the token's own value where the state is read before the write.
template <class Real, int NV>
EBB_INLINE Real own_gradient(const Values<Real, NV>& x) {
  Vector<Real> sum{};
  for (int j = 0; j < NV; ++j) sum += x.v[j] * x.cotangent[j];
  Real total = 0;
  for (int l = 0; l < LANES<Real>; ++l) total += sum[l];
  return total;
}

template <class Real, int NV>
EBB_INLINE void put_bonus_gradient(const Panel<Real, NV>& p, const Token<Real>& x, Real own,
                                   Real* for_k) {
  const int64_t K = p.s.key_dim;
  const Real* const u = p.s.bonus + p.h.head * K;
  double* const to = p.d.bonus + (p.part * p.s.batch * p.s.heads + p.h.index) * K;
  for (int64_t i = 0; i < K; ++i) {
    for_k[i] += own * u[i] * x.q[i];
    to[i] += double(own * x.q[i] * x.k[i]);
  }
}

// From `numbers`, the gradient of each row's decay.
template <class Real, int NV>
EBB_INLINE void put_decay_gradient(const Panel<Real, NV>& p, const Token<Real>& x) {
  if (!p.s.decay_channels) return;
  const int64_t rows = p.s.decay_channels, K = p.s.key_dim;
  if (rows == 1)
    for (int64_t i = 1; i < K; ++i) p.numbers[0] += p.numbers[i];
  Real* const to = p.d.decay + p.part * (p.s.keys() / K * rows) + (x.decay - p.s.decay);
  for (int64_t i = 0; i < rows; ++i) to[i] = p.add ? to[i] + p.numbers[i] : p.numbers[i];
}

// The states before each token of a chunk, from its checkpoint; and the gradient of q.
template <class Real, int NV, bool DELTA, bool BONUS>
EBB_INLINE void recompute(const Panel<Real, NV>& p, int64_t begin, int64_t end) {
  using V = Vector<Real>;
  constexpr int lanes = LANES<Real>, width = NV * lanes;
  const int64_t K = p.s.key_dim;
  for (int64_t t = begin; t < end; ++t) {
    const Token<Real> x = token_at(p.s, p.h, t);
    const Values<Real, NV> y = values_at<Real, NV, DELTA>(p, t);
    Real* const S = p.states + (t - begin) * K * width;
    if (starts(p.s, p.h, t)) __builtin_memset(S, 0, sizeof(Real) * K * width);
    Real* const to = p.d.q + p.part * p.s.keys() + (x.q - p.s.q);
    for (int64_t first = 0; first < K; first += lanes) {
      const int64_t count = K - first < lanes ? K - first : lanes;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = first + r;
        const Real decay = x.decay[i * x.decay_step], k = x.k[i], put_back = DELTA ? x.b[i] : 0;
        Real *const before = S + i * width, *const after = before + K * width;
        V sum{};
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          const V old = load(before + j * lanes);
          V now = old * decay + y.v[j] * k;
          if constexpr (DELTA) now += y.removed[j] * put_back;
          store(after + j * lanes, now);
          sum += (BONUS ? old : now) * y.cotangent[j];
        }
        store(p.rows + r * lanes, sum);
      }
      put_sums(to + first, p.rows, count, p.add);
    }
    if constexpr (BONUS) {
      const Real own = own_gradient(y);
      const Real* u = p.s.bonus + p.h.head * K;
      for (int64_t i = 0; i < K; ++i) to[i] += own * u[i] * x.k[i];
    }
  }
}

// One token back: from the gradient of the state after it to that of the state before it.
template <class Real, int NV, bool DELTA, bool BONUS>
EBB_INLINE void step_back(const Panel<Real, NV>& p, int64_t t, const Real* S) {
  using V = Vector<Real>;
  constexpr int lanes = LANES<Real>, width = NV * lanes;
  const int64_t K = p.s.key_dim, square = lanes * lanes;
  const Token<Real> x = token_at(p.s, p.h, t);
  const Values<Real, NV> y = values_at<Real, NV, DELTA>(p, t);
  const int64_t at = p.part * p.s.keys() + (x.k - p.s.k);
  V for_v[NV], for_removed[NV];
  clear<Real>(for_v);
  clear<Real>(for_removed);
  for (int64_t first = 0; first < K; first += lanes) {
    const int64_t count = K - first < lanes ? K - first : lanes;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = first + r;
      const Real q = x.q[i], k = x.k[i], put_back = DELTA ? x.b[i] : 0;
      const Real decay = x.decay[i * x.decay_step];
      Real* const G = p.G + i * width;
      const Real* const before = S + i * width;
      V for_decay{}, for_k{}, for_b{};
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        V g = load(G + j * lanes);
        if constexpr (!BONUS) g += y.cotangent[j] * q;
        for_decay += g * load(before + j * lanes);
        for_k += g * y.v[j];
        for_v[j] += g * k;
        if constexpr (DELTA) {
          for_b += g * y.removed[j];
          for_removed[j] += g * put_back;
        } else {
          g *= decay;
          if constexpr (BONUS) g += y.cotangent[j] * q;
        }
        store(G + j * lanes, g);
      }
      store(p.rows + r * lanes, for_decay);
      store(p.rows + square + r * lanes, for_k);
      if constexpr (DELTA) store(p.rows + 2 * square + r * lanes, for_b);
    }
    put_sums(p.numbers + first, p.rows, count, false);
    put_sums(p.d.k + at + first, p.rows + square, count, p.add);
    if constexpr (DELTA) put_sums(p.d.b + at + first, p.rows + 2 * square, count, p.add);
  }
  if constexpr (DELTA) {
    for (int64_t first = 0; first < K; first += lanes) {
      const int64_t count = K - first < lanes ? K - first : lanes;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = first + r;
        const Real decay = x.decay[i * x.decay_step], remove = x.a[i];
        Real* const G = p.G + i * width;
        const Real* const before = S + i * width;
        V for_a{};
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          for_a += load(before + j * lanes) * for_removed[j];
          store(G + j * lanes, load(G + j * lanes) * decay + for_removed[j] * remove);
        }
        store(p.rows + r * lanes, for_a);
      }
      put_sums(p.d.a + at + first, p.rows, count, p.add);
    }
  }
  put_decay_gradient(p, x);
  if constexpr (BONUS) {
    const Real own = own_weight(p.s, p.h, x);
    for (int j = 0; j < NV; ++j) for_v[j] += y.cotangent[j] * own;
    put_bonus_gradient(p, x, own_gradient(y), p.d.k + at);
  }
  store<Real>(p.d.v + p.h.value_offset + t * p.h.value_step + p.column, for_v, p.columns);
}

template <class Real, int NV, bool DELTA, bool BONUS>
EBB_INLINE void backward_panel(const Panel<Real, NV>& p) {
  constexpr int lanes = LANES<Real>, width = NV * lanes;
  const Scan<Real>& s = p.s;
  const int64_t K = s.key_dim, chunks = (s.time + s.chunk - 1) / s.chunk;
  Vector<Real> row[NV];
  for (int64_t i = 0; i < K; ++i) {
    const int64_t at = (p.h.index * K + i) * s.value_dim + p.column;
    clear<Real>(row);
    if (p.d.final) load<Real>(row, p.d.final + at, p.columns);
    store<Real>(p.G + i * width, row, width);
  }
  const Real* const checkpoints = checkpoints_of(s, p.h.index, p.column);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * s.chunk;
    const int64_t end = begin + s.chunk < s.time ? begin + s.chunk : s.time;
    copy_state<Real, NV>(p.states, checkpoints + chunk * K * width, K);
    recompute<Real, NV, DELTA, BONUS>(p, begin, end);
    for (int64_t t = end - 1; t >= begin; --t) {
      step_back<Real, NV, DELTA, BONUS>(p, t, p.states + (t - begin) * K * width);
      if (starts(s, p.h, t)) __builtin_memset(p.G, 0, sizeof(Real) * K * width);
    }
  }
  for (int64_t i = 0; i < K; ++i) {
    const int64_t at = (p.h.index * K + i) * s.value_dim + p.column;
    load<Real>(row, p.G + i * width, width);
    store<Real>(p.d.initial + at, row, p.columns);
  }
}

// How many vectors the panel has that begins at a column with so many columns left.
template <class Real>
constexpr int panel_vectors(int64_t left) {
  const int64_t vectors = (left + LANES<Real> - 1) / LANES<Real>;
  if (EBB_PANEL_VECTORS >= 4 && vectors >= 4) return 4;
  return vectors >= 2 ? 2 : 1;
}

// Numbers of scratch for one panel of the forward or of the backward pass.
template <class Real>
int64_t scan_scratch(const Scan<Real>& s, bool backward) {
  const int64_t state = s.key_dim * EBB_PANEL_VECTORS * LANES<Real>;
  if (!backward) return state;
  const int64_t lanes = LANES<Real>, rows = 3 * lanes * lanes, numbers = s.key_dim + lanes;
  return (s.chunk + 2) * state + rows + numbers;
}

// One panel forward; returns the column after it.
template <class Real, bool DELTA, bool BONUS>
EBB_TARGET int64_t scan_forward(const Scan<Real>& s, int64_t index, int64_t column, Real* scratch) {
  const int vectors = panel_vectors<Real>(s.value_dim - column);
#if EBB_PANEL_VECTORS >= 4
  if (vectors == 4) forward_panel<Real, 4, DELTA, BONUS>(s, index, column, scratch);
#endif
  if (vectors == 2) forward_panel<Real, 2, DELTA, BONUS>(s, index, column, scratch);
  if (vectors == 1) forward_panel<Real, 1, DELTA, BONUS>(s, index, column, scratch);
  return column + vectors * LANES<Real>;
}

template <class Real, int NV, bool DELTA, bool BONUS>
EBB_INLINE void backward_of(const Scan<Real>& s, const ScanGradient<Real>& d, int64_t index,
                            int64_t column, int64_t part, Real* scratch) {
  constexpr int lanes = LANES<Real>, width = NV * lanes;
  const int64_t columns = s.value_dim - column < width ? s.value_dim - column : width;
  const bool add = part == 0 && column > 0;
  Real* const states = scratch + s.key_dim * width;
  Real* const rows = states + (s.chunk + 1) * s.key_dim * width;
  const Panel<Real, NV> p{s,   d,   Head<Real>(s, index), column,  columns,
                          part, add, states,               scratch, rows, rows + 3 * lanes * lanes};
  backward_panel<Real, NV, DELTA, BONUS>(p);
}

// One panel backward; returns the column after it. `part` is 0 where it adds to the panel before.
template <class Real, bool DELTA, bool BONUS>
EBB_TARGET int64_t scan_backward(const Scan<Real>& s, const ScanGradient<Real>& d, int64_t index,
                                 int64_t column, int64_t part, Real* scratch) {
  const int vectors = panel_vectors<Real>(s.value_dim - column);
#if EBB_PANEL_VECTORS >= 4
  if (vectors == 4) backward_of<Real, 4, DELTA, BONUS>(s, d, index, column, part, scratch);
#endif
  if (vectors == 2) backward_of<Real, 2, DELTA, BONUS>(s, d, index, column, part, scratch);
  if (vectors == 1) backward_of<Real, 1, DELTA, BONUS>(s, d, index, column, part, scratch);
  return column + vectors * LANES<Real>;
}

template <class Real>
int64_t panel_end(const Scan<Real>& s, int64_t column) {
  return column + panel_vectors<Real>(s.value_dim - column) * LANES<Real>;
}

template <class Real>
constexpr ScanKernels<Real> SCAN_KERNELS = {
    scan_scratch<Real>,
    panel_end<Real>,
    {scan_forward<Real, false, false>, scan_forward<Real, false, true>,
     scan_forward<Real, true, false>},
    {scan_backward<Real, false, false>, scan_backward<Real, false, true>,
     scan_backward<Real, true, false>},
};
