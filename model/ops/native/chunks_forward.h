// The additive recurrence by chunks, forward, where a head has one decay or none and the state is
// read after the write: state-space duality (arXiv 2405.21060, section 6). Included once for each
// instruction set.
//
//   O = e (Q S) + P V,   P = G M,   G = Q K^T,   S' = E S + K^T (f V)
//
// for the tokens of a chunk, with M_ij = d_{j+1} ... d_i for j <= i and 0 above, e_i = d_1 ... d_i,
// f_j = d_{j+1} ... d_C and E = e_C. G is the same for all heads that share q and k. The decays are
// multiplied up token by token and nothing is divided by one, so that they may be of any strength,
// 0 included; a document's first token has a decay of 0. A head takes 2 K V + C V / 2 multiply-adds
// a token, all in products of matrices that stand in the caches.

constexpr int64_t whole_vectors(int64_t count) { return (count + 15) / 16 * 16; }

// What the heads of one group share, and one of them at a time. All matrices are filled up with
// zeros to a multiple of 16 rows and columns.
template <class Real>
struct Chunk {
  const Scan<Real>& s;
  int64_t size, K, V;  // of the matrices
  Real *q, *k;         // [size, K], q times scale
  Real *k_turned;      // [K, size]
  Real* scores;        // [size, size], G
  Real *weights, *weighted;  // [size, size], M and P
  Real *v, *faded;           // [size, V], V and f V
  Real* o;                   // [size, V]
  Real *decay, *before, *after;  // [size], d, e and f
  int64_t begin, count;          // the tokens

  static int64_t numbers(const Scan<Real>& s) {
    const int64_t size = s.chunk, K = whole_vectors(s.key_dim), V = whole_vectors(s.value_dim);
    return 3 * size * K + 3 * size * size + 3 * size * V + 3 * size;
  }

  Chunk(const Scan<Real>& s, Real*& memory)
      : s(s), size(s.chunk), K(whole_vectors(s.key_dim)), V(whole_vectors(s.value_dim)) {
    const auto take = [&](int64_t count) {
      Real* const taken = memory;
      memory += count;
      return taken;
    };
    q = take(size * K), k = take(size * K), k_turned = take(size * K);
    scores = take(size * size), weights = take(size * size), weighted = take(size * size);
    v = take(size * V), faded = take(size * V), o = take(size * V);
    decay = take(size), before = take(size), after = take(size);
  }

  int64_t state_size() const { return K * V; }
};

// Fetches some rows of values of the next head: they stand too far apart for the hardware to foresee.
template <class Real>
EBB_INLINE void expect_next(const Chunk<Real>& c, const Head<Real>& h, const Real* values) {
  if ((h.head + 1) % c.s.sharing() == 0) return;
  const int64_t at = h.value_offset + c.begin * h.value_step + c.s.value_dim;
  for (int64_t i = 0; i < c.count; ++i)
    for (int64_t j = 0; j < c.s.value_dim; j += 64 / int64_t(sizeof(Real)))
      __builtin_prefetch(values + at + i * h.value_step + j);
}

// Numbers of rows that are `step` apart, times a factor, into rows without gaps, with zeros after
// them.
template <class Real>
EBB_TARGET void gather(Real* to, int64_t rows, int64_t columns, const Real* from, int64_t step,
                       int64_t count, int64_t width, Real factor) {
  for (int64_t i = 0; i < rows; ++i, to += columns)
    for (int64_t j = 0; j < columns; j += LANES<Real>) {
      const int64_t left = i < count ? width - j : 0;
      store(to + j, left > 0 ? load_some(from + i * step + j, left) * factor : Vector<Real>{});
    }
}

template <class Real>
EBB_TARGET void scatter(Real* to, int64_t step, int64_t count, int64_t width, const Real* from,
                        int64_t columns, Real factor) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; j += LANES<Real>)
      store_some<Real>(to + i * step + j, load(from + i * columns + j) * factor, width - j);
}

// to = from, each row times a number.
template <class Real>
EBB_TARGET void scale_rows(Real* to, const Real* from, const Real* factors, int64_t rows,
                           int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += LANES<Real>)
      store(to + i * columns + j, load(from + i * columns + j) * factors[i]);
}

// What the heads that share q and k have in common: `h` is the first of them.
template <class Real>
EBB_TARGET void begin_chunk(Chunk<Real>& c, const Head<Real>& h, int64_t begin) {
  const Scan<Real>& s = c.s;
  c.begin = begin;
  c.count = begin + c.size < s.time ? c.size : s.time - begin;
  const int64_t at = h.key_offset + begin * h.key_step;
  gather<Real>(c.q, c.size, c.K, s.q + at, h.key_step, c.count, s.key_dim, Real(s.scale));
  gather<Real>(c.k, c.size, c.K, s.k + at, h.key_step, c.count, s.key_dim, 1);
  transpose(c.k_turned, c.size, c.k, c.K, c.size, c.K);
  multiply<Real>({c.size, c.K, c.size, {c.q, c.K, 1}, c.k_turned, c.size, c.scores, c.size});
}

// Decays of a head, multiplied up, and what it writes.
template <class Real>
EBB_TARGET void begin_head(const Chunk<Real>& c, const Head<Real>& h) {
  using Vec = Vector<Real>;
  const Scan<Real>& s = c.s;
  for (int64_t i = 0; i < c.size; ++i) {
    const int64_t t = c.begin + i;
    c.decay[i] = i >= c.count || !s.decay_channels ? 1 : s.decay[h.decay_offset(s, t)];
    if (i < c.count && starts(s, h, t)) c.decay[i] = 0;
    c.before[i] = (i ? c.before[i - 1] : 1) * c.decay[i];
  }
  c.after[c.size - 1] = 1;
  for (int64_t i = c.size - 1; i > 0; --i) c.after[i - 1] = c.after[i] * c.decay[i];

  for (int64_t j = 0; j < c.size; j += LANES<Real>) {
    Vec weight{};
    for (int64_t i = 0; i < c.size; ++i) {
      const auto is_own = lane_numbers<Real>() == Vector<Index<Real>>{} + Index<Real>(i - j);
      weight = is_own ? Vec{} + 1 : weight * c.decay[i];
      store(c.weights + i * c.size + j, weight);
      store(c.weighted + i * c.size + j, weight * load(c.scores + i * c.size + j));
    }
  }
  const int64_t at = h.value_offset + c.begin * h.value_step;
  gather<Real>(c.v, c.size, c.V, s.v + at, h.value_step, c.count, s.value_dim, 1);
}

// The chunk of one head: `next` becomes the state after it, `state` was that before; they may be the
// same.
template <class Real>
EBB_TARGET void head_forward(const Chunk<Real>& c, const Head<Real>& h, const Real* state,
                             Real* next) {
  begin_head(c, h);
  expect_next(c, h, c.s.v);
  expect_next(c, h, c.s.o);
  multiply<Real>({c.size, c.K, c.V, {c.q, c.K, 1}, state, c.V, c.o, c.V});
  multiply<Real>({c.size, c.size, c.V, {c.weighted, c.size, 1}, c.v, c.V, c.o, c.V, c.o, c.before,
                  1, Zeros::ABOVE_DIAGONAL});
  const int64_t at = h.value_offset + c.begin * h.value_step;
  scatter<Real>(c.s.o + at, h.value_step, c.count, c.s.value_dim, c.o, c.V, 1);
  scale_rows(c.faded, c.v, c.after, c.size, c.V);
  multiply<Real>({c.K, c.size, c.V, {c.k, 1, c.K}, c.faded, c.V, next, c.V, state,
                  c.before + c.size - 1});
}

template <class Real>
int64_t chunks_forward_scratch(const Scan<Real>& s) {
  const int64_t state = whole_vectors(s.key_dim) * whole_vectors(s.value_dim);
  return Chunk<Real>::numbers(s) + s.sharing() * state;
}

// All heads of a group in one row of the batch.
template <class Real>
EBB_TARGET void chunks_forward(const Scan<Real>& s, int64_t group, Real* memory) {
  Chunk<Real> c(s, memory);
  const int64_t size = c.state_size(), chunks = (s.time + s.chunk - 1) / s.chunk;
  const int64_t first = group * s.sharing(), of_head = s.key_dim * s.value_dim;
  const auto kept = [&](int64_t n, int64_t chunk) {
    return s.checkpoints ? s.checkpoints + ((first + n) * chunks + chunk) * size
                         : memory + n * size;
  };
  for (int64_t n = 0; n < s.sharing(); ++n)
    gather<Real>(kept(n, 0), c.K, c.V, s.initial ? s.initial + (first + n) * of_head : nullptr,
                 s.value_dim, s.initial ? s.key_dim : 0, s.value_dim, 1);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    begin_chunk(c, Head<Real>(s, first), chunk * s.chunk);
    for (int64_t n = 0; n < s.sharing(); ++n) {
      Real* const next = chunk + 1 < chunks ? kept(n, chunk + 1) : memory + n * size;
      head_forward(c, Head<Real>(s, first + n), kept(n, chunk), next);
    }
  }
  for (int64_t n = 0; n < s.sharing(); ++n)
    scatter<Real>(s.final + (first + n) * of_head, s.value_dim, s.key_dim, s.value_dim,
                  memory + n * size, c.V, 1);
}
