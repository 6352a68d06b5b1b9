// The norm over a row, after a sum where two tensors are given: LayerNorm, or without a bias RMSNorm.
// Included once for each instruction set.

template <class Real>
struct Scaling {
  Real mean, inverse;  // inverse: of the deviation
};

template <class Real>
EBB_INLINE Scaling<Real> scaling(const Rows<Real>& s, const Real* x, bool centres) {
  const int64_t D = s.width();
  Vector<Real> sum = {}, squares = {};
  if (centres)
    for (int64_t c = 0; c < D; c += LANES<Real>) sum += load_some(x + c, D - c);
  const Real mean = sum_lanes<Real>(sum) / D;
  for (int64_t c = 0; c < D; c += LANES<Real>) {
    const Vector<Real> centred = first_lanes<Real>(load_some(x + c, D - c) - mean, D - c);
    squares += centred * centred;
  }
  return {mean, Real(1 / std::sqrt(sum_lanes<Real>(squares) / D + Real(s.eps)))};
}

// in: x, by choice y, [B, T, D], then weight and perhaps bias, [D]; out: norm(x), by choice
// norm(x + y) and x + y.
template <class Real>
EBB_TARGET void norm_forward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  const int64_t D = s.width();
  const Real *const weight = s.in[1 + s.choice], *const bias = s.in[2 + s.choice];
  const bool has_bias = s.num_inputs > 2 + s.choice;
  for (int64_t row = begin; row < end; ++row) {
    const Real* x = s.in[0] + row * D;
    if (s.choice) {
      Real* const sum = s.out[1] + row * D;
      for (int64_t c = 0; c < D; c += LANES<Real>)
        store_some<Real>(sum + c, load_some(x + c, D - c) + load_some(s.in[1] + row * D + c, D - c),
                         D - c);
      x = sum;
    }
    const Scaling<Real> by = scaling(s, x, has_bias);
    for (int64_t c = 0; c < D; c += LANES<Real>) {
      const int64_t n = D - c;
      Vector<Real> y = (load_some(x + c, n) - by.mean) * by.inverse * load_some(weight + c, n);
      if (has_bias) y += load_some(bias + c, n);
      store_some<Real>(s.out[0] + row * D + c, y, n);
    }
  }
}

// in: what was normalised, weight, perhaps bias; cotangents: of the norm, and, where num_cotangents
// is 2, of the sum itself. out: of what was normalised; sums: of weight and bias.
template <class Real>
EBB_TARGET void norm_backward(const Rows<Real>& s, int64_t begin, int64_t end, Real* sums) {
  using V = Vector<Real>;
  const int64_t D = s.width();
  const Real* const weight = s.in[1];
  const bool has_bias = s.num_inputs > 2;
  for (int64_t row = begin; row < end; ++row) {
    const Real *const x = s.in[0] + row * D, *const cotangent = s.cotangents[0] + row * D;
    const Scaling<Real> by = scaling(s, x, has_bias);
    V sum = {}, along = {};
    for (int64_t c = 0; c < D; c += LANES<Real>) {
      const int64_t n = D - c;
      const V normed = (load_some(x + c, n) - by.mean) * by.inverse, own = load_some(cotangent + c, n);
      const V inner = own * load_some(weight + c, n);
      add_some<Real>(sums + c, own * normed, n);
      if (has_bias) add_some<Real>(sums + D + c, own, n);
      sum += inner;
      along += inner * normed;
    }
    const Real mean = has_bias ? sum_lanes<Real>(sum) / D : 0, slope = sum_lanes<Real>(along) / D;
    for (int64_t c = 0; c < D; c += LANES<Real>) {
      const int64_t n = D - c;
      const V normed = (load_some(x + c, n) - by.mean) * by.inverse;
      const V inner = load_some(cotangent + c, n) * load_some(weight + c, n);
      V gradient = (inner - mean - normed * slope) * by.inverse;
      if (s.num_cotangents > 1) gradient += load_some(s.cotangents[1] + row * D + c, n);
      store_some<Real>(s.out[0] + row * D + c, gradient, n);
    }
  }
}
