// Token shift and its interpolations: out_m = x + (previous - x) mix_m, where the data has its say
// with a tensor of offsets for each m: out_m = x + (previous - x) (mix_m + offset_m). Included once
// for each instruction set.

// The part of the token before in out_m, at some channels of a row.
template <class Real>
EBB_INLINE Vector<Real> part_of_previous(const Rows<Real>& s, int64_t m, int64_t row, int64_t c) {
  const int64_t D = s.width(), n = D - c;
  const Vector<Real> mix = load_some(s.in[2] + m * D + c, n);
  return s.num_inputs > 3 ? mix + load_some(s.in[3 + m] + row * D + c, n) : mix;
}

template <class Real>
EBB_INLINE bool starts_document(const Rows<Real>& s, int64_t row) {
  return s.reset && s.reset[row];
}

// The token before a row: the carried one before the first, none before one that starts a document.
template <class Real>
EBB_INLINE const Real* previous_row(const Rows<Real>& s, const Real* x, const Real* last,
                                    int64_t row) {
  if (starts_document(s, row)) return nullptr;
  return row % s.time ? x + (row - 1) * s.width() : last + row / s.time * s.width();
}

// in: x [B, T, D], last [B, D], mix [M, D], perhaps M offsets [B, T, D]; out: M times [B, T, D].
template <class Real>
EBB_TARGET void shift_forward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  const Real *const x = s.in[0], *const last = s.in[1];
  const int64_t D = s.width();
  for (int64_t row = begin; row < end; ++row) {
    const Real* previous = previous_row(s, x, last, row);
    for (int64_t c = 0; c < D; c += LANES<Real>) {
      const int64_t n = D - c, at = row * D + c;
      const auto own = load_some(x + at, n);
      const auto difference = (previous ? load_some(previous + c, n) : Vector<Real>{}) - own;
      for (int64_t m = 0; m < s.num_outputs; ++m)
        store_some<Real>(s.out[m] + at, own + difference * part_of_previous(s, m, row, c), n);
    }
  }
}

// What a row's cotangents say about the token before it: the sum of cotangent_m times its part.
template <class Real>
EBB_INLINE Vector<Real> for_previous(const Rows<Real>& s, int64_t row, int64_t c) {
  const int64_t D = s.width();
  Vector<Real> sum = {};
  for (int64_t m = 0; m < s.num_cotangents; ++m)
    sum += load_some(s.cotangents[m] + row * D + c, D - c) * part_of_previous(s, m, row, c);
  return sum;
}

// out: of x, of last, of the offsets; sums: of mix.
template <class Real>
EBB_TARGET void shift_backward(const Rows<Real>& s, int64_t begin, int64_t end, Real* sums) {
  const Real *const x = s.in[0], *const last = s.in[1];
  Real *const for_x = s.out[0], *const for_last = s.out[1];
  const int64_t D = s.width();
  for (int64_t row = begin; row < end; ++row) {
    const bool is_first = row % s.time == 0, starts = starts_document(s, row);
    const Real* previous = previous_row(s, x, last, row);
    for (int64_t c = 0; c < D; c += LANES<Real>) {
      const int64_t n = D - c, at = row * D + c;
      const auto difference =
          (previous ? load_some(previous + c, n) : Vector<Real>{}) - load_some(x + at, n);
      Vector<Real> all = {}, before = {};
      for (int64_t m = 0; m < s.num_cotangents; ++m) {
        const auto cotangent = load_some(s.cotangents[m] + at, n);
        all += cotangent;
        before += cotangent * part_of_previous(s, m, row, c);
        add_some<Real>(sums + m * D + c, cotangent * difference, n);
        if (s.num_inputs > 3) store_some<Real>(s.out[2 + m] + at, cotangent * difference, n);
      }
      store_some<Real>(for_x + at, all - before, n);
      if (starts) before = Vector<Real>{};
      if (is_first)
        store_some<Real>(for_last + row / s.time * D + c, before, n);
      else if (row > begin)
        add_some<Real>(for_x + at - D, before, n);
    }
  }
  // The row after the block belongs to another one, which leaves this to us.
  if (end < s.rows() && end % s.time && !starts_document(s, end))
    for (int64_t c = 0; c < D; c += LANES<Real>)
      add_some<Real>(for_x + (end - 1) * D + c, for_previous(s, end, c), D - c);
}
