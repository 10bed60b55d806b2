// What the parts of hopper_gemm.cu share: a tile's shape, what a launch is given, which part of it a block has.

#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "hopper_ptx.cuh"

namespace {

constexpr int BLOCK_K = 64;           // 64 bfloat16 are the 128 bytes that one row of a swizzled tile holds
constexpr int ROW_BYTES = 2 * BLOCK_K;
constexpr int SHARED_BYTES = 232448;  // what a block may have on compute capability 9.0
constexpr int BARRIER_BYTES = 256;    // room for 2 x 16 barriers
constexpr int MOST_PARTS = 4;         // that K is divided into
constexpr int ALIGNMENT = 1024;       // the swizzle's pattern repeats every 8 rows of 128 bytes

// WM warpgroups one below the other, each with MI blocks of 64 rows of x; WN side by side, each with NW rows of W.
template <int WM_, int WN_, int MI_, int NW_, bool SILU_> struct Tile {
    static constexpr int WM = WM_, WN = WN_, MI = MI_, NW = NW_;
    static constexpr bool SILU = SILU_;
    static constexpr int ROWS = 64 * WM * MI, COLUMNS = NW * WN;
    static constexpr int X_BYTES = ROWS * ROW_BYTES, W_BYTES = COLUMNS * ROW_BYTES;
    static constexpr int CONSUMERS = WM * WN, THREADS = 128 * CONSUMERS + 32;
    static constexpr int ROOM = (SHARED_BYTES - ALIGNMENT - BARRIER_BYTES) / (X_BYTES + W_BYTES);
    static constexpr int STAGES = ROOM < 8 ? ROOM : 8;
    // Sums of a tile as float32, in the memory of the ring once it is empty; 8 floats more keep banks apart.
    static constexpr int SUM_STRIDE = COLUMNS + 8;
    static_assert(STAGES >= 3 && ROWS * SUM_STRIDE * 4 <= STAGES * (X_BYTES + W_BYTES));
    static_assert(!SILU || NW % 16 == 0);
};

struct Arguments {
    const __nv_bfloat16 *residual;  // [T, N] or null
    __nv_bfloat16 *out;             // [T, N]
    int rows, outputs, features;    // T, N, K
    int residual_stride, out_stride;
    int sharers, parts;  // blocks of a cluster that share x; parts that K is divided into: sharers x parts blocks
    int x_box_rows;      // rows of x that each sharer loads, a multiple of 8
};

// Which part of the work a block has. A cluster's blocks: sharer 0, 1, ... of part 0, then of part 1, ...
struct Place {
    int sharer, part, first_group, groups, num_clusters, first_k, last_k;
    __device__ Place(const Arguments &a, int outputs_per_tile) {
        const int size = a.sharers * a.parts, rank = rank_in_cluster();
        sharer = rank % a.sharers;
        part = rank / a.sharers;
        first_group = blockIdx.x / size;
        num_clusters = gridDim.x / size;
        const int tiles = (a.outputs + outputs_per_tile - 1) / outputs_per_tile;
        groups = (tiles + a.sharers - 1) / a.sharers;
        const int blocks = (a.features + BLOCK_K - 1) / BLOCK_K;
        first_k = blocks * part / a.parts;
        last_k = blocks * (part + 1) / a.parts;
    }
};

}  // namespace
