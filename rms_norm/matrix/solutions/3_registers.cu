// Step 3: read each row once, 16 bytes a load, and keep it in registers until its scale is known.
//
// What changed: a thread issues all its loads (float4, four of them for 8192 columns) before it uses any, so a block
// has the whole row in flight; sums are added with warp shuffles, which need one barrier instead of eight; the second
// reading of the row is gone.
// Predicted: the speed of a copy of the same bytes, within a few percent. The limit is memory: 8192 x 8192 floats in
// and out are 512 MiB, and there is one multiplication or two a float. What keeps it from the copy: each block waits
// once for its slowest load before it can write, and only the other blocks of the multiprocessor fill that gap.
// Measured: 132.2 us = 4,060 GB/s (one H200, CUDA graph over distinct buffers), 96.2 % of the copy (127.2 us);
// torch.compile took 128.3 us beside it, Liger 130.3. In an earlier run, with streaming hints (__ldcs, __stcs) that
// were meant to keep the weight in the cache, it took 135.6 us; without them about 129 were predicted, and half of that
// came. How much of it is the hints' is open: between the runs torch.compile and Liger lost 0.5 us, but a streamed copy
// 3.2. Nor is it measured whether the 5 us that are left are the one wait of each block. Time both in one run.
//
// Rows whose length is no multiple of 4 (a float4 needs an address that is a multiple of 16), or too long for the
// registers of a block, take the loop of step 2, with shuffles.
#include "rms_norm_matrix.h"

#include <cuda_runtime.h>

constexpr int kWarp = 32;

// The sum over all threads of the block, in every thread.
__device__ float block_sum(float value) {
    __shared__ float of_warp[kWarp];
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    // Each warp adds the warps' sums itself: no second barrier.
    value = threadIdx.x % kWarp < blockDim.x / kWarp ? of_warp[threadIdx.x % kWarp] : 0.0f;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

template <int kVectors>
__global__ void one_pass_kernel(const float4 *input, const float4 *weight, float4 *output, int vectors, float epsilon) {
    const float4 *x = input + static_cast<size_t>(blockIdx.x) * vectors;
    float4 *y = output + static_cast<size_t>(blockIdx.x) * vectors;
    float4 row[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        int c = threadIdx.x + i * blockDim.x;
        row[i] = c < vectors ? x[c] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
        sum += row[i].x * row[i].x + row[i].y * row[i].y + row[i].z * row[i].z + row[i].w * row[i].w;
    float scale = rsqrtf(block_sum(sum) / (4.0f * vectors) + epsilon);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        int c = threadIdx.x + i * blockDim.x;
        if (c < vectors) {
            float4 w = __ldg(&weight[c]);
            y[c] = make_float4(row[i].x * scale * w.x, row[i].y * scale * w.y, row[i].z * scale * w.z,
                               row[i].w * scale * w.w);
        }
    }
}

__global__ void two_pass_kernel(const float *input, const float *weight, float *output, int cols, float epsilon) {
    const float *x = input + static_cast<size_t>(blockIdx.x) * cols;
    float *y = output + static_cast<size_t>(blockIdx.x) * cols;
    float sum = 0.0f;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) sum += x[c] * x[c];
    float scale = rsqrtf(block_sum(sum) / cols + epsilon);
    for (int c = threadIdx.x; c < cols; c += blockDim.x) y[c] = x[c] * scale * weight[c];
}

template <int kVectors>
void launch_one_pass(float *input, float *weight, float *output, int rows, int vectors, float epsilon) {
    int threads = (vectors + kVectors - 1) / kVectors;
    threads = (threads + kWarp - 1) / kWarp * kWarp;
    one_pass_kernel<kVectors><<<rows, threads>>>(reinterpret_cast<float4 *>(input), reinterpret_cast<float4 *>(weight),
                                                 reinterpret_cast<float4 *>(output), vectors, epsilon);
}

static bool aligned(const void *pointer) { return reinterpret_cast<size_t>(pointer) % sizeof(float4) == 0; }

void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon) {
    int vectors = cols / 4;
    bool whole_vectors = cols % 4 == 0 && aligned(input) && aligned(weight) && aligned(output);
    if (!whole_vectors || vectors > 1024 * 8) {
        int threads = cols >= 1024 ? 512 : 128;
        two_pass_kernel<<<rows, threads>>>(input, weight, output, cols, epsilon);
    } else if (vectors <= 256) {
        launch_one_pass<1>(input, weight, output, rows, vectors, epsilon);
    } else if (vectors <= 512 * 4) {
        launch_one_pass<4>(input, weight, output, rows, vectors, epsilon);
    } else {
        launch_one_pass<8>(input, weight, output, rows, vectors, epsilon);
    }
}
