// The wkv4 recurrence over a few vectors of channels, each channel for itself. Included once for
// each instruction set.

constexpr double WKV4_EMPTY = -1e38;  // EMPTY of model/ops/wkv4.py
constexpr int WKV4_VECTORS = 4;
constexpr int WKV4_CHANNELS = WKV4_VECTORS * LANES<double>;

using Doubles = Vector<double>;
using Whole = Vector<int64_t>;

// Weights exp(a - top) and exp(b - top) for top the larger of two logits, and whether that is a.
struct Weights {
  Doubles a, b;
  Whole a_is_top;
};

EBB_INLINE Weights weigh(Doubles a, Doubles b) {
  const Doubles difference = a - b, one = Doubles{} + 1.0;
  const Whole a_is_top = difference > 0;
  const Doubles smaller = exp_of_negative<double>(a_is_top ? -difference : difference);
  return {a_is_top ? one : smaller, a_is_top ? smaller : one, a_is_top};
}

struct Wkv4State {
  Doubles num[WKV4_VECTORS], den[WKV4_VECTORS], top[WKV4_VECTORS];
};

EBB_INLINE void forget(Wkv4State& s) {
  for (int j = 0; j < WKV4_VECTORS; ++j) {
    s.num[j] = s.den[j] = Doubles{};
    s.top[j] = Doubles{} + WKV4_EMPTY;
  }
}

// One token's write.
EBB_INLINE void write_token(Wkv4State& s, const Doubles (&k)[WKV4_VECTORS],
                            const Doubles (&v)[WKV4_VECTORS], const Doubles (&decay)[WKV4_VECTORS]) {
#pragma GCC unroll 4
  for (int j = 0; j < WKV4_VECTORS; ++j) {
    const Doubles faded = s.top[j] + decay[j];
    const Weights w = weigh(faded, k[j]);
    s.num[j] = w.a * s.num[j] + w.b * v[j];
    s.den[j] = w.a * s.den[j] + w.b;
    s.top[j] = w.a_is_top ? faded : k[j];
  }
}

EBB_TARGET void wkv4_forward(const Wkv4& x, int64_t row, int64_t channel) {
  constexpr int N = WKV4_VECTORS;
  const int64_t D = x.width, count = D - channel, chunks = (x.time + x.chunk - 1) / x.chunk;
  const int64_t state = row * D + channel;
  Doubles k[N], v[N], o[N], decay[N], bonus[N];
  Wkv4State s;
  load<double>(decay, x.decay + channel, count);
  load<double>(bonus, x.bonus + channel, count);
  load<double>(s.num, x.num + state, count);
  load<double>(s.den, x.den + state, count);
  load<double>(s.top, x.top + state, count);
  for (int64_t t = 0; t < x.time; ++t) {
    const int64_t at = (row * x.time + t) * D + channel;
    if (x.reset && x.reset[row * x.time + t]) forget(s);
    if (x.checkpoints && t % x.chunk == 0) {
      double* const to = x.checkpoints + (row * chunks + t / x.chunk) * 3 * D + channel;
      store<double>(to, s.num, count);
      store<double>(to + D, s.den, count);
      store<double>(to + 2 * D, s.top, count);
    }
    load<double>(k, x.k + at, count);
    load<double>(v, x.v + at, count);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Weights w = weigh(s.top[j], bonus[j] + k[j]);
      o[j] = (w.a * s.num[j] + w.b * v[j]) / (w.a * s.den[j] + w.b);
    }
    store<double>(x.o + at, o, count);
    write_token(s, k, v, decay);
  }
  store<double>(x.final_num + state, s.num, count);
  store<double>(x.final_den + state, s.den, count);
  store<double>(x.final_top + state, s.top, count);
}

// The gradient of the state after a token becomes that of the state before it, s.
EBB_INLINE void wkv4_step_back(Wkv4State& g, const Wkv4State& s, const Doubles (&k)[WKV4_VECTORS],
                               const Doubles (&v)[WKV4_VECTORS],
                               const Doubles (&decay)[WKV4_VECTORS],
                               const Doubles (&bonus)[WKV4_VECTORS],
                               const Doubles (&for_o)[WKV4_VECTORS], Doubles (&for_k)[WKV4_VECTORS],
                               Doubles (&for_v)[WKV4_VECTORS], Doubles (&for_decay)[WKV4_VECTORS],
                               Doubles (&for_bonus)[WKV4_VECTORS]) {
  for (int j = 0; j < WKV4_VECTORS; ++j) {
    // The write. The new top is one of the two logits, and divides what the others are.
    const Weights w = weigh(s.top[j] + decay[j], k[j]);
    const Doubles num = w.a * s.num[j] + w.b * v[j], den = w.a * s.den[j] + w.b;
    const Doubles for_new_top = g.top[j] - g.num[j] * num - g.den[j] * den;
    const Doubles zero{};
    const Doubles for_old = w.a * (g.num[j] * s.num[j] + g.den[j] * s.den[j]) +
                            (w.a_is_top ? for_new_top : zero);
    for_k[j] = w.b * (g.num[j] * v[j] + g.den[j]) + (w.a_is_top ? zero : for_new_top);
    for_v[j] = w.b * g.num[j];
    for_decay[j] += for_old;
    g.num[j] *= w.a;
    g.den[j] *= w.a;
    g.top[j] = for_old;
    // The read: a quotient that no common factor changes.
    const Weights r = weigh(s.top[j], bonus[j] + k[j]);
    const Doubles below = 1.0 / (r.a * s.den[j] + r.b);
    const Doubles o = (r.a * s.num[j] + r.b * v[j]) * below;
    const Doubles for_num = for_o[j] * below, for_den = -for_num * o;
    g.num[j] += for_num * r.a;
    g.den[j] += for_den * r.a;
    g.top[j] += r.a * (for_num * s.num[j] + for_den * s.den[j]);
    const Doubles for_own = r.b * (for_num * v[j] + for_den);
    for_v[j] += for_num * r.b;
    for_k[j] += for_own;
    for_bonus[j] += for_own;
  }
}

// `scratch` holds the states of a chunk.
EBB_TARGET void wkv4_backward(const Wkv4& x, const Wkv4Gradient& d, int64_t row, int64_t channel,
                              double* scratch) {
  constexpr int N = WKV4_VECTORS;
  const int64_t D = x.width, count = D - channel, chunks = (x.time + x.chunk - 1) / x.chunk;
  const int64_t state = row * D + channel;
  Doubles k[N], v[N], decay[N], bonus[N], for_o[N], for_k[N], for_v[N], for_decay[N], for_bonus[N];
  load<double>(decay, x.decay + channel, count);
  load<double>(bonus, x.bonus + channel, count);
  clear<double>(for_decay);
  clear<double>(for_bonus);
  Wkv4State s, g;
  load<double>(g.num, d.final_num + state, count);
  load<double>(g.den, d.final_den + state, count);
  load<double>(g.top, d.final_top + state, count);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * x.chunk;
    const int64_t end = begin + x.chunk < x.time ? begin + x.chunk : x.time;
    const double* const from = x.checkpoints + (row * chunks + chunk) * 3 * D + channel;
    load<double>(s.num, from, count);
    load<double>(s.den, from + D, count);
    load<double>(s.top, from + 2 * D, count);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = (row * x.time + t) * D + channel;
      if (x.reset && x.reset[row * x.time + t]) forget(s);
      __builtin_memcpy(scratch + (t - begin) * 3 * WKV4_CHANNELS, &s, sizeof s);
      load<double>(k, x.k + at, count);
      load<double>(v, x.v + at, count);
      write_token(s, k, v, decay);
    }
    for (int64_t t = end - 1; t >= begin; --t) {
      const int64_t at = (row * x.time + t) * D + channel;
      __builtin_memcpy(&s, scratch + (t - begin) * 3 * WKV4_CHANNELS, sizeof s);
      load<double>(k, x.k + at, count);
      load<double>(v, x.v + at, count);
      load<double>(for_o, d.o + at, count);
      wkv4_step_back(g, s, k, v, decay, bonus, for_o, for_k, for_v, for_decay, for_bonus);
      store<double>(d.k + at, for_k, count);
      store<double>(d.v + at, for_v, count);
      if (x.reset && x.reset[row * x.time + t])
        for (int j = 0; j < N; ++j) g.num[j] = g.den[j] = g.top[j] = Doubles{};
    }
  }
  store<double>(d.decay + state, for_decay, count);
  store<double>(d.bonus + state, for_bonus, count);
  store<double>(d.num + state, g.num, count);
  store<double>(d.den + state, g.den, count);
  store<double>(d.top + state, g.top, count);
}

constexpr Wkv4Kernels WKV4_KERNELS = {WKV4_CHANNELS, wkv4_forward, wkv4_backward};
