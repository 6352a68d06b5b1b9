// What a scan over the matrix state works on: additive and delta recurrence alike.
//
//   S_t = diag(decay_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,   o_t = scale q_t S_t
//
// without a and b the additive recurrence. With a bonus u the state is read before the write,
// o_t = scale q_t (S_{t-1} + diag(u) k_t v_t^T). Shapes, all contiguous: q, k, a, b [B, T, H, K];
// v, o [B, T, H, V]; states [B, H, K, V]; decay [B, T, H, K] or [B, T, H]; bonus [H, K]; reset [B, T].
// Neighbouring heads may share q and k, [B, T, key_heads, K], without a, b, bonus and a decay a
// channel.
#pragma once
#include <cstdint>

template <class Real>
struct Scan {
  int64_t batch, time, heads, key_heads, key_dim, value_dim;
  int64_t chunk;           // tokens between two checkpoints of the state
  int64_t decay_channels;  // K or 1; 0 for no decay
  double scale;
  const Real *q, *k, *v, *a, *b, *decay, *bonus;
  const uint8_t* reset;
  const Real* initial;
  // Written by the forward pass. The last two only where a backward pass will follow: what each
  // token removed, a_t^T S_{t-1}, [B, T, H, V], and the state before each chunk,
  // [B, H, chunks, K, padded_width(V)].
  Real *o, *final, *removed, *checkpoints;

  int64_t keys() const { return batch * time * key_heads * key_dim; }
  int64_t sharing() const { return heads / key_heads; }
};

// Columns that the checkpoints of a state have: whole vectors of any instruction set.
inline int64_t padded_width(int64_t value_dim) { return (value_dim + 15) / 16 * 16; }

template <class Real>
struct ScanGradient {
  const Real *o, *final;  // cotangents
  // Sums over V are formed panel by panel. With parts = 1 one thread adds up the panels of a head;
  // else parts is the number of panels, and each writes into its own [parts, ...]. Heads that share
  // q and k come one after the other, and add up theirs.
  int64_t parts;
  Real *q, *k, *a, *b, *decay;  // the last of the log of the decay
  double* bonus;  // [parts, B, H, K], zeros: summed over time here
  Real *v, *initial;
};

// One head in one row of the batch: where its tokens stand.
template <class Real>
struct Head {
  int64_t row, head, index, key_step, value_step, key_offset, value_offset;
  Head(const Scan<Real>& s, int64_t index)
      : row(index / s.heads),
        head(index % s.heads),
        index(index),
        key_step(s.key_heads * s.key_dim),
        value_step(s.heads * s.value_dim),
        key_offset((row * s.time * s.key_heads + head / s.sharing()) * s.key_dim),
        value_offset((row * s.time * s.heads + head) * s.value_dim) {}
  // Where a token's decay stands if a head has one of its own.
  int64_t decay_offset(const Scan<Real>& s, int64_t t) const {
    return (row * s.time + t) * s.heads + head;
  }
};

// The kernels of one instruction set; arrays are by kind: additive, additive with bonus, delta.
template <class Real>
struct ScanKernels {
  int64_t (*forward_scratch)(const Scan<Real>&);
  int64_t (*backward_scratch)(const Scan<Real>&);
  int64_t (*forward_panels)(const Scan<Real>&);
  int64_t (*backward_panels)(const Scan<Real>&);
  void (*forward[3])(const Scan<Real>&, int64_t index, int64_t panel, Real* scratch);
  void (*backward[3])(const Scan<Real>&, const ScanGradient<Real>&, int64_t index, int64_t panel,
                      int64_t part, Real* scratch);

  static int kind(const Scan<Real>& s) { return s.a ? 2 : s.bonus ? 1 : 0; }
};

// The same recurrence by chunks, where a head has one decay or none, and neither a, b nor a bonus:
// chunks_forward.h. A group is those heads of one row of the batch that share q and k. Checkpoints
// have padded_width(K) rows, and parts is 1.
template <class Real>
struct ChunkKernels {
  int64_t (*forward_scratch)(const Scan<Real>&);
  int64_t (*backward_scratch)(const Scan<Real>&);
  void (*forward)(const Scan<Real>&, int64_t group, Real* scratch);
  void (*backward)(const Scan<Real>&, const ScanGradient<Real>&, int64_t group, Real* scratch);
};

// Log-decays [T, stride] to decays, for `channels` of them at the most.
template <class Real>
struct DecayKernels {
  int64_t channels;
  void (*run)(const Real* log_decay, Real* decay, int64_t time, int64_t stride, int64_t count);
};
