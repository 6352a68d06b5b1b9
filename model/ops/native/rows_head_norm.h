// The norm over each head, a token's own value beside it, and the gate:
//   y = ((o - mean) / sqrt(var + eps) weight + bias + (sum_K r k bonus) v) gate.
// Included once for each instruction set.

// in: o, gate [B, T, D], weight, bias [D], and, where a token's own value counts, r, k, v [B, T, D]
// and bonus [D].
template <class Real>
struct Normed {
  const Real *o, *gate, *weight, *bias, *r, *k, *v, *bonus;
  EBB_INLINE Normed(const Rows<Real>& s, int64_t at, int64_t channel)
      : o(s.in[0] + at),
        gate(s.in[1] + at),
        weight(s.in[2] + channel),
        bias(s.in[3] + channel),
        r(s.in[4] + at),
        k(s.in[5] + at),
        v(s.in[6] + at),
        bonus(s.in[7] + channel) {}
};

template <class Real>
EBB_INLINE bool has_own(const Rows<Real>& s) {
  return s.num_inputs > 4;
}

template <class Real>
struct Moments {
  Real mean, inverse, own;  // inverse: of the deviation
};

template <class Real>
EBB_INLINE Moments<Real> moments(const Rows<Real>& s, const Normed<Real>& x) {
  const int64_t K = s.head_dim;
  Vector<Real> sum = {}, own = {}, squares = {};
  for (int64_t c = 0; c < K; c += LANES<Real>) {
    const int64_t n = K - c;
    sum += load_some(x.o + c, n);
    if (has_own(s))
      own += load_some(x.r + c, n) * load_some(x.k + c, n) * load_some(x.bonus + c, n);
  }
  const Real mean = sum_lanes<Real>(sum) / K;
  for (int64_t c = 0; c < K; c += LANES<Real>) {
    const Vector<Real> centred = first_lanes<Real>(load_some(x.o + c, K - c) - mean, K - c);
    squares += centred * centred;
  }
  const Real variance = sum_lanes<Real>(squares) / K;
  return {mean, Real(1 / std::sqrt(variance + Real(s.eps))), sum_lanes<Real>(own)};
}

// out: y. By choice the gate is the silu of what is given.
template <class Real>
EBB_TARGET void head_norm_forward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  using V = Vector<Real>;
  const int64_t K = s.head_dim, D = s.width();
  for (int64_t item = begin * s.heads; item < end * s.heads; ++item) {
    const int64_t at = item * K;
    const Normed<Real> x(s, at, at % D);
    const Moments<Real> found = moments(s, x);
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const int64_t n = K - c;
      const V normed = (load_some(x.o + c, n) - found.mean) * found.inverse;
      V y = normed * load_some(x.weight + c, n) + load_some(x.bias + c, n);
      if (has_own(s)) y += load_some(x.v + c, n) * found.own;
      V gate = load_some(x.gate + c, n);
      if (s.choice) gate *= sigmoid<Real>(gate);
      store_some<Real>(s.out[0] + at + c, y * gate, n);
    }
  }
}

// out and sums: the gradients of what forward takes, in its order.
template <class Real>
EBB_TARGET void head_norm_backward(const Rows<Real>& s, int64_t begin, int64_t end, Real* sums) {
  using V = Vector<Real>;
  const int64_t K = s.head_dim, D = s.width();
  for (int64_t item = begin * s.heads; item < end * s.heads; ++item) {
    const int64_t at = item * K, channel = at % D;
    const Normed<Real> x(s, at, channel);
    const Moments<Real> found = moments(s, x);
    Real *const for_o = s.out[0] + at, *const of = sums + channel;
    V sum = {}, along = {}, own = {};
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const int64_t n = K - c;
      const V normed = (load_some(x.o + c, n) - found.mean) * found.inverse;
      const V raw = load_some(x.gate + c, n), weight = load_some(x.weight + c, n);
      const V cotangent = load_some(s.cotangents[0] + at + c, n);
      V y = normed * weight + load_some(x.bias + c, n), gate = raw, slope = splat<Real>(1);
      if (has_own(s)) y += load_some(x.v + c, n) * found.own;
      if (s.choice) {
        const V opened = sigmoid<Real>(raw);
        gate = raw * opened;
        slope = opened + gate * (Real(1) - opened);
      }
      const V inner = cotangent * gate;
      store_some<Real>(s.out[1] + at + c, cotangent * y * slope, n);
      store_some<Real>(for_o + c, inner, n);  // until the sums over the head are known
      add_some<Real>(of + c, inner * normed, n);
      add_some<Real>(of + D + c, inner, n);
      sum += inner * weight;
      along += inner * weight * normed;
      if (has_own(s)) own += inner * load_some(x.v + c, n);
    }
    const Real mean = sum_lanes<Real>(sum) / K, slope = sum_lanes<Real>(along) / K;
    const Real for_own = sum_lanes<Real>(own);
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const int64_t n = K - c;
      const V normed = (load_some(x.o + c, n) - found.mean) * found.inverse;
      const V inner = load_some(for_o + c, n);
      store_some<Real>(
          for_o + c,
          (inner * load_some(x.weight + c, n) - mean - normed * slope) * found.inverse, n);
      if (has_own(s)) {
        const V r = load_some(x.r + c, n) * for_own, k = load_some(x.k + c, n);
        const V bonus = load_some(x.bonus + c, n);
        store_some<Real>(s.out[2] + at + c, k * bonus * for_own, n);
        store_some<Real>(s.out[3] + at + c, r * bonus, n);
        store_some<Real>(s.out[4] + at + c, inner * found.own, n);
        add_some<Real>(of + 2 * D + c, r * k, n);
      }
    }
  }
}
