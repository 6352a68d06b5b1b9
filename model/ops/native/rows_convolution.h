// A short causal convolution over time, a channel by itself, and its silu:
//   y_t = silu(bias + sum_j taps_j x_{t-j}), j below `choice`, the number of taps.
// Included once for each instruction set.

// How far back a row sees: not past the start of its document, nor past the window of tokens that
// stands before the sequence.
template <class Real>
EBB_INLINE int64_t furthest_lag(const Rows<Real>& s, int64_t row) {
  int64_t lag = 0;
  const int64_t time = row % s.time, most = s.choice - 1;
  while (lag < most && lag <= time && !starts_document(s, row - lag)) ++lag;
  return lag > time ? most : lag;
}

// Where the rows before a row stand: in x, or with the tokens before the sequence,
// [B, taps - 1, D]. Found once a row, for this takes a division, as long as many vectors.
struct RowsBefore {
  int64_t time, width, own, window;  // offsets of the row itself, as if it stood in both

  template <class Real>
  RowsBefore(const Rows<Real>& s, int64_t row)
      : time(row % s.time),
        width(s.width()),
        own(row * width),
        window(((row / s.time + 1) * (s.choice - 1) + time) * width) {}

  template <class Number>
  Number* at(Number* x, Number* before, int64_t lag) const {
    return (lag <= time ? x + own : before + window) - lag * width;
  }
};

// What the silu takes, at some channels.
template <class Real>
EBB_INLINE Vector<Real> convolved(const Rows<Real>& s, const RowsBefore& rows, int64_t furthest,
                                  int64_t c) {
  const int64_t D = rows.width, n = D - c;
  Vector<Real> sum = s.num_inputs > 3 ? load_some(s.in[3] + c, n) : Vector<Real>{};
  for (int64_t lag = 0; lag <= furthest; ++lag)
    sum += load_some(rows.at(s.in[0], s.in[1], lag) + c, n) *
           load_some(s.in[2] + lag * D + c, n);
  return sum;
}

// in: x [B, T, D], the tokens before, [B, taps - 1, D], taps [taps, D], perhaps bias [D]; out: y.
template <class Real>
EBB_TARGET void convolution_forward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  const int64_t D = s.width();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t furthest = furthest_lag(s, row);
    const RowsBefore rows(s, row);
    for (int64_t c = 0; c < D; c += LANES<Real>) {
      const Vector<Real> x = convolved(s, rows, furthest, c);
      store_some<Real>(s.out[0] + row * D + c, x * sigmoid<Real>(x), D - c);
    }
  }
}

// out: of x, of the tokens before; sums: of taps and bias. The rows behind the block that see into
// it are gone through again by the block that they belong to.
template <class Real>
EBB_TARGET void convolution_backward(const Rows<Real>& s, int64_t begin, int64_t end, Real* sums) {
  using V = Vector<Real>;
  const int64_t D = s.width(), taps = s.choice;
  for (int64_t row = begin; row < end + taps - 1 && row < s.rows(); ++row) {
    const RowsBefore rows(s, row);
    const int64_t time = rows.time, furthest = furthest_lag(s, row);
    const bool is_own = row < end;
    if (!is_own && time == 0) break;
    if (is_own && time == 0)
      __builtin_memset(s.out[1] + row / s.time * (taps - 1) * D, 0, sizeof(Real) * (taps - 1) * D);
    for (int64_t c = 0; c < D; c += LANES<Real>) {
      const int64_t n = D - c;
      const V x = convolved(s, rows, furthest, c), opened = sigmoid<Real>(x);
      const V inner = load_some(s.cotangents[0] + row * D + c, n) *
                      (opened + x * opened * (Real(1) - opened));
      if (is_own) {
        store_some<Real>(s.out[0] + row * D + c, V{}, n);
        if (s.num_inputs > 3) add_some<Real>(sums + taps * D + c, inner, n);
      }
      for (int64_t lag = 0; lag <= furthest; ++lag) {
        // The tokens before a sequence are up to the block that its first row belongs to.
        const int64_t seen = time >= lag ? row - lag : row - time;
        if (seen >= begin && seen < end)
          add_some<Real>(rows.at(s.out[0], s.out[1], lag) + c,
                         inner * load_some(s.in[2] + lag * D + c, n), n);
        if (is_own)
          add_some<Real>(sums + lag * D + c,
                         inner * load_some(rows.at(s.in[0], s.in[1], lag) + c, n), n);
      }
    }
  }
}
