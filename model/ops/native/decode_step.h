// The instructions of decode.cpp; included once for each instruction set, so without a guard.
// Every function is free of OpenMP: the threads are there already.

// Vectors: 16 floats, whatever the registers of the CPU.

INLINE Floats all(float x) { return Floats{} + x; }

INLINE Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

INLINE Floats load(const float* p, int64_t left) {  // zeros behind the end
  if (left >= LANES) return load(p);
  Floats x = {};
  std::memcpy(&x, p, left * sizeof(float));
  return x;
}

INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

INLINE void store(float* p, Floats x, int64_t left) {
  std::memcpy(p, &x, left >= LANES ? sizeof x : left * sizeof(float));
}

template <class Vector>
INLINE auto sum(Vector x) {
#pragma GCC unroll 4
  for (int width = LANES / 2; width; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

INLINE float largest(Floats x) {
#pragma GCC unroll 4
  for (int width = LANES / 2; width; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  return x[0];
}

INLINE Floats choose(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }

INLINE Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// exp in float32's precision: 2^n times a polynomial in what is left, |r| <= ln(2) / 2.
INLINE Floats exponential(Floats x) {
  x = choose(x > 88.0f, all(88.0f), choose(x < -87.0f, all(-87.0f), x));
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = all(1.0f / 5040.0f);
  y = y * r + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return y * (Floats)(((Ints)shifted - (0x4b400000 - 127)) << 23);  // NaN stays NaN
}

INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Near zero its Taylor series, else through exp: small values keep their digits.
INLINE Floats hyperbolic_tangent(Floats x) {
  const Floats s = x * x;
  Floats series = all(-1382.0f / 155925.0f);
  series = series * s + 62.0f / 2835.0f;
  series = series * s - 17.0f / 315.0f;
  series = series * s + 2.0f / 15.0f;
  series = series * s - 1.0f / 3.0f;
  const Floats far = 1.0f - 2.0f / (exponential(x + x) + 1.0f);
  return choose(absolute(x) < 0.25f, x + x * s * series, far);
}

// log(1 + exp(x)): log(1 + e) is 2 artanh(e / (2 + e)), a short series for e <= 1.
INLINE Floats softplus(Floats x) {
  const Floats e = exponential(-absolute(x)), z = e / (2.0f + e), s = z * z;
  Floats series = all(1.0f / 13.0f);
  series = series * s + 1.0f / 11.0f;
  series = series * s + 1.0f / 9.0f;
  series = series * s + 1.0f / 7.0f;
  series = series * s + 1.0f / 5.0f;
  series = series * s + 1.0f / 3.0f;
  series = series * s + 1.0f;
  return choose(x < 0.0f, Floats{}, x) + (z + z) * series;
}

enum Activation { NONE, TANH, SIGMOID, SQUARED_RELU, SILU, SOFTPLUS, LOG_SIGMOID, ELU_PLUS_ONE };

INLINE Floats activate(int64_t activation, Floats x) {
  switch (activation) {
    case TANH: return hyperbolic_tangent(x);
    case SIGMOID: return sigmoid(x);
    case SQUARED_RELU: { const Floats y = choose(x < 0.0f, Floats{}, x); return y * y; }
    case SILU: return x * sigmoid(x);
    case SOFTPLUS: return softplus(x);
    case LOG_SIGMOID: return -softplus(-x);
    case ELU_PLUS_ONE: return choose(x > 0.0f, x + 1.0f, exponential(x));
    default: return x;
  }
}

// Matrices. A tile is 16 rows; packing.py lays it out, format by format.

// So many lines of 64 bytes, a kilobyte ahead: measured, a tenth faster than the CPU's own guesses,
// and four kilobytes ahead no faster than these.
template <int lines>
INLINE void fetch_ahead(const void* w) {
#pragma GCC unroll 8
  for (int i = 0; i < lines; ++i) __builtin_prefetch((const char*)w + 1024 + 64 * i);
}

INLINE Floats from_bfloat16(const uint16_t* p) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  Halves bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Ints) << 16);
}

// [columns][16 rows]
INLINE Floats tile_float32(const float* w, const float* x, int64_t columns) {
  Floats a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 <= columns; i += 4, w += 4 * LANES) {
    fetch_ahead<4>(w);
    a += load(w) * x[i];
    b += load(w + LANES) * x[i + 1];
    c += load(w + 2 * LANES) * x[i + 2];
    d += load(w + 3 * LANES) * x[i + 3];
  }
  for (; i < columns; ++i, w += LANES) a += load(w) * x[i];
  return (a + b) + (c + d);
}

// [columns / 2][16 rows][2 columns]
INLINE Floats tile_bfloat16(const uint32_t* w, const float* x, int64_t columns) {
  Floats a = {}, b = {}, c = {}, d = {};
  Ints pair;
  for (int64_t i = 0; i < columns; i += 4, w += 2 * LANES) {
    fetch_ahead<2>(w);
    std::memcpy(&pair, w, sizeof pair);
    a += (Floats)(pair << 16) * x[i];
    b += (Floats)(pair & (int32_t)0xffff0000) * x[i + 1];
    std::memcpy(&pair, w + LANES, sizeof pair);
    c += (Floats)(pair << 16) * x[i + 2];
    d += (Floats)(pair & (int32_t)0xffff0000) * x[i + 3];
  }
  return (a + b) + (c + d);
}

// A vector in 15 bits: blocks of 32 with a scale each. An integer is 128 high + low, two digits of
// 8 bits, because that is what the CPU multiplies; `sums` are those of a block's integers. Eight
// bits alone cost more than rounding the weights does, and the second digit no time: memory limits.
struct Quantized {
  const int8_t *high, *low;
  const float* scales;
  const int32_t* sums;
};

INLINE Ints nearest(Floats x) { return (Ints)(x + 12582912.0f) - 0x4b400000; }  // 1.5 * 2^23

INLINE void digits(Ints x, int8_t* high, int8_t* low) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  const Ints h = (x + 64) >> 7;
  const Bytes c = __builtin_convertvector(h, Bytes), d = __builtin_convertvector(x - (h << 7), Bytes);
  std::memcpy(high, &c, sizeof c);
  std::memcpy(low, &d, sizeof d);
}

INLINE Quantized quantize(const float* x, int64_t size, int64_t columns, float* room) {
  const int64_t blocks = columns / BLOCK;
  float* scales = room;
  int32_t* sums = (int32_t*)(room + blocks);
  int8_t *high = (int8_t*)(room + 2 * blocks), *low = high + columns;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t left = size - i * BLOCK;
    const Floats a = load(x + i * BLOCK, left);
    const Floats b = left > LANES ? load(x + i * BLOCK + LANES, left - LANES) : Floats{};
    const float most = largest(choose(absolute(a) > absolute(b), absolute(a), absolute(b)));
    const float broken = sum((a + b) * 0.0f);  // NaN if a value is none: it must not be lost
    const float scale = most / 16256.0f + broken, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    const Ints c = nearest(a * inverse), d = nearest(b * inverse);
    digits(c, high + i * BLOCK, low + i * BLOCK);
    digits(d, high + i * BLOCK + LANES, low + i * BLOCK + LANES);
    scales[i] = scale;
    sums[i] = sum(c + d);
  }
  return {high, low, scales, sums};
}

INLINE int32_t four(const int8_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, sizeof bits);
  return bits;
}

// 32 columns of 16 rows with 32 values: the integer sums. Weights are stored with 128 added in
// [8][16 rows][4 columns], or with 8 added in [4][16 rows][4 columns, and 4 more in the high half].
#if defined(EBB_AVX512)
INLINE __m512i dots(__m512i total, __m512i w, const int8_t* x) {
  return _mm512_dpbusd_epi32(total, w, _mm512_set1_epi32(four(x)));
}

INLINE Ints dots_int8(const uint8_t* w, const int8_t* high, const int8_t* low, int32_t sum) {
  __m512i a = _mm512_setzero_si512(), b = _mm512_set1_epi32(-128 * sum);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i tile = _mm512_loadu_si512(w + 64 * i);
    a = dots(a, tile, high + 4 * i);
    b = dots(b, tile, low + 4 * i);
  }
  return ((Ints)a << 7) + (Ints)b;
}

INLINE Ints dots_int4(const uint8_t* w, const int8_t* high, const int8_t* low, int32_t sum) {
  const __m512i half = _mm512_set1_epi8(15);
  __m512i a = _mm512_setzero_si512(), b = _mm512_set1_epi32(-8 * sum);
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    const __m512i both = _mm512_loadu_si512(w + 64 * i);
    const __m512i first = _mm512_and_si512(both, half);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), half);
    a = dots(dots(a, first, high + 8 * i), second, high + 8 * i + 4);
    b = dots(dots(b, first, low + 8 * i), second, low + 8 * i + 4);
  }
  return ((Ints)a << 7) + (Ints)b;
}
#elif defined(EBB_AVX2)
INLINE __m256i half_tile(const uint8_t* w) { return _mm256_loadu_si256((const __m256i*)w); }

INLINE __m256i in_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

INLINE Ints joined(const __m256i* a, const __m256i* b) {
  Ints result;
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    const __m256i total = _mm256_add_epi32(_mm256_slli_epi32(a[part], 7), b[part]);
    std::memcpy((char*)&result + 32 * part, &total, sizeof total);
  }
  return result;
}

INLINE Ints dots_int8(const uint8_t* w, const int8_t* high, const int8_t* low, int32_t) {
  const __m256i offset = _mm256_set1_epi8(-128), zero = _mm256_setzero_si256();
  __m256i a[2] = {zero, zero}, b[2] = {zero, zero};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i x = _mm256_set1_epi32(four(high + 4 * i));
    const __m256i y = _mm256_set1_epi32(four(low + 4 * i));
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {  // |w| times x with w's sign: pairs fit 16 bits
      const __m256i s = _mm256_xor_si256(half_tile(w + 64 * i + 32 * part), offset);
      const __m256i size = _mm256_abs_epi8(s);
      a[part] = _mm256_add_epi32(
          a[part], in_pairs(_mm256_maddubs_epi16(size, _mm256_sign_epi8(x, s))));
      b[part] = _mm256_add_epi32(
          b[part], in_pairs(_mm256_maddubs_epi16(size, _mm256_sign_epi8(y, s))));
    }
  }
  return joined(a, b);
}

INLINE __m256i two_dots(__m256i total, __m256i first, __m256i second, const int8_t* x) {
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(first, _mm256_set1_epi32(four(x))),
                       _mm256_maddubs_epi16(second, _mm256_set1_epi32(four(x + 4))));
  return _mm256_add_epi32(total, in_pairs(pairs));
}

INLINE Ints dots_int4(const uint8_t* w, const int8_t* high, const int8_t* low, int32_t sum) {
  const __m256i half = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
  const __m256i start = _mm256_set1_epi32(-8 * sum);
  __m256i a[2] = {zero, zero}, b[2] = {start, start};
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      const __m256i both = half_tile(w + 64 * i + 32 * part);
      const __m256i first = _mm256_and_si256(both, half);
      const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), half);
      a[part] = two_dots(a[part], first, second, high + 8 * i);
      b[part] = two_dots(b[part], first, second, low + 8 * i);
    }
  return joined(a, b);
}
#else
INLINE int32_t integer(const int8_t* high, const int8_t* low, int64_t i) {
  return 128 * high[i] + low[i];
}

INLINE Ints dots_int8(const uint8_t* w, const int8_t* high, const int8_t* low, int32_t sum) {
  Ints total = Ints{} - 128 * sum;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    for (int row = 0; row < LANES; ++row)
      for (int j = 0; j < 4; ++j)
        total[row] += w[64 * i + 4 * row + j] * integer(high, low, 4 * i + j);
  return total;
}

INLINE Ints dots_int4(const uint8_t* w, const int8_t* high, const int8_t* low, int32_t sum) {
  Ints total = Ints{} - 8 * sum;
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i)
    for (int row = 0; row < LANES; ++row)
      for (int j = 0; j < 4; ++j) {
        const uint8_t both = w[64 * i + 4 * row + j];
        total[row] += (both & 15) * integer(high, low, 8 * i + j) +
                      (both >> 4) * integer(high, low, 8 * i + 4 + j);
      }
  return total;
}
#endif

// scales: [columns / 32][16 rows] in bfloat16
template <int bits>
INLINE Floats tile_integers(const uint8_t* w, const uint16_t* scales, const Quantized& x,
                            int64_t columns) {
  Floats y = {};
  for (int64_t i = 0; i < columns / BLOCK; ++i) {
    fetch_ahead<bits>(w);
    const int8_t *high = x.high + i * BLOCK, *low = x.low + i * BLOCK;
    const Ints total = bits == 8 ? dots_int8(w, high, low, x.sums[i])
                                 : dots_int4(w, high, low, x.sums[i]);
    y += __builtin_convertvector(total, Floats) * (from_bfloat16(scales) * x.scales[i]);
    w += 64 * bits;
    scales += LANES;
  }
  return y;
}

enum Format { FLOAT32, BFLOAT16, INT8, INT4 };

// y = activation(W x + bias) * factor, or y += that, on this thread's rows.
// weights, scales, format, rows, columns, x, y, grain, activation, bias, add, room, size of x,
// has a factor, factor
static void multiply(const Worker& worker, const int64_t* arg) {
  const uint8_t* weights = (const uint8_t*)arg[0];
  const uint16_t* scales = (const uint16_t*)arg[1];
  const int64_t format = arg[2], rows = arg[3], columns = arg[4], activation = arg[8];
  const float* x = worker.at(arg[5]);
  float* y = worker.at(arg[6]);
  const float* bias = (const float*)arg[9];
  const int64_t bits = format == FLOAT32 ? 32 : format == BFLOAT16 ? 16 : format == INT8 ? 8 : 4;
  int64_t begin, end;
  worker.share(rows, arg[7], begin, end);
  if (begin == end) return;
  Quantized quantized = {};
  if (format >= INT8) quantized = quantize(x, arg[12], columns, worker.at(arg[11]));
  for (int64_t row = begin; row < end; row += LANES) {
    const uint8_t* w = weights + row * columns * bits / 8;
    const uint16_t* s = scales + row * columns / BLOCK;
    Floats z;
    switch (format) {
      case FLOAT32: z = tile_float32((const float*)w, x, columns); break;
      case BFLOAT16: z = tile_bfloat16((const uint32_t*)w, x, columns); break;
      case INT8: z = tile_integers<8>(w, s, quantized, columns); break;
      default: z = tile_integers<4>(w, s, quantized, columns); break;
    }
    if (bias) z += load(bias + row);
    z = activate(activation, z);
    if (arg[13]) z *= load(worker.at(arg[14]) + row, end - row);
    if (arg[10]) z += load(y + row, end - row);
    store(y + row, z, end - row);
  }
}

// Elementwise neighbours.

// x = embedding[token].  table, n, x
static void embed(const Worker& worker, const int64_t* arg) {
  if (worker.computes(arg[2]))
    std::memcpy(worker.at(arg[2]), (const float*)arg[0] + worker.call->token * arg[1],
                arg[1] * sizeof(float));
}

INLINE float as_float(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return (float)x;
}

INLINE float mean_of(const float* x, int64_t n) {
  Floats total = {};
  for (int64_t i = 0; i < n; i += LANES) total += load(x + i, n - i);
  return sum(total) / n;
}

INLINE float variance_of(const float* x, float mean, int64_t n) {
  Floats total = {};
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    const Floats z = load(x + i) - mean;
    total += z * z;
  }
  float rest = 0.0f;
  for (int64_t i = whole; i < n; ++i) rest += (x[i] - mean) * (x[i] - mean);
  return (sum(total) + rest) / n;
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias; without a bias the RMS norm.
// x, y, n, weight, bias, eps
static void normalize(const Worker& worker, const int64_t* arg) {
  if (!worker.computes(arg[1])) return;
  const float *x = worker.at(arg[0]), *weight = (const float*)arg[3], *bias = (const float*)arg[4];
  float* y = worker.at(arg[1]);
  const int64_t n = arg[2];
  const float mean = bias ? mean_of(x, n) : 0.0f;
  const float scale = 1.0f / std::sqrt(variance_of(x, mean, n) + as_float(arg[5]));
  for (int64_t i = 0; i < n; i += LANES) {
    Floats z = (load(x + i, n - i) - mean) * scale * load(weight + i);
    if (bias) z += load(bias + i);
    store(y + i, z, n - i);
  }
}

// y_j = x + (previous - x) mix_j for j < m; mixes and y_j at distance `stride`. The mixes are
// parameters, or where these are null a vector.
// x, y, n, slot, parameters, m, stride, vector
static void interpolate(const Worker& worker, const int64_t* arg) {
  const float* x = worker.at(arg[0]);
  float* y = worker.at(arg[1]);
  const int64_t n = arg[2], m = arg[5], stride = arg[6];
  const float* previous = (const float*)worker.call->in[arg[3]];
  const float* mixes = arg[4] ? (const float*)arg[4] : worker.at(arg[7]);
  for (int64_t i = 0; i < n; i += LANES) {
    const Floats own = load(x + i, n - i), difference = load(previous + i, n - i) - own;
    for (int64_t j = 0; j < m; ++j)
      store(y + j * stride + i, own + difference * load(mixes + j * stride + i), n - i);
  }
}

// The state's tensor is x from here on.  x, n, slot
static void keep(const Worker& worker, const int64_t* arg) {
  if (worker.thread == 0)
    std::memcpy(worker.call->out[arg[2]], worker.at(arg[0]), arg[1] * sizeof(float));
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

// y = silu(bias + sum_lag taps_lag x_{t - lag}) on this thread's channels; the window moves on.
// x, y, n, slot, first channel of the window, its channels, number of taps, taps and the distance
// between two, bias or null
static void convolve(const Worker& worker, const int64_t* arg) {
  const float *x = worker.at(arg[0]), *window = (const float*)worker.call->in[arg[3]] + arg[4];
  float *y = worker.at(arg[1]), *after = (float*)worker.call->out[arg[3]] + arg[4];
  const int64_t channels = arg[5], size = arg[6], stride = arg[8];
  const float *taps = (const float*)arg[7], *bias = (const float*)arg[9];
  int64_t begin, end;
  worker.share(arg[2], LANES, begin, end);
  for (int64_t i = begin; i < end; i += LANES) {
    const int64_t left = end - i;
    const Floats own = load(x + i, left);
    Floats z = own * load(taps + i, left);
    for (int64_t row = 0; row + 1 < size; ++row) {  // oldest first: it is overwritten at once
      const Floats before = load(window + row * channels + i, left);
      z += before * load(taps + (size - 1 - row) * stride + i, left);
      if (row) store(after + (row - 1) * channels + i, before, left);
    }
    if (size > 1) store(after + (size - 2) * channels + i, own, left);
    if (bias) z += load(bias + i, left);
    store(y + i, z * sigmoid(z), left);
  }
}

// Turns the pairs (i, i + n / 2) of each head by position / base^(2 i / n), on this thread's heads.
// x, heads, n, slot of the position, base
static void rotate(const Worker& worker, const int64_t* arg) {
  const int64_t n = arg[2], half = n / 2;
  const double position = (double)*(const int64_t*)worker.call->in[arg[3]];
  double base;
  std::memcpy(&base, &arg[4], sizeof base);
  float cosine[MAX_HEAD / 2], sine[MAX_HEAD / 2];
  int64_t begin, end;
  worker.share(arg[1], 1, begin, end);
  if (begin == end) return;
  for (int64_t i = 0; i < half; ++i) {
    const double angle = position * std::pow(base, -(double)i / (double)half);
    cosine[i] = (float)std::cos(angle);
    sine[i] = (float)std::sin(angle);
  }
  for (int64_t head = begin; head < end; ++head) {
    float *first = worker.at(arg[0]) + head * n, *second = first + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = first[i], b = second[i];
      first[i] = a * cosine[i] - b * sine[i];
      second[i] = b * cosine[i] + a * sine[i];
    }
  }
}

// The state's integer is one more from here on.  slot
static void count(const Worker& worker, const int64_t* arg) {
  if (worker.thread == 0)
    *(int64_t*)worker.call->out[arg[0]] = *(const int64_t*)worker.call->in[arg[0]] + 1;
}

INLINE float inverse_length(const float* x, int64_t n) {
  Floats total = {};
  for (int64_t i = 0; i < n; i += LANES) total += load(x + i, n - i) * load(x + i, n - i);
  const float length = std::sqrt(sum(total));
  return 1.0f / (length > 1e-12f ? length : 1e-12f);
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

enum Kind { BARRIER, EMBED, NORMALIZE, INTERPOLATE, KEEP, MULTIPLY, CONVOLVE, ROTATE, COUNT, HEADS,
            WKV4, RWKV5, RWKV7 };

static void run(const Worker& worker) {
  const Program& program = *worker.call->program;
  for (int64_t i = 0; i < program.count; ++i) {
    const int64_t* arg = program.instructions[i].arg;
    switch (program.instructions[i].kind) {
      case BARRIER: wait(program.barrier, worker.threads); break;
      case EMBED: embed(worker, arg); break;
      case NORMALIZE: normalize(worker, arg); break;
      case INTERPOLATE: interpolate(worker, arg); break;
      case KEEP: keep(worker, arg); break;
      case MULTIPLY: multiply(worker, arg); break;
      case CONVOLVE: convolve(worker, arg); break;
      case ROTATE: rotate(worker, arg); break;
      case COUNT: count(worker, arg); break;
      case HEADS:
        if (arg[6] == 64 && !(arg[8] & DIVIDE))
          heads<64>(worker, arg);
        else
          heads<0>(worker, arg);
        break;
      case WKV4: wkv4(worker, arg); break;
      case RWKV5:
        if (arg[6] == 64)
          rwkv5_heads<64>(worker, arg);
        else
          rwkv5_heads<0>(worker, arg);
        break;
      case RWKV7:
        if (arg[10] == 64)
          rwkv7_heads<64>(worker, arg);
        else
          rwkv7_heads<0>(worker, arg);
        break;
    }
  }
}

static float read(const float* lines, int64_t begin, int64_t end) {
  Floats a = {}, b = {}, c = {}, d = {};
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    const float* line = lines + i * LANES;
    a += load(line);
    b += load(line + LANES);
    c += load(line + 2 * LANES);
    d += load(line + 3 * LANES);
  }
  for (; i < end; ++i) a += load(lines + i * LANES);
  return sum((a + b) + (c + d));
}
