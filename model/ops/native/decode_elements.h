// What stands between the matrices, element by element; included by decode_step.h for each instruction set.

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
