// The names of CUDA C that our kernels may use, for g++ on a CPU. runtime.cpp holds the scheduler and the checker.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>
#undef INFINITY  // NVRTC has none of these, so a kernel that uses them must fail here too
#undef NAN
#undef HUGE_VALF

#define __global__
#define __device__ static
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("shared"), aligned(16)))
asm(".section shared,\"aw\"\n.zero 4096\n.text\n");  // so that an underrun is seen
#define HIDDEN extern "C" __attribute__((visibility("hidden")))
#define VISIBLE extern "C" __attribute__((visibility("default")))

struct uint3 { unsigned x, y, z; };
template <class T> struct alignas(2 * sizeof(T)) Pair { T x, y; };
template <class T> struct alignas(4 * sizeof(T)) Four { T x, y, z, w; };
typedef Pair<float> float2;
typedef Pair<int> int2;
typedef Pair<double> double2;
typedef Four<float> float4;
typedef Four<int> int4;
typedef Four<unsigned> uint4;
static inline float2 make_float2(float a, float b) { return {a, b}; }
static inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
static inline int4 make_int4(int a, int b, int c, int d) { return {a, b, c, d}; }
static inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }

// -- threads, barriers and warps --------------------------------------------------------------------------------------
namespace emulator {
enum Kind { SYNC, COUNT, AND, OR, SHUFFLE, BALLOT, SYNCWARP };

struct Thread {  // a CUDA thread: a fiber with a stack of its own
  void *sp, *stack;
  uint3 index;
  unsigned number, lane, warp;
  unsigned char state, kind;
  int site;  // the line where it waits, in the lower 16 bits
  unsigned mask;
  int source;  // the lane it reads
  uint64_t value, result;
};
}  // namespace emulator

HIDDEN emulator::Thread *current;
HIDDEN uint3 block_index, block_size, grid_size;
HIDDEN uint64_t block_barrier(int site, int kind, int predicate);
HIDDEN uint64_t warp_operation(int site, int kind, unsigned mask, uint64_t value, int source);
HIDDEN void atomic_access(const void *p, unsigned size);
HIDDEN void failed_assertion(int site, const char *what);

#define threadIdx (current->index)
#define blockIdx block_index
#define blockDim block_size
#define gridDim grid_size
#define warpSize 32
#define SITE (__LINE__ | __COUNTER__ << 16)  // lines of two files may have one number
#define __syncthreads() ((void)block_barrier(SITE, emulator::SYNC, 0))
#define __syncthreads_count(p) ((int)block_barrier(SITE, emulator::COUNT, !!(p)))
#define __syncthreads_and(p) ((int)block_barrier(SITE, emulator::AND, !!(p)))
#define __syncthreads_or(p) ((int)block_barrier(SITE, emulator::OR, !!(p)))
#define __syncwarp(...) ((void)warp_operation(SITE, emulator::SYNCWARP, emulator::mask_or_all(__VA_ARGS__), 0, 0))
#define __ballot_sync(m, p) ((unsigned)warp_operation(SITE, emulator::BALLOT, (m), !!(p), 0))
#define __any_sync(m, p) (__ballot_sync(m, p) != 0)
#define __all_sync(m, p) (__ballot_sync(m, !(p)) == 0)
#define __shfl_sync(...) emulator::shuffle<0>(SITE, __VA_ARGS__)
#define __shfl_up_sync(...) emulator::shuffle<1>(SITE, __VA_ARGS__)
#define __shfl_down_sync(...) emulator::shuffle<2>(SITE, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator::shuffle<3>(SITE, __VA_ARGS__)
#undef assert
#define assert(c) ((c) ? (void)0 : failed_assertion(SITE, #c))

namespace emulator {
static inline unsigned mask_or_all(unsigned m = 0xffffffffu) { return m; }

template <int MODE, class T> static inline T shuffle(int site, unsigned mask, T v, int argument, int width = 32) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  int lane = current->lane, base = lane & ~(width - 1), top = base + width, source = lane;
  if (MODE == 0) source = base + (argument & (width - 1));
  if (MODE == 1) source = lane - argument < base ? lane : lane - argument;
  if (MODE == 2) source = lane + argument >= top ? lane : lane + argument;
  if (MODE == 3) source = (lane ^ argument) >= top ? lane : lane ^ argument;
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  bits = warp_operation(site, SHUFFLE, mask, bits, source);
  memcpy(&v, &bits, sizeof v);
  return v;
}

// Threads run one at a time, so an atomic update is a plain one that the checker knows of.
template <class T, class F> __attribute__((no_sanitize_thread)) static T update(T *p, F f) {
  atomic_access(p, sizeof(T));
  T old = *p;
  *p = f(old);
  return old;
}
}  // namespace emulator

template <class T> using Same = std::common_type_t<T>;  // not deduced: the value converts to the type of the array
template <class T> static inline T atomicAdd(T *p, Same<T> v) { return emulator::update(p, [=](T o) { return T(o + v); }); }
template <class T> static inline T atomicOr(T *p, Same<T> v) { return emulator::update(p, [=](T o) { return T(o | v); }); }
template <class T> static inline T atomicExch(T *p, Same<T> v) { return emulator::update(p, [=](T) { return v; }); }
template <class T> static inline T atomicMax(T *p, Same<T> v) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMax of floats");
  return emulator::update(p, [=](T o) { return o < v ? v : o; });
}
template <class T> static inline T atomicMin(T *p, Same<T> v) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMin of floats");
  return emulator::update(p, [=](T o) { return v < o ? v : o; });
}
template <class T> static inline T atomicCAS(T *p, Same<T> old, Same<T> v) {
  return emulator::update(p, [=](T o) { return o == old ? v : o; });
}

// -- arithmetic (macros where the C library declares the name) ----------------------------------------------------------
using std::isfinite;
using std::isinf;
using std::isnan;
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define cospi(x) cos(M_PI * fmod(x, 2.))
#define sinpi(x) sin(M_PI * fmod(x, 2.))
template <class T, class U> static inline T bits_as(U u) {
  static_assert(sizeof(T) == sizeof(U));
  T t;
  memcpy(&t, &u, sizeof t);
  return t;
}
static inline float __int_as_float(int i) { return bits_as<float>(i); }
static inline float __uint_as_float(unsigned i) { return bits_as<float>(i); }
static inline int __float_as_int(float f) { return bits_as<int>(f); }
static inline unsigned __float_as_uint(float f) { return bits_as<unsigned>(f); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float rsqrtf(float a) { return 1.f / sqrtf(a); }
static inline double rsqrt(double a) { return 1. / sqrt(a); }
template <class T, class U> static inline std::common_type_t<T, U> min(T a, U b) {
  using C = std::common_type_t<T, U>;
  if constexpr (std::is_floating_point_v<C>) return std::fmin((C)a, (C)b);
  else return (C)b < (C)a ? (C)b : (C)a;
}
template <class T, class U> static inline std::common_type_t<T, U> max(T a, U b) {
  using C = std::common_type_t<T, U>;
  if constexpr (std::is_floating_point_v<C>) return std::fmax((C)a, (C)b);
  else return (C)a < (C)b ? (C)b : (C)a;
}
template <class T> static inline T __ldg(const T *p) { return *p; }

// -- what Python calls --------------------------------------------------------------------------------------------------
struct Launch {
  unsigned grid[3], block;
  int strict, seed;  // seed 0: threads and blocks in order, else shuffled
  void *stacks;
  void **arguments;
  int arrays;  // those that the checker watches
  void **starts;
  size_t *sizes;
  int *items;
  char *error;
  size_t error_size;
};
HIDDEN int run(void (*)(void **), const Launch *);

namespace emulator {
template <class T> int describe(char *s, size_t n) {  // "const float32* " as the manifest has it
  using E = std::remove_cv_t<std::remove_pointer_t<T>>;
  const char *kind = std::is_same_v<E, bool> ? "bool" : std::is_floating_point_v<E> ? "float" :
                     !std::is_integral_v<E> ? "other" : std::is_signed_v<E> ? "int" : "uint";
  bool constant = std::is_pointer_v<T> && std::is_const_v<std::remove_pointer_t<T>>;
  char width[4] = "";
  if (!std::is_same_v<E, bool>) snprintf(width, 4, "%d", (int)sizeof(E) * 8);
  return snprintf(s, n, "%s%s%s%s,", constant ? "const " : "", kind, width, std::is_pointer_v<T> ? "*" : "");
}
template <auto F> struct Kernel;
template <class... A, void (*F)(A...)> struct Kernel<F> {
  static void signature(char *s, size_t n) {
    int k = 0;
    ((k += describe<A>(s + k, n - k)), ...);
  }
  template <size_t... I> __attribute__((no_sanitize_thread)) static void pass(void **a, std::index_sequence<I...>) {
    F(*(std::remove_cv_t<A> *)a[I]...);
  }
  __attribute__((no_sanitize_thread)) static void call(void **a) { pass(a, std::index_sequence_for<A...>{}); }
};
}  // namespace emulator

#define EXPORT(NAME) \
  VISIBLE void signature_##NAME(char *s, size_t n) { emulator::Kernel<&NAME>::signature(s, n); } \
  VISIBLE int launch_##NAME(const Launch *l) { return run(&emulator::Kernel<&NAME>::call, l); }
