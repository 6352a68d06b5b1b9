// What RWKV-7 makes of its projections before the recurrence. Included once for each instruction set.

// exp(-1/2), the strongest decay.
template <class Real>
constexpr Real STRONGEST = Real(0.60653065971263342360);

// The raw numbers of a head: key, and what stands inside the sigmoids of decay and learning rate,
// [B, T, D]; their biases, k_k and k_a, [D]. Behind the first layer also value, first value, what
// stands inside the sigmoid of their mixture, [B, T, D], and its bias, [D].
template <class Real>
struct Raw {
  const Real *key, *decay, *iclr, *decay_bias, *iclr_bias, *removal_scale, *iclr_scale;
  const Real *value, *first, *amount, *amount_bias;
  EBB_INLINE Raw(const Rows<Real>& s, int64_t at, int64_t channel)
      : key(s.in[0] + at),
        decay(s.in[1] + at),
        iclr(s.in[2] + at),
        decay_bias(s.in[3] + channel),
        iclr_bias(s.in[4] + channel),
        removal_scale(s.in[5] + channel),
        iclr_scale(s.in[6] + channel),
        value(s.in[7] + at),
        first(s.in[8] + at),
        amount(s.in[9] + at),
        amount_bias(s.in[10] + channel) {}
};

template <class Real>
EBB_INLINE bool has_first(const Rows<Real>& s) {
  return s.num_inputs > 7;
}

// out: log-decay, key, a, b, and value behind the first layer.
template <class Real>
EBB_TARGET void rwkv7_forward(const Rows<Real>& s, int64_t begin, int64_t end, Real*) {
  using V = Vector<Real>;
  const int64_t K = s.head_dim, D = s.width();
  for (int64_t item = begin * s.heads; item < end * s.heads; ++item) {
    const int64_t at = item * K, channel = at % D;
    const Raw<Real> x(s, at, channel);
    V squares = {};
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const V removal = load_some(x.key + c, K - c) * load_some(x.removal_scale + c, K - c);
      squares += removal * removal;
    }
    const Real norm = std::sqrt(sum_lanes<Real>(squares));
    const Real inverse = 1 / (norm < Real(s.eps) ? Real(s.eps) : norm);
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const int64_t n = K - c;
      const V key = load_some(x.key + c, n);
      const V removal = key * load_some(x.removal_scale + c, n) * inverse;
      const V iclr = sigmoid<Real>(load_some(x.iclr + c, n) + load_some(x.iclr_bias + c, n));
      const V decay = sigmoid<Real>(load_some(x.decay + c, n) + load_some(x.decay_bias + c, n));
      store_some<Real>(s.out[0] + at + c, decay * -STRONGEST<Real>, n);
      store_some<Real>(s.out[1] + at + c,
                       key + key * load_some(x.iclr_scale + c, n) * (iclr - Real(1)), n);
      store_some<Real>(s.out[2] + at + c, -removal, n);
      store_some<Real>(s.out[3] + at + c, removal * iclr, n);
      if (has_first(s)) {
        const V amount =
            sigmoid<Real>(load_some(x.amount + c, n) + load_some(x.amount_bias + c, n));
        const V value = load_some(x.value + c, n);
        store_some<Real>(s.out[4] + at + c, value + (load_some(x.first + c, n) - value) * amount,
                         n);
      }
    }
  }
}

// out and sums: the gradients of what forward takes, in its order.
template <class Real>
EBB_TARGET void rwkv7_backward(const Rows<Real>& s, int64_t begin, int64_t end, Real* sums) {
  using V = Vector<Real>;
  const int64_t K = s.head_dim, D = s.width();
  for (int64_t item = begin * s.heads; item < end * s.heads; ++item) {
    const int64_t at = item * K, channel = at % D;
    const Raw<Real> x(s, at, channel);
    const Real *const for_decay = s.cotangents[0] + at, *const for_key = s.cotangents[1] + at;
    const Real *const for_a = s.cotangents[2] + at, *const for_b = s.cotangents[3] + at;
    Real *const rates = s.out[2] + at, *const of = sums + channel;
    V squares = {}, products = {};
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const int64_t n = K - c;
      const V removal = load_some(x.key + c, n) * load_some(x.removal_scale + c, n);
      const V iclr = sigmoid<Real>(load_some(x.iclr + c, n) + load_some(x.iclr_bias + c, n));
      store_some<Real>(rates + c, iclr, n);  // until its own gradient takes its place
      squares += removal * removal;
      products += removal * (load_some(for_b + c, n) * iclr - load_some(for_a + c, n));
    }
    const Real norm = std::sqrt(sum_lanes<Real>(squares));
    const bool is_tiny = norm < Real(s.eps);
    const Real inverse = 1 / (is_tiny ? Real(s.eps) : norm);
    const Real along = is_tiny ? 0 : sum_lanes<Real>(products) * inverse * inverse;
    for (int64_t c = 0; c < K; c += LANES<Real>) {
      const int64_t n = K - c;
      const V key = load_some(x.key + c, n), scale = load_some(x.removal_scale + c, n);
      const V weakening = load_some(x.iclr_scale + c, n), iclr = load_some(rates + c, n);
      const V new_key = load_some(for_key + c, n), b = load_some(for_b + c, n);
      const V removal = key * scale;
      const V scaled = (b * iclr - load_some(for_a + c, n) - removal * along) * inverse;
      const V rate = (b * removal * inverse + new_key * key * weakening) * iclr * (Real(1) - iclr);
      store_some<Real>(s.out[0] + at + c,
                       new_key + new_key * weakening * (iclr - Real(1)) + scaled * scale, n);
      store_some<Real>(rates + c, rate, n);
      const V s_decay = sigmoid<Real>(load_some(x.decay + c, n) + load_some(x.decay_bias + c, n));
      const V decay =
          load_some(for_decay + c, n) * -STRONGEST<Real> * s_decay * (Real(1) - s_decay);
      store_some<Real>(s.out[1] + at + c, decay, n);
      add_some<Real>(of + c, decay, n);
      add_some<Real>(of + D + c, rate, n);
      add_some<Real>(of + 2 * D + c, scaled * key, n);
      add_some<Real>(of + 3 * D + c, new_key * key * (iclr - Real(1)), n);
      if (has_first(s)) {
        const V share = sigmoid<Real>(load_some(x.amount + c, n) + load_some(x.amount_bias + c, n));
        const V value = load_some(s.cotangents[4] + at + c, n), first = value * share;
        const V amount = (load_some(x.first + c, n) - load_some(x.value + c, n)) * first *
                         (Real(1) - share);
        store_some<Real>(s.out[3] + at + c, value - first, n);
        store_some<Real>(s.out[4] + at + c, first, n);
        store_some<Real>(s.out[5] + at + c, amount, n);
        add_some<Real>(of + 4 * D + c, amount, n);
      }
    }
  }
}
