// Matrix-vector products; a tile is 16 rows, which packing.py lays out format by format; included by decode_step.h for each instruction set.

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
