// Step 3: read everything once, early, in 16-byte loads; one grid barrier; no atomics.
//
// What changed: a thread loads its part of the vector and of the weight into registers before anything else, so the
// weight arrives while the sums are being made and the barrier is waited for; each block leaves its sum in its own
// place, where nobody has to zero it, and after the barrier every block adds up all of them in the same order (so the
// result is the same in every run). One block of 1024 threads a multiprocessor: the fewer blocks, the quicker the
// barrier.
// Predicted: above 1,000 GB/s at 2^20 floats (12 MiB in under 12.6 us), far below the copy's speed. The bytes
// themselves take 3 us; the limit is latency: starting a cooperative kernel, one load from memory, the grid barrier,
// one load of the sums, one store, none of which overlap.
// Measured: 7.42 us = 1,697 GB/s (one H200, CUDA graph over distinct buffers), 3.5 times step 2 and better than
// predicted; torch.compile took 9.17 us, a copy of as many bytes 4.59 us. So 2.8 us are what the chain of waits costs
// beyond a copy; how they divide is not measured.
#include "rms_norm_vector.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace cg = cooperative_groups;

constexpr int kThreads = 1024, kWarp = 32, kMostBlocks = 1024;

__device__ float sum_of_block[kMostBlocks];

__device__ float warp_sum(float value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// The sum over the grid, in every thread.
__device__ float grid_sum(cg::grid_group grid, float value) {
    __shared__ float of_warp[kWarp];
    value = warp_sum(value);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    if (threadIdx.x < kWarp) {
        value = warp_sum(of_warp[threadIdx.x]);
        if (threadIdx.x == 0) sum_of_block[blockIdx.x] = value;
    }
    grid.sync();
    value = 0.0f;
    for (int block = threadIdx.x % kWarp; block < gridDim.x; block += kWarp) value += sum_of_block[block];
    return warp_sum(value);  // each warp for itself: no further barrier
}

template <int kVectors>
__global__ void __launch_bounds__(kThreads, 1)
    one_pass_kernel(const float *input, const float *weight, float *output, int cols, float epsilon) {
    cg::grid_group grid = cg::this_grid();
    const float4 *x = reinterpret_cast<const float4 *>(input), *w = reinterpret_cast<const float4 *>(weight);
    float4 *y = reinterpret_cast<float4 *>(output);
    int first = blockIdx.x * kThreads + threadIdx.x, stride = gridDim.x * kThreads, vectors = cols / 4;
    int last = vectors * 4 + first;  // the elements after the last whole vector: one each for the first threads
    float4 mine[kVectors], scale_by[kVectors];
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) mine[i] = first + i * stride < vectors ? __ldcs(&x[first + i * stride]) : zero;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) scale_by[i] = first + i * stride < vectors ? __ldcs(&w[first + i * stride]) : zero;
    float rest = last < cols ? input[last] : 0.0f;

    float sum = rest * rest;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
        sum += mine[i].x * mine[i].x + mine[i].y * mine[i].y + mine[i].z * mine[i].z + mine[i].w * mine[i].w;
    float scale = rsqrtf(grid_sum(grid, sum) / cols + epsilon);

#pragma unroll
    for (int i = 0; i < kVectors; ++i)
        if (first + i * stride < vectors)
            __stcs(&y[first + i * stride],
                   make_float4(mine[i].x * scale * scale_by[i].x, mine[i].y * scale * scale_by[i].y,
                               mine[i].z * scale * scale_by[i].z, mine[i].w * scale * scale_by[i].w));
    if (last < cols) output[last] = rest * scale * weight[last];
}

// For vectors that do not fit in the registers of the device, or that do not start at a multiple of 16 bytes.
__global__ void __launch_bounds__(kThreads, 1)
    two_pass_kernel(const float *input, const float *weight, float *output, int cols, float epsilon) {
    cg::grid_group grid = cg::this_grid();
    float sum = 0.0f;
    for (size_t i = grid.thread_rank(); i < cols; i += grid.size()) sum += input[i] * input[i];
    float scale = rsqrtf(grid_sum(grid, sum) / cols + epsilon);
    for (size_t i = grid.thread_rank(); i < cols; i += grid.size()) output[i] = input[i] * scale * weight[i];
}

static bool aligned(const void *pointer) { return reinterpret_cast<size_t>(pointer) % sizeof(float4) == 0; }

static int count_multiprocessors() {
    int device, count;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count < kMostBlocks ? count : kMostBlocks;
}

void rms_norm_vector(float *input, float *weight, float *output, int cols, float epsilon) {
    static const int multiprocessors = count_multiprocessors();  // asked once: the call itself takes microseconds
    int vectors = cols / 4, useful = (vectors + kThreads - 1) / kThreads;
    int blocks = useful < 1 ? 1 : useful < multiprocessors ? useful : multiprocessors;
    int a_thread = (vectors + blocks * kThreads - 1) / (blocks * kThreads);
    bool whole_vectors = aligned(input) && aligned(weight) && aligned(output);
    void *arguments[] = {&input, &weight, &output, &cols, &epsilon};
    if (!whole_vectors || a_thread > 4)
        cudaLaunchCooperativeKernel((void *)two_pass_kernel, multiprocessors, kThreads, arguments);
    else if (a_thread <= 1)
        cudaLaunchCooperativeKernel((void *)one_pass_kernel<1>, blocks, kThreads, arguments);
    else if (a_thread == 2)
        cudaLaunchCooperativeKernel((void *)one_pass_kernel<2>, blocks, kThreads, arguments);
    else
        cudaLaunchCooperativeKernel((void *)one_pass_kernel<4>, blocks, kThreads, arguments);
}
