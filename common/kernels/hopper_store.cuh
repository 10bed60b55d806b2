// What becomes of a tile's sums in hopper_gemm.cu: silu(gate) * up, the residual added, rounded and stored; where K is
// divided over a cluster, first added up through its blocks' shared memory.
//
// Nothing else runs on the multiprocessor meanwhile, so what counts is how long a thread waits: what it needs from far
// away is asked for together.

#pragma once

#include "hopper_tile.cuh"

namespace {

__device__ float silu(float gate) { return __fdividef(gate, 1.f + __expf(-gate)); }

__device__ __nv_bfloat162 load_pair(const __nv_bfloat16 *p) { return *reinterpret_cast<const __nv_bfloat162 *>(p); }

__device__ void store_pair(__nv_bfloat16 *p, float first, float second) {
    *reinterpret_cast<__nv_bfloat162 *>(p) = __floats2bfloat162_rn(first, second);
}

// A thread's sums of one block of 64 rows: row = 16 warp + lane / 4 (+ 8), columns 8 j + 2 (lane % 4) and the next.
// A row's residual is asked for before the first store, as far as registers go: `out` may be the same memory, so the
// compiler keeps loads behind stores.
template <class S> __device__ void store_tile(const float (&sums)[S::MI][S::NW / 2], const Arguments &a, int tile) {
    const int group = threadIdx.x / 128, below = group % S::WM, beside = group / S::WM;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    constexpr int NW = S::SILU ? S::NW / 2 : S::NW;  // outputs of a warpgroup
    constexpr int AT_ONCE = S::MI > 1 ? 8 : NW / 8;
    const int first_column = (tile * S::WN + beside) * NW + 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < S::MI; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = (below * S::MI + m) * 64 + 16 * warp + lane / 4 + 8 * half;
            if (row >= a.rows) continue;
            __nv_bfloat16 *to = a.out + int64_t(row) * a.out_stride + first_column;
            const __nv_bfloat16 *from = a.residual + int64_t(row) * a.residual_stride + first_column;
#pragma unroll
            for (int begin = 0; begin < NW / 8; begin += AT_ONCE) {
                __nv_bfloat162 residual[AT_ONCE] = {};
#pragma unroll
                for (int j = begin; j < begin + AT_ONCE && j < NW / 8; ++j)
                    if (a.residual && first_column + 8 * j < a.outputs) residual[j - begin] = load_pair(from + 8 * j);
#pragma unroll
                for (int j = begin; j < begin + AT_ONCE && j < NW / 8; ++j) {
                    float first = sums[m][4 * j + 2 * half], second = sums[m][4 * j + 2 * half + 1];
                    if constexpr (S::SILU) {
                        first = silu(first) * sums[m][4 * j + 2 * half + S::NW / 4];
                        second = silu(second) * sums[m][4 * j + 2 * half + 1 + S::NW / 4];
                    }
                    const __nv_bfloat162 more = residual[j - begin];
                    if (first_column + 8 * j < a.outputs)
                        store_pair(to + 8 * j, first + __low2float(more), second + __high2float(more));
                }
            }
        }
}

// A thread's sums, as store_tile has them, into this block's shared memory: [ROWS, SUM_STRIDE].
template <class S> __device__ void keep_sums(const float (&sums)[S::MI][S::NW / 2], float *kept) {
    const int group = threadIdx.x / 128, below = group % S::WM, beside = group / S::WM;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < S::MI; ++m)
#pragma unroll
        for (int j = 0; j < S::NW / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = (below * S::MI + m) * 64 + 16 * warp + lane / 4 + 8 * half;
                const int column = beside * S::NW + 8 * j + 2 * (lane % 4);
                *reinterpret_cast<float2 *>(kept + row * S::SUM_STRIDE + column) =
                    make_float2(sums[m][4 * j + 2 * half], sums[m][4 * j + 2 * half + 1]);
            }
}

// Adds the parts of K, in the order of the parts: each block takes its share of the rows and reads it from all of them,
// AT_ONCE quads of columns a thread on their way together, since another block's memory answers late.
template <class S> __device__ void add_parts(const Arguments &a, const Place &place, const float *kept, int tile) {
    constexpr int QUADS = S::COLUMNS / 4, THREADS = 128 * S::CONSUMERS, AT_ONCE = S::CONSUMERS > 2 ? 2 : 4;
    const int share = (a.rows + a.parts - 1) / a.parts;
    const int first_row = place.part * share, quads = (min(a.rows, first_row + share) - first_row) * QUADS;
    const uint32_t base = shared_address(kept);
    for (int begin = threadIdx.x; begin < quads; begin += AT_ONCE * THREADS) {
        float4 sums[AT_ONCE][MOST_PARTS] = {};
        __nv_bfloat162 residual[AT_ONCE][2] = {};
        auto place_of = [&](int n, int &row, int &column) {  // of the n-th quad; whether there is one
            const int i = begin + n * THREADS;
            row = first_row + i / QUADS, column = i % QUADS * 4;
            return i < quads && tile * S::COLUMNS + column < a.outputs;
        };
        int row, column;
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            if (!place_of(n, row, column)) continue;
#pragma unroll
            for (int part = 0; part < MOST_PARTS; ++part)
                if (part < a.parts)
                    sums[n][part] =
                        read_remote(base + (row * S::SUM_STRIDE + column) * 4, part * a.sharers + place.sharer);
            const int64_t at = int64_t(row) * a.residual_stride + tile * S::COLUMNS + column;
            if (a.residual) residual[n][0] = load_pair(a.residual + at), residual[n][1] = load_pair(a.residual + at + 2);
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            if (!place_of(n, row, column)) continue;
            float4 total = sums[n][0];
#pragma unroll
            for (int part = 1; part < MOST_PARTS; ++part) {
                total.x += sums[n][part].x, total.y += sums[n][part].y;
                total.z += sums[n][part].z, total.w += sums[n][part].w;
            }
            __nv_bfloat16 *to = a.out + int64_t(row) * a.out_stride + tile * S::COLUMNS + column;
            store_pair(to, total.x + __low2float(residual[n][0]), total.y + __high2float(residual[n][0]));
            store_pair(to + 2, total.z + __low2float(residual[n][1]), total.w + __high2float(residual[n][1]));
        }
    }
}

}  // namespace
