// What the kernels of the wkv4 recurrence work on, model/ops/wkv4.py: all numbers are float64.
//
// k, v, o [B, T, D]; decay (its log) and bonus [D]; reset [B, T]; num, den and top [B, D].
#pragma once
#include <cstdint>

struct Wkv4 {
  int64_t batch, time, width;
  int64_t chunk;  // tokens between two checkpoints of the state
  const double *k, *v, *decay, *bonus;
  const uint8_t* reset;
  const double *num, *den, *top;
  // Written by the forward pass; checkpoints, [B, chunks, 3, D], only where a backward one follows.
  double *o, *final_num, *final_den, *final_top, *checkpoints;
};

struct Wkv4Gradient {
  const double *o, *final_num, *final_den, *final_top;  // cotangents
  double *k, *v, *decay, *bonus;                        // decay and bonus [B, D]
  double *num, *den, *top;
};

// The kernels of one instruction set: one row of the batch, channels from `channel` on.
struct Wkv4Kernels {
  int64_t channels;  // of one call
  void (*forward)(const Wkv4&, int64_t row, int64_t channel);
  void (*backward)(const Wkv4&, const Wkv4Gradient&, int64_t row, int64_t channel, double* scratch);
};
