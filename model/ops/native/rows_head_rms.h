// RMS norms beside a gate. Included once for each instruction set.

// A gate's silu and its slope.
template <class Real>
struct Silu {
  Vector<Real> value, slope;
  EBB_INLINE explicit Silu(Vector<Real> x) {
    const Vector<Real> opened = sigmoid<Real>(x);
    value = x * opened;
    slope = opened + value * (Real(1) - opened);
  }
};

// Of a head: 1 / sqrt(mean of the squares + eps).
template <class Real>
EBB_INLINE Real inverse_rms(const Rows<Real>& s, const Real* o) {
  const int64_t K = s.head_dim;
  Vector<Real> squares = {};
  for (int64_t c = 0; c < K; c += LANES<Real>) {
    const Vector<Real> x = load_some(o + c, K - c);
    squares += x * x;
  }
  return Real(1 / std::sqrt(sum_lanes<Real>(squares) / K + Real(s.eps)));
}

// in: o [B, T, D], weight [head_dim], perhaps gate [B, T, D]; out: norm(o) weight silu(gate).
template <class Real>
EBB_TARGET void head_rms_forward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  const int64_t K = s.head_dim;
  for (int64_t item = begin * s.heads; item < end * s.heads; ++item) {
    const Real* const o = s.in[0] + item * K;
    const Real inverse = inverse_rms(s, o);
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const int64_t n = K - c;
      Vector<Real> y = load_some(o + c, n) * inverse * load_some(s.in[1] + c, n);
      if (s.num_inputs > 2) y *= Silu<Real>(load_some(s.in[2] + item * K + c, n)).value;
      store_some<Real>(s.out[0] + item * K + c, y, n);
    }
  }
}

// out: of o, of the gate; sums: of weight.
template <class Real>
EBB_TARGET void head_rms_backward(const Rows<Real>& s, int64_t begin, int64_t end, Real* sums) {
  using V = Vector<Real>;
  const int64_t K = s.head_dim;
  for (int64_t item = begin * s.heads; item < end * s.heads; ++item) {
    const Real *const o = s.in[0] + item * K, *const weight = s.in[1];
    const Real* const cotangent = s.cotangents[0] + item * K;
    Real* const for_o = s.out[0] + item * K;
    const Real inverse = inverse_rms(s, o);
    V along = {};
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const int64_t n = K - c;
      const V normed = load_some(o + c, n) * inverse;
      V inner = load_some(cotangent + c, n);
      if (s.num_inputs > 2) {
        const Silu<Real> gate(load_some(s.in[2] + item * K + c, n));
        store_some<Real>(s.out[1] + item * K + c,
                         inner * normed * load_some(weight + c, n) * gate.slope, n);
        inner *= gate.value;
      }
      add_some<Real>(sums + c, inner * normed, n);
      inner *= load_some(weight + c, n);
      along += inner * normed;
      store_some<Real>(for_o + c, inner, n);  // until the sum over the head is known
    }
    const Real slope = sum_lanes<Real>(along) / K;
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const int64_t n = K - c;
      const V normed = load_some(o + c, n) * inverse;
      store_some<Real>(for_o + c, (load_some(for_o + c, n) - normed * slope) * inverse, n);
    }
  }
}

// in: o, x, gate [B, T, D], skip [H], weight [D]; out: norm((o + skip x) silu(gate)) weight, the
// norm over the whole row.
template <class Real>
EBB_TARGET void skip_norm_forward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  const int64_t K = s.head_dim, D = s.width();
  for (int64_t row = begin; row < end; ++row) {
    Vector<Real> squares = {};
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t c = 0; c < K; c += LANES<Real>) {
        const int64_t at = row * D + h * K + c, n = K - c;
        const Vector<Real> y = (load_some(s.in[0] + at, n) + load_some(s.in[1] + at, n) * s.in[3][h]) *
                               Silu<Real>(load_some(s.in[2] + at, n)).value;
        squares += y * y;
        store_some<Real>(s.out[0] + at, y, n);  // until the sum over the row is known
      }
    const Real inverse = Real(1 / std::sqrt(sum_lanes<Real>(squares) / D + Real(s.eps)));
    for (int64_t c = 0; c < D; c += LANES<Real>) {
      const int64_t n = D - c;
      Real* const y = s.out[0] + row * D + c;
      store_some<Real>(y, load_some(y, n) * inverse * load_some(s.in[4] + c, n), n);
    }
  }
}

// out: of o, x and gate; sums: of skip and weight.
template <class Real>
EBB_TARGET void skip_norm_backward(const Rows<Real>& s, int64_t begin, int64_t end, Real* sums) {
  using V = Vector<Real>;
  const int64_t K = s.head_dim, D = s.width();
  for (int64_t row = begin; row < end; ++row) {
    V squares = {}, products = {};
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t c = 0; c < K; c += LANES<Real>) {
        const int64_t channel = h * K + c, at = row * D + channel, n = K - c;
        const V y = (load_some(s.in[0] + at, n) + load_some(s.in[1] + at, n) * s.in[3][h]) *
                    Silu<Real>(load_some(s.in[2] + at, n)).value;
        squares += y * y;
        products += y * load_some(s.cotangents[0] + at, n) * load_some(s.in[4] + channel, n);
        store_some<Real>(s.out[0] + at, y, n);  // until the sums over the row are known
      }
    const Real inverse = Real(1 / std::sqrt(sum_lanes<Real>(squares) / D + Real(s.eps)));
    const Real slope = sum_lanes<Real>(products) * inverse * inverse / D;
    for (int64_t h = 0; h < s.heads; ++h) {
      V for_skip = {};
      for (int64_t c = 0; c < K; c += LANES<Real>) {
        const int64_t channel = h * K + c, at = row * D + channel, n = K - c;
        const V y = load_some(s.out[0] + at, n), cotangent = load_some(s.cotangents[0] + at, n);
        const V x = load_some(s.in[1] + at, n);
        const Silu<Real> gate(load_some(s.in[2] + at, n));
        add_some<Real>(sums + s.heads + channel, cotangent * y * inverse, n);
        const V inner = (cotangent * load_some(s.in[4] + channel, n) - y * slope) * inverse;
        const V for_sum = inner * gate.value;
        store_some<Real>(s.out[0] + at, for_sum, n);
        store_some<Real>(s.out[1] + at, for_sum * s.in[3][h], n);
        store_some<Real>(s.out[2] + at,
                         inner * (load_some(s.in[0] + at, n) + x * s.in[3][h]) * gate.slope, n);
        for_skip += for_sum * x;
      }
      sums[h] += sum_lanes<Real>(for_skip);
    }
  }
}

// in: x [B, T, D], factor [B, T, H]; out: x factor.
template <class Real>
EBB_TARGET void head_scale_forward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  const int64_t K = s.head_dim;
  for (int64_t item = begin * s.heads; item < end * s.heads; ++item)
    for (int64_t c = 0; c < K; c += LANES<Real>)
      store_some<Real>(s.out[0] + item * K + c,
                       load_some(s.in[0] + item * K + c, K - c) * s.in[1][item], K - c);
}

// out: of x, of the factor.
template <class Real>
EBB_TARGET void head_scale_backward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  const int64_t K = s.head_dim;
  for (int64_t item = begin * s.heads; item < end * s.heads; ++item) {
    Vector<Real> sum = {};
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const int64_t at = item * K + c, n = K - c;
      const Vector<Real> cotangent = load_some(s.cotangents[0] + at, n);
      sum += cotangent * load_some(s.in[0] + at, n);
      store_some<Real>(s.out[0] + at, cotangent * s.in[1][item], n);
    }
    s.out[1][item] = sum_lanes<Real>(sum);
  }
}
