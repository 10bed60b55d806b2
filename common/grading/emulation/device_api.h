// The device side: built-in variables, barriers, warp operations, atomics, mathematics.
#pragma once
#include "scheduler.h"
#include <type_traits>

// Code that the `interleaved` order must not cut in two (an atomic is one step on a GPU): no hooks inside, no inlining.
#define EMU_ONE_STEP __attribute__((noinline, no_sanitize("thread"), unused))

#define threadIdx (emu::self().thread_idx)
#define blockIdx (emu::self().block_idx)
#define blockDim (emu::self(), emu::block_dim)
#define gridDim (emu::self(), emu::grid_dim)
constexpr int warpSize = 32;

// The line of the call names a barrier: all threads of a block must meet at the same one.
#define __syncthreads() emu::block_barrier(__LINE__)
#define __syncthreads_count(p) (emu::block_barrier(__LINE__, (p) != 0), emu::self().predicate_count)
#define __syncthreads_or(p) (__syncthreads_count(p) != 0)
#define __syncthreads_and(p) (__syncthreads_count(!(p)) == 0)
#define __threadfence() ((void)0)
#define __threadfence_block() ((void)0)
#define __threadfence_system() ((void)0)

namespace emu {

template <class T> EMU_ONE_STEP T shuffle(unsigned mask, T value, unsigned source_lane, int line) {
    static_assert(sizeof(T) <= 8, "emulation: shuffles move at most 8 bytes");
    Thread &t = self();
    t.value = 0;
    memcpy(&t.value, &value, sizeof value);
    t.source_lane = source_lane;
    t.predicate = 0;
    warp_wait(WarpOp::shuffle, mask, line);
    memcpy(&value, &t.result, sizeof value);
    return value;
}
EMU_ONE_STEP static unsigned vote(unsigned mask, int predicate, int line) {
    Thread &t = self();
    t.predicate = predicate != 0;
    t.source_lane = t.rank % 32;
    warp_wait(WarpOp::ballot, mask, line);
    return t.ballot;
}
EMU_ONE_STEP static void warp_sync(unsigned mask, int line) {
    self().predicate = 0;
    self().source_lane = self().rank % 32;
    warp_wait(WarpOp::sync, mask, line);
}
// Source lanes as CUDA defines them: groups of `width` lanes; a lane outside the group gives the caller its own value.
EMU_ONE_STEP static unsigned lane_indexed(int source, int width) { return (self().rank % 32 & ~(width - 1u)) + (source & (width - 1)); }
EMU_ONE_STEP static unsigned lane_up(unsigned delta, int width) {
    unsigned lane = self().rank % 32;
    return lane % width >= delta ? lane - delta : lane;
}
EMU_ONE_STEP static unsigned lane_down(unsigned delta, int width) {
    unsigned lane = self().rank % 32;
    return lane % width + delta < unsigned(width) ? lane + delta : lane;
}
EMU_ONE_STEP static unsigned lane_xor(int bits, int width) {
    unsigned lane = self().rank % 32, other = lane ^ bits;
    return (other & ~(width - 1u)) <= (lane & ~(width - 1u)) ? other : lane;
}

// One memory a declaration (and instance of its template), keyed by the address of a variable that belongs to it alone.
template <class T> EMU_ONE_STEP T &block_shared(const volatile void *site) {  // `volatile __shared__`
    return *static_cast<T *>(shared_memory(const_cast<const void *>(site), sizeof(T), alignof(T)));
}
template <class T> EMU_ONE_STEP T *dynamic_shared() { return static_cast<T *>(dynamic_shared_memory()); }
template <class T> struct DynamicShared {  // `extern __shared__ T name[];` at file scope
    operator T *() const { return dynamic_shared<T>(); }
};

template <class T> void shut_argument(const T &) {}
template <class T> void shut_argument(T *pointer) { shut_host_memory(pointer); }

struct Launch {  // kernel<<<grid, block, shared, stream>>>(arguments)
    dim3 grid, block;
    size_t shared;
    Launch(dim3 g, dim3 b, size_t s = 0, cudaStream_t = nullptr) : grid(g), block(b), shared(s) {}
    template <class K, class... A> void call(K kernel, A... arguments) {
        (shut_argument(arguments), ...);
        emu_last(cudaError_t(launch([=] { kernel(arguments...); }, grid, block, shared, false)));
        open_host_memory();
    }
};
template <class... P, size_t... I>
cudaError_t launch_with(void (*kernel)(P...), dim3 g, dim3 b, void **a, size_t shared, bool cooperative, std::index_sequence<I...>) {
    for (void *argument : {a[I]...}) check_argument(argument);
    auto bound = [=] { kernel(*static_cast<std::remove_reference_t<P> *>(a[I])...); };
    (shut_argument(*static_cast<std::remove_reference_t<P> *>(a[I])), ...);
    cudaError_t error = emu_last(cudaError_t(launch(bound, g, b, shared, cooperative)));
    open_host_memory();
    return error;
}

// Atomics: fibers share one CPU thread, so a function without a switch in it is one step.
template <class T, class F> EMU_ONE_STEP T fetch(T *address, F change) {
    T old = *address;
    *address = change(old);
    return old;
}
}  // namespace emu

template <class... P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 grid, dim3 block, void **arguments, size_t shared = 0,
                                        cudaStream_t = nullptr) {
    return emu::launch_with(kernel, grid, block, arguments, shared, true, std::index_sequence_for<P...>{});
}
template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void **arguments, size_t shared = 0,
                             cudaStream_t = nullptr) {
    return emu::launch_with(kernel, grid, block, arguments, shared, false, std::index_sequence_for<P...>{});
}

inline int emu_width(int width = 32) { return width; }
inline unsigned emu_mask(unsigned mask = 0xffffffffu) { return mask; }
#define EMU_SHFL(rule, mask, value, argument, ...) emu::shuffle(mask, value, rule(argument, emu_width(__VA_ARGS__)), __LINE__)
#define __shfl_sync(mask, value, ...) EMU_SHFL(emu::lane_indexed, mask, value, __VA_ARGS__)
#define __shfl_up_sync(mask, value, ...) EMU_SHFL(emu::lane_up, mask, value, __VA_ARGS__)
#define __shfl_down_sync(mask, value, ...) EMU_SHFL(emu::lane_down, mask, value, __VA_ARGS__)
#define __shfl_xor_sync(mask, value, ...) EMU_SHFL(emu::lane_xor, mask, value, __VA_ARGS__)
#define __ballot_sync(mask, predicate) emu::vote(mask, predicate, __LINE__)
#define __any_sync(mask, predicate) (emu::vote(mask, predicate, __LINE__) != 0)
#define __all_sync(mask, predicate) (emu::vote(mask, !(predicate), __LINE__) == 0)
#define __syncwarp(...) emu::warp_sync(emu_mask(__VA_ARGS__), __LINE__)
EMU_ONE_STEP inline unsigned __activemask() { emu::fatal("blocked", "__activemask()"); }

// common_type_t keeps an argument out of deduction, as CUDA's overloads do.
#define EMU_ATOMIC(name, expression)                                                                                        \
    template <class T> T name(T *address, std::common_type_t<T> value) {                                                           \
        return emu::fetch(address, [value](T old) __attribute__((no_sanitize("thread"))) -> T { return expression; });      \
    }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
EMU_ATOMIC(atomicExch, ((void)old, value))
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicMax, old < value ? value : old)
EMU_ATOMIC(atomicAnd, old & value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicXor, old ^ value)
#undef EMU_ATOMIC
template <class T> EMU_ONE_STEP T atomicCAS(T *address, std::common_type_t<T> compare, std::common_type_t<T> value) {
    T old = *address;
    if (old == compare) *address = value;
    return old;
}

// Loads and stores with a cache hint are plain loads and stores.
#define EMU_LOAD(name) template <class T> T name(const T *p) { return *p; }
#define EMU_STORE(name) template <class T> void name(T *p, T v) { *p = v; }
EMU_LOAD(__ldg) EMU_LOAD(__ldcs) EMU_LOAD(__ldca) EMU_LOAD(__ldcg) EMU_LOAD(__ldlu) EMU_LOAD(__ldcv)
EMU_STORE(__stcs) EMU_STORE(__stcg) EMU_STORE(__stwb) EMU_STORE(__stwt)

// CUDA's mathematics: <math.h>, and what only a device has. The fast forms are computed in full precision.
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
