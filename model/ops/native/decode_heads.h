// One step of the recurrences, with what stands beside them in a head; included by decode_step.h for each instruction set.

INLINE float inverse_length(const float* x, int64_t n) {
  Floats total = {};
  for (int64_t i = 0; i < n; i += LANES) total += load(x + i, n - i) * load(x + i, n - i);
  const float length = std::sqrt(sum(total));
  return 1.0f / (length > 1e-12f ? length : 1e-12f);
}

// S' = diag(w) S + b (a^T S) + k v^T and o = r^T S' for one head; S is [keys][values]. Without a
// nothing is removed.
template <int fixed>
INLINE void delta_step(int64_t keys, int64_t size, const float* S, float* next, const float* w,
                       const float* a, const float* b, const float* k, const float* v,
                       const float* r, float* o) {
  const int64_t values = fixed ? fixed : size;
  constexpr int WIDE = fixed ? 4 : 1;  // registers of a row that are worked on together
  for (int64_t j = 0; j < values; j += WIDE * LANES) {
    Floats removed[WIDE] = {}, value[WIDE], read[WIDE] = {};
#pragma GCC unroll 4
    for (int c = 0; c < WIDE; ++c) value[c] = load(v + j + c * LANES);
    if (a)
      for (int64_t i = 0; i < keys; ++i)
#pragma GCC unroll 4
        for (int c = 0; c < WIDE; ++c)
          removed[c] += load(S + i * values + j + c * LANES, values - j) * a[i];
    for (int64_t i = 0; i < keys; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < WIDE; ++c) {
        const int64_t place = i * values + j + c * LANES;
        Floats x = load(S + place, values - j) * w[i] + value[c] * k[i];
        if (a) x += removed[c] * b[i];
        store(next + place, x, values - j);
        read[c] += x * r[i];
      }
#pragma GCC unroll 4
    for (int c = 0; c < WIDE; ++c) store(o + j + c * LANES, read[c]);
  }
}

// The additive or the delta recurrence of a head, and what follows until the gate. Flags say what
// there is; what a flag leaves out is not looked at.
enum HeadFlag {
  DELTA = 1,          // remove what the key finds before writing
  UNIT = 2,           // queries and keys of length 1
  STRENGTH = 4,       // writes times a factor a head
  CHANNEL_DECAY = 8,  // log-decays a key channel, else a head
  HEAD_DECAY = 16,
  RATE = 32,          // log-decays times a parameter a head
  DIVIDE = 64,        // by the sum of weights, a column more of the state
  SKIP = 128,         // plus the value times a parameter a head
  NORM = 256,         // RMS norm, one weight a value channel
  GATE = 512,         // times a vector
};

// q, k, v, y, heads, keys, values, slot, flags, heads that share q and k, scale of the result,
// strength, its scale, log-decay, its scale, rate, eps of the division, skip, norm weight,
// its eps, gate
template <int fixed>
INLINE void heads(const Worker& worker, const int64_t* arg) {
  const int64_t keys = arg[5], values = arg[6], flags = arg[8];
  const int64_t columns = values + (flags & DIVIDE ? 1 : 0);
  int64_t begin, end;
  worker.share(arg[4], 1, begin, end);
  for (int64_t head = begin; head < end; ++head) {
    const int64_t shared = head / arg[9] * keys, at = head * values;
    const float *query = worker.at(arg[0]) + shared, *key = worker.at(arg[1]) + shared;
    const float* value = worker.at(arg[2]) + at;
    alignas(64) float w[MAX_HEAD], a[MAX_HEAD], k[MAX_HEAD], r[MAX_HEAD];
    alignas(64) float v[MAX_HEAD + LANES] = {}, o[MAX_HEAD + LANES];
    const float unit_key = flags & UNIT ? inverse_length(key, keys) : 1.0f;
    const float unit_query = flags & UNIT ? inverse_length(query, keys) : 1.0f;
    const float strength =
        flags & STRENGTH ? worker.at(arg[11])[head] * as_float(arg[12]) : 1.0f;
    float rate = as_float(arg[14]);
    if (flags & RATE) rate *= ((const float*)arg[15])[head];
    if (flags & HEAD_DECAY) rate *= worker.at(arg[13])[head];
    for (int64_t i = 0; i < keys; i += LANES) {
      const int64_t left = keys - i;
      const Floats x = load(key + i, left) * unit_key;
      Floats decay = all(rate);
      if (flags & CHANNEL_DECAY) decay *= load(worker.at(arg[13]) + head * keys + i, left);
      const Floats kept = exponential(decay);
      store(w + i, kept);
      store(k + i, x * strength);
      store(a + i, -x * kept);
      store(r + i, load(query + i, left) * (unit_query * as_float(arg[10])));
    }
    std::memcpy(v, value, values * sizeof(float));
    if (flags & DIVIDE) v[values] = 1.0f;
    const int64_t matrix = head * keys * columns;
    delta_step<fixed>(keys, columns, (const float*)worker.call->in[arg[7]] + matrix,
                      (float*)worker.call->out[arg[7]] + matrix, w, flags & DELTA ? a : nullptr, k,
                      k, v, r, o);
    float factor = 1.0f;
    if (flags & DIVIDE) factor = 1.0f / (o[values] + as_float(arg[16]));
    if (flags & SKIP)
      for (int64_t i = 0; i < values; ++i) o[i] += v[i] * ((const float*)arg[17])[head];
    if (flags & NORM) factor = 1.0f / std::sqrt(variance_of(o, 0.0f, values) + as_float(arg[19]));
    float* y = worker.at(arg[3]) + at;
    for (int64_t i = 0; i < values; i += LANES) {
      const int64_t left = values - i;
      Floats z = load(o + i) * factor;
      if (flags & NORM) z *= load((const float*)arg[18] + i);
      if (flags & GATE) z *= load(worker.at(arg[20]) + at + i, left);
      store(y + i, z, left);
    }
  }
}

// The mean of RWKV-4, channel by channel (model/ops/wkv4.py), on this thread's channels.
// k, v, factor of the result, y, n, slots of numerator, denominator and maximum, log-decay, bonus
static void wkv4(const Worker& worker, const int64_t* arg) {
  const float *keys = worker.at(arg[0]), *values = worker.at(arg[1]), *factor = worker.at(arg[2]);
  float* y = worker.at(arg[3]);
  const float* in[3];
  float* out[3];
  for (int part = 0; part < 3; ++part) {
    in[part] = (const float*)worker.call->in[arg[5 + part]];
    out[part] = (float*)worker.call->out[arg[5 + part]];
  }
  int64_t begin, end;
  worker.share(arg[4], LANES, begin, end);
  for (int64_t i = begin; i < end; i += LANES) {
    const int64_t left = end - i;
    const Floats k = load(keys + i, left), v = load(values + i, left);
    const Floats num = load(in[0] + i, left), den = load(in[1] + i, left);
    const Floats before = load(in[2] + i, left);
    const Floats own = k + load((const float*)arg[9] + i);
    const Floats top = choose(before > own, before, own);
    const Floats old = exponential(before - top), now = exponential(own - top);
    const Floats o = (old * num + now * v) / (old * den + now);
    store(y + i, o * load(factor + i, left), left);
    const Floats decayed = before + load((const float*)arg[8] + i);
    const Floats most = choose(decayed > k, decayed, k);
    const Floats kept = exponential(decayed - most), written = exponential(k - most);
    store(out[0] + i, kept * num + written * v, left);
    store(out[1] + i, kept * den + written, left);
    store(out[2] + i, most, left);
  }
}

// o = r^T S + own v, then S' = diag(w) S + k v^T, for one head; S is [n][n].
template <int fixed>
INLINE void additive_step(int64_t size, const float* S, float* next, const float* w, const float* k,
                          const float* v, const float* r, float own, float* o) {
  const int64_t n = fixed ? fixed : size;
  constexpr int WIDE = fixed ? 4 : 1;  // registers of a row that are worked on together
  for (int64_t j = 0; j < n; j += WIDE * LANES) {
    Floats value[WIDE], read[WIDE];
#pragma GCC unroll 4
    for (int c = 0; c < WIDE; ++c) {
      value[c] = load(v + j + c * LANES);
      read[c] = value[c] * own;
    }
    for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < WIDE; ++c) {
        const int64_t place = i * n + j + c * LANES;
        const Floats x = load(S + place, n - j);
        read[c] += x * r[i];
        store(next + place, x * w[i] + value[c] * k[i], n - j);
      }
#pragma GCC unroll 4
    for (int c = 0; c < WIDE; ++c) store(o + j + c * LANES, read[c]);
  }
}

// y = (norm(o) * weight + bias + own v) * gate for one head.
INLINE void normed_and_gated(int64_t n, const float* o, const float* weight, const float* bias,
                             float eps, float own, const float* v, const float* gate, float* y) {
  const float mean = mean_of(o, n), scale = 1.0f / std::sqrt(variance_of(o, mean, n) + eps);
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t left = n - i;
    const Floats normed = (load(o + i) - mean) * scale * load(weight + i, left);
    const Floats z = normed + load(bias + i, left) + load(v + i) * own;
    store(y + i, z * load(gate + i, left), left);
  }
}

// RWKV-5 and 6 between their matrices (model/layers/rwkv5.py), on this thread's heads.
// r, k, v, gate, y, heads, n, slot, decay as parameters or null, decay as a vector, bonus,
// norm weight, norm bias, eps
template <int fixed>
INLINE void rwkv5_heads(const Worker& worker, const int64_t* arg) {
  const int64_t n = fixed ? fixed : arg[6];
  int64_t begin, end;
  worker.share(arg[5], 1, begin, end);
  for (int64_t head = begin; head < end; ++head) {
    const int64_t at = head * n, matrix = head * n * n;
    const float *r = worker.at(arg[0]) + at, *keys = worker.at(arg[1]) + at;
    const float* values = worker.at(arg[2]) + at;
    const float* decays = (arg[8] ? (const float*)arg[8] : worker.at(arg[9])) + at;
    const float* bonus = (const float*)arg[10] + at;
    alignas(64) float w[MAX_HEAD], k[MAX_HEAD], v[MAX_HEAD], o[MAX_HEAD];
    Floats own = {};
    for (int64_t i = 0; i < n; i += LANES) {
      const int64_t left = n - i;
      const Floats key = load(keys + i, left);
      own += load(r + i, left) * key * load(bonus + i, left);
      store(w + i, exponential(-exponential(load(decays + i, left))));
      store(k + i, key);
      store(v + i, load(values + i, left));
    }
    additive_step<fixed>(n, (const float*)worker.call->in[arg[7]] + matrix,
                         (float*)worker.call->out[arg[7]] + matrix, w, k, v, r, sum(own), o);
    normed_and_gated(n, o, (const float*)arg[11] + at, (const float*)arg[12] + at,
                     as_float(arg[13]), 0.0f, v, worker.at(arg[3]) + at, worker.at(arg[4]) + at);
  }
}

// RWKV-7 between its matrices (model/layers/rwkv7.py), on this thread's heads.
// r, k, v, v_first, decay, iclr, value's part, gate, y, heads, n, slot, removal scale, iclr scale,
// bonus, norm weight, norm bias, eps, first, strongest decay
template <int fixed>
INLINE void rwkv7_heads(const Worker& worker, const int64_t* arg) {
  const int64_t n = fixed ? fixed : arg[10];
  const bool first = arg[18];
  const float eps = as_float(arg[17]), strongest = as_float(arg[19]);
  int64_t begin, end;
  worker.share(arg[9], 1, begin, end);
  for (int64_t head = begin; head < end; ++head) {
    const int64_t at = head * n;
    const float *r = worker.at(arg[0]) + at, *keys = worker.at(arg[1]) + at;
    const float *decays = worker.at(arg[4]) + at, *iclrs = worker.at(arg[5]) + at;
    const float *parts = worker.at(arg[6]) + at, *gate = worker.at(arg[7]) + at;
    const float *values = worker.at(arg[2]) + at;
    const float *removal_scale = (const float*)arg[12] + at, *iclr_scale = (const float*)arg[13] + at;
    const float *bonus = (const float*)arg[14] + at, *weight = (const float*)arg[15] + at;
    const float* bias = (const float*)arg[16] + at;
    float *v_first = worker.at(arg[3]) + at, *y = worker.at(arg[8]) + at;
    alignas(64) float w[MAX_HEAD], a[MAX_HEAD], b[MAX_HEAD], k[MAX_HEAD], v[MAX_HEAD], o[MAX_HEAD];
    Floats length = {}, own = {};
    for (int64_t i = 0; i < n; i += LANES) {
      const int64_t left = n - i;
      const Floats key = load(keys + i, left), iclr = sigmoid(load(iclrs + i, left));
      Floats value = load(values + i, left);
      if (first)
        store(v_first + i, value, left);
      else
        value += (load(v_first + i, left) - value) * sigmoid(load(parts + i, left));
      const Floats removal = key * load(removal_scale + i, left);
      const Floats written = key + key * load(iclr_scale + i, left) * (iclr - 1.0f);
      length += removal * removal;
      own += load(r + i, left) * written * load(bonus + i, left);
      store(w + i, exponential(strongest * sigmoid(load(decays + i, left))));
      store(a + i, -removal);
      store(b + i, iclr);
      store(k + i, written);
      store(v + i, value);
    }
    const float norm = std::sqrt(sum(length)), inverse = 1.0f / (norm > 1e-12f ? norm : 1e-12f);
    for (int64_t i = 0; i < n; i += LANES) {
      const Floats removal = load(a + i) * inverse;
      store(a + i, removal);
      store(b + i, -removal * load(b + i));
    }
    const int64_t matrix = head * n * n;
    delta_step<fixed>(n, n, (const float*)worker.call->in[arg[11]] + matrix,
                      (float*)worker.call->out[arg[11]] + matrix, w, a, b, k, v, r, o);
    normed_and_gated(n, o, weight, bias, eps, sum(own), v, gate, y);
  }
}
