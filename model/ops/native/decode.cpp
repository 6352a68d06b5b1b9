// One token of a whole model in one call: a program of a few fused instructions, run by threads
// that stay in one parallel region and meet at spin barriers. model/ops/program.py writes the
// programs; this file only runs them.
//
// Vectors live in an arena of floats: below `shared` all threads see the same ones, above it each
// thread has its own. Matrices are packed in tiles of 16 rows, so that the 16 lanes of a register
// are 16 rows, a thread reads one stream of memory, and no sum runs across lanes.
//
// The instructions are compiled three times (decode_step.h): for any CPU, for AVX2 and for AVX-512
// with its 8-bit dot products. The choice is made when a program runs.

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(_WIN32)
#define EBB_EXPORT __declspec(dllexport)
#else
#define EBB_EXPORT __attribute__((visibility("default")))
#endif

extern "C" EBB_EXPORT int ebb_instruction_set();  // kernels.cpp

#define INLINE static inline __attribute__((always_inline))

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

constexpr int LANES = 16;
constexpr int BLOCK = 32;           // columns that share a scale
constexpr int MAX_HEAD = 512;       // largest head
constexpr int SPINS = 4000;         // before a waiting thread lets others run

struct Instruction {
  int64_t kind;
  int64_t arg[23];
};

struct alignas(128) Barrier {
  std::atomic<int> waiting;
  alignas(128) std::atomic<int> round;
};

struct Program {
  const Instruction* instructions;
  int64_t count;
  float* shared;                    // shared vectors, then those of each thread
  int64_t shared_size, own_size;
  Barrier* barrier;
};

struct Call {
  const Program* program;
  int64_t token;
  const void* const* in;            // the state's tensors before ...
  void* const* out;                 // ... and after; they may be the same
  float* logits;
};

struct Worker {
  const Call* call;
  int thread, threads;
  float* own;                       // this thread's vectors

  float* at(int64_t offset) const {
    if (offset < 0) return call->logits;
    const Program* p = call->program;
    return offset < p->shared_size ? p->shared + offset : own + (offset - p->shared_size);
  }
  // A vector that all see is computed by one thread; one of its own by each.
  bool computes(int64_t offset) const {
    return offset >= call->program->shared_size || thread == 0;
  }
  void share(int64_t count, int64_t grain, int64_t& begin, int64_t& end) const {
    const int64_t units = (count + grain - 1) / grain;
    begin = units * thread / threads * grain;
    end = units * (thread + 1) / threads * grain;
    if (end > count) end = count;
    if (begin > end) begin = end;
  }
};

void wait(Barrier* barrier, int threads) {
  const int round = barrier->round.load(std::memory_order_relaxed);
  if (barrier->waiting.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
    barrier->waiting.store(0, std::memory_order_relaxed);
    barrier->round.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; barrier->round.load(std::memory_order_acquire) == round; ++spins) {
    if (spins < SPINS) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      sched_yield();                // others share the cores
    }
  }
}

namespace plain {
#include "decode_step.h"
}

#if defined(__x86_64__)
namespace avx2 {
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define EBB_AVX2
#include "decode_step.h"
#undef EBB_AVX2
#pragma GCC pop_options
}
namespace avx512 {
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#define EBB_AVX512
#include "decode_step.h"
#undef EBB_AVX512
#pragma GCC pop_options
}
#endif

struct Kernels {
  void (*run)(const Worker&);
  float (*read)(const float*, int64_t, int64_t);
};

Kernels widest() {
#if defined(__x86_64__)
  const int set = ebb_instruction_set();
  if (set == 2 && __builtin_cpu_supports("avx512vnni")) return {avx512::run, avx512::read};
  if (set >= 1) return {avx2::run, avx2::read};
#endif
  return {plain::run, plain::read};
}

}  // namespace

extern "C" {

// Reads a token: `out` becomes the state after it, `logits` those of the next.
EBB_EXPORT void ebb_decode_step(const Program* program, int64_t token, const void* const* in,
                                void* const* out, float* logits, int threads) {
  const Call call{program, token, in, out, logits};
  const Kernels kernels = widest();
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    const Worker worker{&call, thread, omp_get_num_threads(),
                        program->shared + program->shared_size + thread * program->own_size};
    kernels.run(worker);
  }
}

// Bytes of a barrier: the caller provides this many zeros, aligned to 128.
EBB_EXPORT int ebb_decode_barrier_size() { return sizeof(Barrier); }

// The sum of `count` lines of 64 bytes that all threads read: what the memory's bandwidth is.
EBB_EXPORT double ebb_decode_read(const float* lines, int64_t count, int threads) {
  const Kernels kernels = widest();
  double total = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
    total += kernels.read(lines, count * t / n, count * (t + 1) / n);
  }
  return total;
}
}
