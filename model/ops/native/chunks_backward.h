// Backward through chunks_forward.h, chunk by chunk from the last one. Included once for each
// instruction set.
//
// With dO and, at the end of the chunk, dS' the gradients of output and state, and A = dO V^T:
//
//   dV = P^T dO + f (K dS')           dS = E dS' + Q^T (e dO)
//   dQ = dG K + (e dO) S^T            dG = sum over heads of A M
//   dK = dG^T Q + (f V) dS'^T         both sums over heads too
//
// A decay's log has the gradient of all weights that it is a factor of, times these weights: of M
// where j < t <= i, of e where t <= i, of f where j < t, and of E. They are summed as they stand, so
// that no difference of larger numbers is formed.

template <class Real>
struct ChunkGradient {
  const ScanGradient<Real>& d;
  Real* q_turned;              // [K, size]
  Real *for_scores;            // [size, size]
  Real *for_q, *for_k;         // [K, size], of what passes through the states
  Real *for_weighted;          // [size, size], A
  Real *for_o, *o_turned;      // [size, V] and [V, size]
  Real *v_turned, *for_v;      // [V, size] and [size, V]
  Real* part;                  // [K, size]
  Real *through_read, *through_write, *later;  // [size]

  static int64_t numbers(const Scan<Real>& s) {
    const int64_t size = s.chunk, K = whole_vectors(s.key_dim), V = whole_vectors(s.value_dim);
    return 4 * size * K + 2 * size * size + 4 * size * V + 3 * size;
  }

  ChunkGradient(const Chunk<Real>& c, const ScanGradient<Real>& d, Real*& memory) : d(d) {
    const auto take = [&](int64_t count) {
      Real* const taken = memory;
      memory += count;
      return taken;
    };
    const int64_t of_keys = c.size * c.K, of_values = c.size * c.V, square = c.size * c.size;
    q_turned = take(of_keys), for_q = take(of_keys), for_k = take(of_keys), part = take(of_keys);
    for_scores = take(square), for_weighted = take(square);
    for_o = take(of_values), o_turned = take(of_values);
    v_turned = take(of_values), for_v = take(of_values);
    through_read = take(c.size), through_write = take(c.size), later = take(c.size);
  }
};

// sum += part, and what a column of part gives when multiplied with that of `by`.
template <class Real>
EBB_TARGET void add_part(Real* sum, const Real* part, const Real* by, Real* through, int64_t rows,
                         int64_t columns) {
  for (int64_t j = 0; j < columns; j += LANES<Real>) {
    Vector<Real> products{};
    for (int64_t at = j; at < rows * columns; at += columns) {
      const Vector<Real> x = load(part + at);
      products += x * load(by + at);
      store(sum + at, load(sum + at) + x);
    }
    store(through + j, products);
  }
}

template <class Real>
EBB_TARGET void scale_columns(Real* x, const Real* factors, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += LANES<Real>)
      store(x + i * columns + j, load(x + i * columns + j) * load(factors + j));
}

template <class Real>
EBB_TARGET Real dot(const Real* x, const Real* y, int64_t count) {
  Vector<Real> sums[4] = {};
  for (int64_t i = 0; i < count; i += 4 * LANES<Real>)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sums[j] += load(x + i + j * LANES<Real>) * load(y + i + j * LANES<Real>);
  Real lanes[LANES<Real>];
  store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  return sum_lanes<Real>(lanes);
}

// Through the weights within the chunk: adds to the gradient of the scores, and writes that of the
// logs of the decays, whose share of the whole state is `over_chunk`.
template <class Real>
EBB_TARGET void through_weights(const Chunk<Real>& c, const ChunkGradient<Real>& g,
                                const Head<Real>& h, Real over_chunk) {
  constexpr int lanes = LANES<Real>;
  const int64_t size = c.size;
  for (int64_t j = 0; j < size; j += lanes) store(g.later + j, Vector<Real>{});
  Real reads = 0, writes = 0;
  for (int64_t i = 0; i < size; ++i) {
    const Real write = g.through_write[i];
    g.through_write[i] = writes;
    writes += write;
  }
  for (int64_t i = size - 1; i >= 0; --i) {
    Vector<Real> sum{};
    for (int64_t j = 0; j <= i; j += lanes) {
      const int64_t at = i * size + j;
      const Vector<Real> x = load(g.for_weighted + at);
      store(g.for_scores + at, load(g.for_scores + at) + x * load(c.weights + at));
      const Vector<Real> later = load(g.later + j) + x * load(c.weighted + at);
      store(g.later + j, later);
      const auto is_earlier = lane_numbers<Real>() < Vector<Index<Real>>{} + Index<Real>(i - j);
      sum += is_earlier ? later : Vector<Real>{};
    }
    reads += g.through_read[i];
    if (c.s.decay_channels && i < c.count)
      g.d.decay[h.decay_offset(c.s, c.begin + i)] =
          sum_lanes<Real>(sum) + reads + g.through_write[i] + over_chunk;
  }
}

// The chunk of one head, before which the state was `state`: G, the gradient of the state after it,
// becomes that of the state before it.
template <class Real>
EBB_TARGET void head_backward(const Chunk<Real>& c, const ChunkGradient<Real>& g,
                              const Head<Real>& h, const Real* state, Real* G) {
    const int64_t size = c.size, K = c.K, V = c.V;
  const int64_t at = h.value_offset + c.begin * h.value_step;
  const Real* const over_chunk = c.before + size - 1;
  begin_head(c, h);
  transpose(g.v_turned, size, c.v, V, size, V);
  gather<Real>(g.for_o, size, V, g.d.o + at, h.value_step, c.count, c.s.value_dim, 1);
  transpose(g.o_turned, size, g.for_o, V, size, V);
  for (const Real* values : {c.s.v, g.d.o, static_cast<const Real*>(g.d.v)})
    expect_next(c, h, values);

  multiply<Real>({size, V, size, {g.for_o, V, 1}, g.v_turned, size, g.for_weighted, size});
  multiply<Real>({size, K, V, {c.k, K, 1}, G, V, g.for_v, V});
  multiply<Real>({size, size, V, {c.weighted, 1, size}, g.for_o, V, g.for_v, V, g.for_v, c.after, 1,
                  Zeros::BELOW_DIAGONAL});
  scatter<Real>(g.d.v + at, h.value_step, c.count, c.s.value_dim, g.for_v, V, 1);

  scale_columns(g.v_turned, c.after, V, size);
  scale_columns(g.o_turned, c.before, V, size);
  scale_rows(g.for_o, g.for_o, c.before, size, V);
  multiply<Real>({K, V, size, {G, V, 1}, g.v_turned, size, g.part, size});
  add_part(g.for_k, g.part, c.k_turned, g.through_write, K, size);
  multiply<Real>({K, V, size, {state, V, 1}, g.o_turned, size, g.part, size});
  add_part(g.for_q, g.part, g.q_turned, g.through_read, K, size);
  through_weights(c, g, h, *over_chunk == 0 ? Real(0) : *over_chunk * dot(state, G, K * V));
  multiply<Real>({K, size, V, {c.q, 1, K}, g.for_o, V, G, V, G, over_chunk});
}

// The gradients of q and k, of which those through the states are there; `h` is the first head.
template <class Real>
EBB_TARGET void end_chunk(const Chunk<Real>& c, const ChunkGradient<Real>& g, const Head<Real>& h) {
  static const Real one = 1;
  const int64_t size = c.size, K = c.K, width = c.s.key_dim;
  const int64_t at = h.key_offset + c.begin * h.key_step;
  Real* const sum = g.part;
  transpose(sum, K, g.for_q, size, K, size);
  multiply<Real>({size, size, K, {g.for_scores, size, 1}, c.k, K, sum, K, sum, &one, 0,
                  Zeros::ABOVE_DIAGONAL});
  scatter<Real>(g.d.q + at, h.key_step, c.count, width, sum, K, Real(c.s.scale));
  transpose(sum, K, g.for_k, size, K, size);
  multiply<Real>({size, size, K, {g.for_scores, 1, size}, c.q, K, sum, K, sum, &one, 0,
                  Zeros::BELOW_DIAGONAL});
  scatter<Real>(g.d.k + at, h.key_step, c.count, width, sum, K, 1);
}

template <class Real>
int64_t chunks_backward_scratch(const Scan<Real>& s) {
  return ChunkGradient<Real>::numbers(s) + chunks_forward_scratch(s);
}

// All heads of a group in one row of the batch.
template <class Real>
EBB_TARGET void chunks_backward(const Scan<Real>& s, const ScanGradient<Real>& d, int64_t group,
                                Real* memory) {
  Chunk<Real> c(s, memory);
  ChunkGradient<Real> g(c, d, memory);
  const int64_t size = c.state_size(), chunks = (s.time + s.chunk - 1) / s.chunk;
  const int64_t first = group * s.sharing(), of_head = s.key_dim * s.value_dim;
  for (int64_t n = 0; n < s.sharing(); ++n)
    gather<Real>(memory + n * size, c.K, c.V, d.final ? d.final + (first + n) * of_head : nullptr,
                 s.value_dim, d.final ? s.key_dim : 0, s.value_dim, 1);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const Head<Real> h(s, first);
    begin_chunk(c, h, chunk * s.chunk);
    transpose(g.q_turned, c.size, c.q, c.K, c.size, c.K);
    for (Real* sum : {g.for_q, g.for_k})
      __builtin_memset(sum, 0, sizeof(Real) * c.K * c.size);
    __builtin_memset(g.for_scores, 0, sizeof(Real) * c.size * c.size);
    for (int64_t n = 0; n < s.sharing(); ++n)
      head_backward(c, g, Head<Real>(s, first + n),
                    s.checkpoints + ((first + n) * chunks + chunk) * size, memory + n * size);
    end_chunk(c, g, h);
  }
  for (int64_t n = 0; n < s.sharing(); ++n)
    scatter<Real>(d.initial + (first + n) * of_head, s.value_dim, s.key_dim, s.value_dim,
                  memory + n * size, c.V, 1);
}

template <class Real>
constexpr ChunkKernels<Real> CHUNK_KERNELS = {
    chunks_forward_scratch<Real>,
    chunks_backward_scratch<Real>,
    chunks_forward<Real>,
    chunks_backward<Real>,
};
