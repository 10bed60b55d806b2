// Products of 2 to 256 rows on Hopper: out[T, N] = x[T, K] W[N, K]^T, bfloat16, sums in float32.
//
// What limits a product of this size is neither the matrix units nor the memory but what lies between them: a block
// that computes all T rows for a few rows of W needs all of x, and 132 of them reading 2 MB each ask more of L2 than it
// gives.
// So the blocks of a cluster share: each loads its part of the x tile and the copy engine writes it into the shared
// memory of all of them (multicast). Where W has too few rows to occupy every multiprocessor, the blocks of a cluster
// also divide K, and add their parts through each other's shared memory.
//
// The last warp asks for tiles (TMA, a ring of STAGES buffers with a full and an empty barrier each); the warpgroups
// before it multiply them (wgmma: x is the operand of 64 rows, W that of N columns) and keep the sums in registers.
// Blocks are persistent: while one tile is stored, the next one is on its way.
//
// Built by common/kernels/hopper_gemm.py; `tests/gpu/test_hopper_gemm.py` holds it against float64.
// A tile's shape stands in hopper_tile.cuh, what becomes of its sums in hopper_store.cuh, the instructions in
// hopper_ptx.cuh.

#include <cuda.h>
#include <cuda_runtime.h>

#include "hopper_store.cuh"
#include "hopper_tile.cuh"

namespace {

struct Ring {
    int stages, stage = 0, parity = 0;
    __device__ void advance() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// Rows of W that a tile needs, as boxes: one, or for SILU a gate and an up box for each warpgroup side by side.
template <class S>
__device__ void load_w(const CUtensorMap *map, uint32_t to, uint32_t barrier, int k, int tile, int outputs) {
    if constexpr (S::SILU) {
        constexpr int HALF = S::NW / 2;
        for (int i = 0; i < S::WN; ++i) {
            const int row = tile * (S::COLUMNS / 2) + i * HALF;
            load_box(map, to + (2 * i) * HALF * ROW_BYTES, barrier, k, row);
            load_box(map, to + (2 * i + 1) * HALF * ROW_BYTES, barrier, k, outputs + row);
        }
    } else {
        load_box(map, to, barrier, k, tile * S::COLUMNS);
    }
}

// The thread that asks for tiles. A stage's barrier waits for rows of W and for the x of all who share it.
template <class S> struct Producer {
    const CUtensorMap *x_map, *w_map;
    const Arguments &a;
    const Place &place;
    uint32_t buffers, full, empty;

    // Blocks of K whose weights are asked for before anything else. Not as many as have room: x would then come after all
    // of them, and nothing be on its way when the products begin.
    __device__ int ahead() const { return min((S::STAGES + 1) / 2, place.last_k - place.first_k); }

    __device__ uint32_t buffer(int stage) const { return buffers + stage * (S::X_BYTES + S::W_BYTES); }

    __device__ void ask_for_w(int stage, int group, int k) const {
        arrive_expecting(full + 8 * stage, a.sharers * a.x_box_rows * ROW_BYTES + S::W_BYTES);
        load_w<S>(w_map, buffer(stage) + S::X_BYTES, full + 8 * stage, k * BLOCK_K, group * a.sharers + place.sharer,
                  a.outputs);
    }

    __device__ void ask_for_x(int stage, int k) const {
        const uint16_t mask = uint16_t(((1 << a.sharers) - 1) << (place.part * a.sharers));
        const int row = place.sharer * a.x_box_rows;
        load_box_for(x_map, buffer(stage) + row * ROW_BYTES, full + 8 * stage, k * BLOCK_K, row, mask);
    }

    // The first weights: they depend on no earlier kernel, and no other block takes part in them.
    __device__ void begin() const {
        prefetch_map(x_map);
        for (int i = 0; i < ahead(); ++i) ask_for_w(i, place.first_group, place.first_k + i);
    }

    __device__ void run() const {
        Ring ring{S::STAGES};
        wait_for_earlier_kernels();
        int k = place.first_k;
        for (const int first = k + ahead(); k < first; ++k, ring.advance()) ask_for_x(ring.stage, k);
        for (int group = place.first_group; group < place.groups; group += place.num_clusters, k = place.first_k)
            for (; k < place.last_k; ++k, ring.advance()) {
                wait_for(empty + 8 * ring.stage, ring.parity ^ 1);
                ask_for_w(ring.stage, group, k);
                ask_for_x(ring.stage, k);
            }
    }
};

// Multiplies one tile's blocks of K; buffers are given back one block late, when their products are known to be done.
template <class S>
__device__ void multiply(float (&sums)[S::MI][S::NW / 2], const Arguments &a, const Place &place, Ring &ring,
                         uint32_t buffers, uint32_t full, uint32_t empty) {
    const int group = threadIdx.x / 128, below = group % S::WM, beside = group / S::WM;
    const int thread = threadIdx.x % 128;
    int previous = -1;
    auto give_back = [&](int stage) {
        if (thread < a.sharers) arrive_at(empty + 8 * stage, place.part * a.sharers + thread);
    };
    for (int k = place.first_k; k < place.last_k; ++k, ring.advance()) {
        wait_for(full + 8 * ring.stage, ring.parity);
        const uint32_t x = buffers + ring.stage * (S::X_BYTES + S::W_BYTES) + below * S::MI * 64 * ROW_BYTES;
        const uint32_t w = buffers + ring.stage * (S::X_BYTES + S::W_BYTES) + S::X_BYTES + beside * S::NW * ROW_BYTES;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < BLOCK_K / 16; ++step)
#pragma unroll
            for (int m = 0; m < S::MI; ++m)
                Wgmma<S::NW>::run(sums[m], descriptor(x + m * 64 * ROW_BYTES) + 2 * step, descriptor(w) + 2 * step,
                                  k > place.first_k || step > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (previous >= 0) give_back(previous);
        previous = ring.stage;
    }
    wgmma_wait<0>();
    if (previous >= 0) give_back(previous);
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1)
    hopper_gemm(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                const __grid_constant__ Arguments a) {
    extern __shared__ uint8_t raw[];
    uint8_t *aligned = raw + (ALIGNMENT - shared_address(raw) % ALIGNMENT) % ALIGNMENT;
    const uint32_t buffers = shared_address(aligned);
    const uint32_t full = buffers + S::STAGES * (S::X_BYTES + S::W_BYTES), empty = full + 8 * S::STAGES;
    let_dependents_start();
    constexpr int OUTPUTS = S::SILU ? S::COLUMNS / 2 : S::COLUMNS, PRODUCER = 128 * S::CONSUMERS;
    const Place place(a, OUTPUTS);
    const Producer<S> producer{&x_map, &w_map, a, place, buffers, full, empty};
    if (threadIdx.x == PRODUCER) {
        for (int i = 0; i < S::STAGES; ++i) {
            init_barrier(full + 8 * i, 1);
            init_barrier(empty + 8 * i, a.sharers * S::CONSUMERS);
        }
        show_barriers_to_cluster();
        producer.begin();
    }
    __syncwarp();
    meet_cluster();  // no block may write to another whose barriers are not yet there

    if (threadIdx.x >= PRODUCER) {
        if (threadIdx.x == PRODUCER) producer.run();
        __syncwarp();
        if (a.parts > 1) sync_cluster();
    } else {
        wait_for_earlier_kernels();  // the residual is another kernel's, and so may `out` be
        Ring ring{S::STAGES};
        float sums[S::MI][S::NW / 2];
        for (int group = place.first_group; group < place.groups; group += place.num_clusters) {
            const int tile = group * a.sharers + place.sharer;
            multiply<S>(sums, a, place, ring, buffers, full, empty);
            if (S::SILU || a.parts == 1) {
                store_tile<S>(sums, a, tile);
            } else {
                // One tile a cluster (the host sees to it), so nothing more comes into the ring's memory.
                sync_threads_of<128 * S::CONSUMERS>();
                keep_sums<S>(sums, reinterpret_cast<float *>(aligned));
                sync_cluster();
                add_parts<S>(a, place, reinterpret_cast<float *>(aligned), tile);
                break;  // or the compiler would keep `sums` for a next tile
            }
        }
    }
    meet_cluster();  // no block may end while others still write to it, arrive at it or read from it
}

// ---------------------------------------------------------------- the host's side

using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                            const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode find_encode() {  // of the driver's library, which nothing here is linked with
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) !=
            cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
        return nullptr;
    return reinterpret_cast<Encode>(found);
}

// Boxes of [box_rows, BLOCK_K] from a row-major matrix [rows, columns]; outside it, zeros.
bool encode(CUtensorMap *map, const void *matrix, int rows, int columns, int64_t stride, int box_rows) {
    static const Encode encode_tiled = find_encode();
    const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
    const cuuint32_t box[2] = {BLOCK_K, cuuint32_t(box_rows)}, steps[2] = {1, 1};
    return encode_tiled &&
           encode_tiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(matrix), sizes, strides, box,
                        steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// How many clusters of a size run at once: not every multiprocessor can be in one. Asked once, the answer holds for the
// device.
template <class S> cudaError_t count_clusters(const cudaLaunchConfig_t &config, int size, int *count) {
    static int known[9] = {};
    if (!known[size]) {
        const auto kernel = hopper_gemm<S>;
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
        if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&known[size], kernel, &config);
        if (error != cudaSuccess) return error;
    }
    *count = known[size];
    return cudaSuccess;
}

template <class S>
int launch(const void *x, int64_t x_stride, const void *w, int64_t w_stride, const Arguments &a, cudaStream_t stream) {
    constexpr int OUTPUTS = S::SILU ? S::COLUMNS / 2 : S::COLUMNS;
    // A part of K without a block would leave its sums undefined.
    if (a.parts * BLOCK_K > a.features + BLOCK_K - 1) return cudaErrorInvalidValue;
    const int size = a.sharers * a.parts, tiles = (a.outputs + OUTPUTS - 1) / OUTPUTS;
    const int groups = (tiles + a.sharers - 1) / a.sharers;
    if (size > 8 || a.parts > MOST_PARTS || (S::SILU && a.parts > 1) || a.rows > S::ROWS)
        return cudaErrorInvalidValue;

    CUtensorMap x_map, w_map;
    if (!encode(&x_map, x, a.rows, a.features, x_stride, a.x_box_rows) ||
        !encode(&w_map, w, S::SILU ? 2 * a.outputs : a.outputs, a.features, w_stride, S::SILU ? S::NW / 2 : S::COLUMNS))
        return cudaErrorInvalidValue;

    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(size), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(S::THREADS);
    config.dynamicSmemBytes = SHARED_BYTES;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 1;
    config.gridDim = dim3(unsigned(size));

    int most_clusters = 0;
    if (const cudaError_t error = count_clusters<S>(config, size, &most_clusters)) return error;
    if (!most_clusters) return cudaErrorInvalidConfiguration;
    const int clusters = a.parts > 1 ? groups : min(groups, most_clusters);
    config.gridDim = dim3(unsigned(clusters * size));
    config.numAttrs = 2;
    return cudaLaunchKernelEx(&config, hopper_gemm<S>, x_map, w_map, a);
}

}  // namespace

// Returns a cudaError_t, 0 where all is well. columns: rows of W a tile has; residual may be null; strides in elements.
// silu: W is [2 N, K], gate rows first, and out = silu(gate) * up. Contiguous rows, 16-byte aligned; K a multiple of 8.
extern "C" int tlab_hopper_gemm(const void *x, int64_t x_stride, const void *w, int64_t w_stride, const void *residual,
                                int residual_stride, void *out, int out_stride, int rows, int outputs, int features,
                                int silu, int columns, int sharers, int parts, void *stream) {
    const int box_rows = ((rows + sharers - 1) / sharers + 7) / 8 * 8;
    const Arguments a{static_cast<const __nv_bfloat16 *>(residual),
                      static_cast<__nv_bfloat16 *>(out),
                      rows,
                      outputs,
                      features,
                      residual_stride,
                      out_stride,
                      sharers,
                      parts,
                      box_rows};
    const auto s = static_cast<cudaStream_t>(stream);
#define TRY(MOST_ROWS, WM, WN, MI, NW, SILU) \
    if (rows <= MOST_ROWS && columns == NW * WN && bool(silu) == SILU) \
        return launch<Tile<WM, WN, MI, NW, SILU>>(x, x_stride, w, w_stride, a, s);
    TRY(64, 1, 2, 1, 112, true)
    TRY(64, 1, 2, 1, 64, false)
    TRY(64, 1, 2, 1, 48, false)
    TRY(64, 1, 2, 1, 32, false)
    TRY(128, 2, 1, 1, 224, true)
    TRY(128, 2, 1, 1, 144, false)
    TRY(128, 2, 1, 1, 128, false)
    TRY(128, 2, 1, 1, 112, false)
    TRY(128, 2, 1, 1, 96, false)
    TRY(192, 3, 1, 1, 112, true)
    TRY(192, 3, 1, 1, 144, false)
    TRY(192, 3, 1, 1, 128, false)
    TRY(192, 3, 1, 1, 112, false)
    TRY(192, 3, 1, 1, 96, false)
    TRY(256, 2, 1, 2, 112, true)
    TRY(256, 2, 1, 2, 128, false)
    TRY(256, 2, 1, 2, 112, false)
    TRY(256, 2, 1, 2, 96, false)
#undef TRY
    return cudaErrorInvalidValue;
}

// How many clusters of `size` blocks run at once on the current device; 0 where it cannot be told.
extern "C" int tlab_hopper_clusters(int size) {
    using S = Tile<1, 2, 1, 64, false>;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(size), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(size));
    config.blockDim = dim3(S::THREADS);
    config.dynamicSmemBytes = SHARED_BYTES;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int count = 0;
    return count_clusters<S>(config, size, &count) == cudaSuccess ? count : 0;
}
