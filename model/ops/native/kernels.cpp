// Native kernels of the recurrences: one binary for every instruction set, called through ctypes.
//
// The kernels are compiled once for each instruction set; the widest one that the machine has is
// taken when the library is loaded. They hold no OpenMP: the parallel region calls them.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "rows.h"
#include "scan.h"
#include "wkv4.h"

template <class Real>
using Index = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;

#if defined(__x86_64__)
#define EBB_NAMESPACE avx512
#define EBB_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define EBB_VECTOR_BYTES 64
#define EBB_PANEL_VECTORS 4
#include "instruction_set.h"

#define EBB_NAMESPACE avx2
#define EBB_TARGET __attribute__((target("avx2,fma")))
#define EBB_VECTOR_BYTES 32
#define EBB_PANEL_VECTORS 2
#include "instruction_set.h"
#endif

#define EBB_NAMESPACE baseline
#define EBB_TARGET
#define EBB_VECTOR_BYTES 16
#define EBB_PANEL_VECTORS 2
#include "instruction_set.h"

namespace {

// Instruction sets, from the plainest to the widest.
enum { BASELINE, AVX2, AVX512 };

int widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? AVX512 : avx2 ? AVX2 : BASELINE;
#else
  return BASELINE;
#endif
}

int chosen = widest();

template <class Real>
const ScanKernels<Real>& scan_kernels() {
#if defined(__x86_64__)
  if (chosen == AVX512) return avx512::SCAN_KERNELS<Real>;
  if (chosen == AVX2) return avx2::SCAN_KERNELS<Real>;
#endif
  return baseline::SCAN_KERNELS<Real>;
}

template <class Real>
const ChunkKernels<Real>& chunk_kernels() {
#if defined(__x86_64__)
  if (chosen == AVX512) return avx512::CHUNK_KERNELS<Real>;
  if (chosen == AVX2) return avx2::CHUNK_KERNELS<Real>;
#endif
  return baseline::CHUNK_KERNELS<Real>;
}

// While it lives, the thread takes numbers too small to be written in full for zeros. Decays of many
// tokens multiplied up pass through them, and processors of Intel take 100 times as long for each.
struct TinyIsZero {
#if defined(__x86_64__)
  unsigned before = __builtin_ia32_stmxcsr();
  TinyIsZero() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~TinyIsZero() { __builtin_ia32_ldmxcsr(before); }
#endif
};

// Memory of one thread for its kernels, kept from call to call; aligned, and finite numbers.
template <class Real>
Real* scratch(int64_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  const int64_t needed = (std::max<int64_t>(count, 1) * int64_t(sizeof(Real)) + 63) / 64 * 64;
  if (needed > size) {
    memory.reset(std::aligned_alloc(64, needed));
    size = memory ? needed : 0;
    if (memory) std::fill_n(static_cast<char*>(memory.get()), needed, 0);
  }
  return static_cast<Real*>(memory.get());
}

template <class Real>
const DecayKernels<Real>& decay_kernels() {
#if defined(__x86_64__)
  if (chosen == AVX512) return avx512::DECAY_KERNELS<Real>;
  if (chosen == AVX2) return avx2::DECAY_KERNELS<Real>;
#endif
  return baseline::DECAY_KERNELS<Real>;
}

const Wkv4Kernels& wkv4_kernels() {
#if defined(__x86_64__)
  if (chosen == AVX512) return avx512::WKV4_KERNELS;
  if (chosen == AVX2) return avx2::WKV4_KERNELS;
#endif
  return baseline::WKV4_KERNELS;
}

// Calls work(item, memory) for every item, each thread with `count` numbers of scratch of its own.
// Returns 0, or 1 where there was no memory for them.
template <class Real, class Work>
int for_all(int64_t items, int threads, int64_t count, const Work& work) {
  const int team = int(std::max<int64_t>(std::min<int64_t>(threads, items), 1));
  int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(team) if (team > 1) reduction(| : failed)
  for (int64_t item = 0; item < items; ++item) {
    Real* const memory = scratch<Real>(count);
    if (memory)
      work(item, memory);
    else
      failed = 1;
  }
  return failed;
}

template <class Real>
int forward(const Scan<Real>& s, int threads) {
  const auto& kernels = scan_kernels<Real>();
  const auto kernel = kernels.forward[kernels.kind(s)];
  const int64_t panels = kernels.forward_panels(s), items = s.batch * s.heads * panels;
  return for_all<Real>(items, threads, kernels.forward_scratch(s), [&](int64_t item, Real* memory) {
    kernel(s, item / panels, item % panels, memory);
  });
}

template <class Real>
int backward(const Scan<Real>& s, const ScanGradient<Real>& d, int threads) {
  const auto& kernels = scan_kernels<Real>();
  const auto kernel = kernels.backward[kernels.kind(s)];
  const int64_t panels = kernels.backward_panels(s), items = s.batch * s.key_heads * d.parts;
  return for_all<Real>(items, threads, kernels.backward_scratch(s), [&](int64_t item, Real* memory) {
    const int64_t first = item / d.parts * s.sharing(), part = item % d.parts;
    for (int64_t index = first; index < first + s.sharing(); ++index)
      if (d.parts > 1)
        kernel(s, d, index, part, part, memory);
      else
        for (int64_t panel = 0; panel < panels; ++panel) kernel(s, d, index, panel, 0, memory);
  });
}

template <class Real>
int chunks_forward(const Scan<Real>& s, int threads) {
  const auto& kernels = chunk_kernels<Real>();
  const int64_t groups = s.batch * s.key_heads;
  return for_all<Real>(groups, threads, kernels.forward_scratch(s), [&](int64_t group, Real* memory) {
    const TinyIsZero tiny_is_zero;
    kernels.forward(s, group, memory);
  });
}

template <class Real>
int chunks_backward(const Scan<Real>& s, const ScanGradient<Real>& d, int threads) {
  const auto& kernels = chunk_kernels<Real>();
  const int64_t groups = s.batch * s.key_heads;
  return for_all<Real>(groups, threads, kernels.backward_scratch(s),
                       [&](int64_t group, Real* memory) {
                         const TinyIsZero tiny_is_zero;
                         kernels.backward(s, d, group, memory);
                       });
}

template <class Real>
int decays(const Real* log_decay, Real* decay, int64_t batch, int64_t time, int64_t channels,
           int threads) {
  const auto& kernels = decay_kernels<Real>();
  const int64_t blocks = (channels + kernels.channels - 1) / kernels.channels;
  return for_all<Real>(batch * blocks, threads, 0, [&](int64_t item, Real*) {
    const int64_t channel = item % blocks * kernels.channels;
    const int64_t at = item / blocks * time * channels + channel;
    kernels.run(log_decay + at, decay + at, time, channels, channels - channel);
  });
}

int forward(const Wkv4& x, int threads) {
  const auto& kernels = wkv4_kernels();
  const int64_t blocks = (x.width + kernels.channels - 1) / kernels.channels;
  return for_all<double>(x.batch * blocks, threads, 0, [&](int64_t item, double*) {
    kernels.forward(x, item / blocks, item % blocks * kernels.channels);
  });
}

int backward(const Wkv4& x, const Wkv4Gradient& d, int threads) {
  const auto& kernels = wkv4_kernels();
  const int64_t blocks = (x.width + kernels.channels - 1) / kernels.channels;
  const int64_t count = 3 * x.chunk * kernels.channels;
  return for_all<double>(x.batch * blocks, threads, count, [&](int64_t item, double* memory) {
    kernels.backward(x, d, item / blocks, item % blocks * kernels.channels, memory);
  });
}

template <class Real>
const RowKernel<Real>* row_kernels() {
#if defined(__x86_64__)
  if (chosen == AVX512) return avx512::ROW_KERNELS<Real>;
  if (chosen == AVX2) return avx2::ROW_KERNELS<Real>;
#endif
  return baseline::ROW_KERNELS<Real>;
}

template <class Real>
int run_rows(const Rows<Real>& s, int kernel, int threads) {
  const RowKernel<Real> run = row_kernels<Real>()[kernel];
  const int64_t rows = s.rows(), blocks = (rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK;
  // What is small is done before a second thread is awake.
  if (rows * s.width() < 16384) threads = 1;
  return for_all<Real>(blocks, threads, 0, [&](int64_t block, Real*) {
    Real* const sums = s.sums ? s.sums + block * s.sums_width : nullptr;
    if (sums) std::fill_n(sums, s.sums_width, Real(0));
    run(s, block * ROWS_PER_BLOCK, std::min(rows, (block + 1) * ROWS_PER_BLOCK), sums);
  });
}

}  // namespace

// The module is never imported, only loaded; setuptools builds extensions of Python alone.
extern "C" {
#if defined(_WIN32)
#define EBB_EXPORT __declspec(dllexport)
#else
#define EBB_EXPORT __attribute__((visibility("default")))
#endif

EBB_EXPORT void* PyInit__kernels() { return nullptr; }

EBB_EXPORT int ebb_instruction_set() { return chosen; }

// Takes a plainer instruction set than the widest that the machine has; returns what is in use.
EBB_EXPORT int ebb_use_instruction_set(int wanted) {
  return chosen = std::max(int(BASELINE), std::min(wanted, widest()));
}

EBB_EXPORT int64_t ebb_panels_f32(const Scan<float>* s) {
  return scan_kernels<float>().backward_panels(*s);
}
EBB_EXPORT int64_t ebb_panels_f64(const Scan<double>* s) {
  return scan_kernels<double>().backward_panels(*s);
}
EBB_EXPORT int ebb_scan_forward_f32(const Scan<float>* s, int threads) {
  return forward(*s, threads);
}
EBB_EXPORT int ebb_scan_forward_f64(const Scan<double>* s, int threads) {
  return forward(*s, threads);
}
EBB_EXPORT int ebb_scan_backward_f32(const Scan<float>* s, const ScanGradient<float>* d,
                                     int threads) {
  return backward(*s, *d, threads);
}
EBB_EXPORT int ebb_scan_backward_f64(const Scan<double>* s, const ScanGradient<double>* d,
                                     int threads) {
  return backward(*s, *d, threads);
}
EBB_EXPORT int ebb_chunks_forward_f32(const Scan<float>* s, int threads) {
  return chunks_forward(*s, threads);
}
EBB_EXPORT int ebb_chunks_forward_f64(const Scan<double>* s, int threads) {
  return chunks_forward(*s, threads);
}
EBB_EXPORT int ebb_chunks_backward_f32(const Scan<float>* s, const ScanGradient<float>* d,
                                       int threads) {
  return chunks_backward(*s, *d, threads);
}
EBB_EXPORT int ebb_chunks_backward_f64(const Scan<double>* s, const ScanGradient<double>* d,
                                       int threads) {
  return chunks_backward(*s, *d, threads);
}
EBB_EXPORT int ebb_decays_f32(const float* log_decay, float* decay, int64_t batch, int64_t time,
                              int64_t channels, int threads) {
  return decays(log_decay, decay, batch, time, channels, threads);
}
EBB_EXPORT int ebb_decays_f64(const double* log_decay, double* decay, int64_t batch, int64_t time,
                              int64_t channels, int threads) {
  return decays(log_decay, decay, batch, time, channels, threads);
}
EBB_EXPORT int ebb_wkv4_forward_f64(const Wkv4* x, int threads) { return forward(*x, threads); }
EBB_EXPORT int ebb_wkv4_backward_f64(const Wkv4* x, const Wkv4Gradient* d, int threads) {
  return backward(*x, *d, threads);
}
EBB_EXPORT int64_t ebb_rows_per_block() { return ROWS_PER_BLOCK; }
EBB_EXPORT int ebb_rows_f32(const Rows<float>* s, int kernel, int threads) {
  return run_rows(*s, kernel, threads);
}
EBB_EXPORT int ebb_rows_f64(const Rows<double>* s, int kernel, int threads) {
  return run_rows(*s, kernel, threads);
}
}
