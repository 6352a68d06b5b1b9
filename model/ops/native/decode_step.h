// The instructions of decode.cpp; included once for each instruction set, so without a guard.
// Every function is free of OpenMP: the threads are there already.

#include "decode_vectors.h"

#include "decode_matrices.h"

#include "decode_elements.h"

#include "decode_heads.h"

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
