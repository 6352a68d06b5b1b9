// What the kernels between the recurrences work on: rows of tensors [B, T, D], one row a token.
//
// Every kernel handles a block of rows, forward or backward, in one pass through memory. Gradients
// of parameters are summed within the block and written to the block's own line of `sums`: their
// total does not depend on the number of threads, and its rounding hardly grows with the rows.
#pragma once
#include <cstdint>

constexpr int64_t ROWS_PER_BLOCK = 32;

template <class Real>
struct Rows {
  int64_t batch, time, heads, head_dim;  // D = heads * head_dim
  int64_t num_inputs, num_cotangents, num_outputs, sums_width;
  int64_t choice;  // of a variant, where a kernel has one
  double eps;
  const uint8_t* reset;  // [B, T]
  const Real* in[12];
  const Real* cotangents[8];  // of the outputs of the forward kernel, in its order
  Real* out[8];
  Real* sums;  // [blocks, sums_width]

  int64_t rows() const { return batch * time; }
  int64_t width() const { return heads * head_dim; }
};

// In the order in which Python names them.
enum {
  SHIFT_FORWARD,
  SHIFT_BACKWARD,
  RWKV7_FORWARD,
  RWKV7_BACKWARD,
  HEAD_NORM_FORWARD,
  HEAD_NORM_BACKWARD,
  SQUARED_RELU_FORWARD,
  SQUARED_RELU_BACKWARD,
  SWIGLU_FORWARD,
  SWIGLU_BACKWARD,
  NORM_FORWARD,
  NORM_BACKWARD,
  CONVOLUTION_FORWARD,
  CONVOLUTION_BACKWARD,
  HEAD_RMS_FORWARD,
  HEAD_RMS_BACKWARD,
  SKIP_NORM_FORWARD,
  SKIP_NORM_BACKWARD,
  HEAD_SCALE_FORWARD,
  HEAD_SCALE_BACKWARD,
  NUM_ROW_KERNELS
};

// One for each entry of the enumeration: rows begin to end, and the block's sums, zeros.
template <class Real>
using RowKernel = void (*)(const Rows<Real>&, int64_t begin, int64_t end, Real* sums);
