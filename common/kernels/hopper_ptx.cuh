// Hopper's instructions that hopper_gemm.cu needs, each as a function: barriers in shared memory, tensor copies,
// clusters, wgmma, the launch of dependent kernels. Source: the PTX ISA's sections of those names.

#pragma once

#include <cuda.h>

#include <cstdint>

// ---------------------------------------------------------------- barriers, copies, clusters

__device__ inline uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ inline void show_barriers_to_cluster() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The phase also waits for `bytes` to be written by the copy engine.
__device__ inline void arrive_expecting(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the same barrier of block `rank` of this cluster. Of block scope, though it may be another block's: what is
// handed over is a buffer that wgmma has read, for the copy engine to write, and no memory that this thread wrote. With
// cluster scope the compiler puts a fence of the whole GPU before it, which cost 0.6 µs a step.
__device__ inline void arrive_at(uint32_t barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

__device__ inline void wait_for(uint32_t barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// All threads of the cluster wait for each other; what they wrote is then seen by all.
__device__ inline void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same where nothing that was written matters: no fence.
__device__ inline void meet_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ inline int rank_in_cluster() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// L2's advice for a copy: W is read once and x again and again (encodings of createpolicy's results).
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000;

// The first copy through a map needs the map itself: asks for it.
__device__ inline void prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of `map` from (row, k) into this block's shared memory.
__device__ inline void load_box(const CUtensorMap *map, uint32_t to, uint32_t barrier, int k, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(k), "r"(row), "r"(barrier), "l"(EVICT_FIRST)
        : "memory");
}

// The same, into the shared memory of every block of `mask`, each of whose barriers counts the bytes.
__device__ inline void load_box_for(const CUtensorMap *map, uint32_t to, uint32_t barrier, int k, int row,
                                    uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
        "l"(map), "r"(k), "r"(row), "r"(barrier), "h"(mask), "l"(EVICT_LAST)
        : "memory");
}

// Four floats from the shared memory of block `rank` of this cluster.
__device__ inline float4 read_remote(uint32_t address, int rank) {
    float4 value;
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
        : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
        : "r"(address), "r"(rank)
        : "memory");
    return value;
}

// ---------------------------------------------------------------- threads, registers, kernels

// The first `THREADS` threads that come here wait for each other: a part of the block, at a barrier of its own.
template <int THREADS> __device__ void sync_threads_of() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// Programmatic dependent launch: the next kernel may begin; all that earlier kernels wrote is there.
__device__ inline void let_dependents_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---------------------------------------------------------------- wgmma

// A tile of rows of 128 bytes, swizzled over 128 bytes, K contiguous: eight rows are 1,024 bytes apart (units of 16).
__device__ inline uint64_t descriptor(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Registers 0 to 7, 8 to 15, ... as the instruction's text and as its operands; an instruction of N columns has N / 2.
#define R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define R1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define R2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define R3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define R4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define R5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define R6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define R7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define R8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define R9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define R10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define R11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define R12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define R13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define D8(o) \
    "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3]), "+f"(d[o + 4]), "+f"(d[o + 5]), "+f"(d[o + 6]), \
        "+f"(d[o + 7])
#define D16 D8(0), D8(8)
#define D32 D16, D8(16), D8(24)
#define D24 D16, D8(16)
#define D48 D32, D8(32), D8(40)
#define D56 D48, D8(48)
#define D64 D56, D8(56)
#define D72 D64, D8(64)
#define D112 D64, D8(64), D8(72), D8(80), D8(88), D8(96), D8(104)
#define T16 R0 R1
#define T32 T16 R2 R3
#define T24 T16 R2
#define T48 T32 R4 R5
#define T56 T48 R6
#define T64 T56 R7
#define T72 T64 R8
#define T112 T64 R8 R9 R10 R11 R12 R13

// d[64, N] (+)= a[64, 16] b[N, 16]^T over a warpgroup; `more` is 0 where the sum begins.
template <int N> struct Wgmma;
#define DEFINE_WGMMA(N, TEXT, OPERANDS, A, B, MORE) \
    template <> struct Wgmma<N> { \
        static __device__ void run(float (&d)[N / 2], uint64_t a, uint64_t b, int more) { \
            asm volatile( \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #MORE ", 0;\n" \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" TEXT "}, %" #A ", %" #B \
                ", p, 1, 1, 0, 0;\n}" \
                : OPERANDS \
                : "l"(a), "l"(b), "r"(more)); \
        } \
    }
DEFINE_WGMMA(32, T16, D16, 16, 17, 18);
DEFINE_WGMMA(48, T24, D24, 24, 25, 26);
DEFINE_WGMMA(64, T32, D32, 32, 33, 34);
DEFINE_WGMMA(96, T48, D48, 48, 49, 50);
DEFINE_WGMMA(112, T56, D56, 56, 57, 58);
DEFINE_WGMMA(128, T64, D64, 64, 65, 66);
DEFINE_WGMMA(144, T72, D72, 72, 73, 74);
DEFINE_WGMMA(224, T112, D112, 112, 113, 114);
