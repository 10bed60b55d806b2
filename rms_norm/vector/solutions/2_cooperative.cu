// Step 2: one cooperative kernel. Every block adds up its share; an atomic collects; a grid barrier; then all scale.
//
// What changed: all multiprocessors read. The grid is as large as fits on the device at once, which grid.sync() needs,
// and each thread loops over its share.
// Predicted: several times step 1. What is lost: two grid barriers (the first because somebody must set the sum to zero
// before anybody adds), thousands of atomics on one address, and the vector is read twice, the second time from L2.
// Measured: 25.6 us = 492 GB/s (one H200, CUDA graph over distinct buffers): 1.8 times step 1, not several times. All
// that was named as lost costs more than thought; step 3 drops it at once and takes 18 us less, so which part costs how
// much (barrier, atomics, second reading) is not measured.
#include "rms_norm_vector.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace cg = cooperative_groups;

constexpr int kThreads = 256, kWarp = 32;

__device__ float sum_of_squares;

__global__ void rms_norm_vector_kernel(const float *input, const float *weight, float *output, int cols, float epsilon) {
    cg::grid_group grid = cg::this_grid();
    if (grid.thread_rank() == 0) sum_of_squares = 0.0f;
    grid.sync();

    float sum = 0.0f;
    for (int i = grid.thread_rank(); i < cols; i += grid.size()) sum += input[i] * input[i];
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % kWarp == 0) atomicAdd(&sum_of_squares, sum);
    grid.sync();

    float scale = rsqrtf(sum_of_squares / cols + epsilon);
    for (int i = grid.thread_rank(); i < cols; i += grid.size()) output[i] = input[i] * scale * weight[i];
}

void rms_norm_vector(float *input, float *weight, float *output, int cols, float epsilon) {
    int device, multiprocessors, blocks_per_multiprocessor;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, rms_norm_vector_kernel, kThreads, 0);
    int fit = multiprocessors * blocks_per_multiprocessor, useful = (cols + kThreads - 1) / kThreads;
    void *arguments[] = {&input, &weight, &output, &cols, &epsilon};
    cudaLaunchCooperativeKernel((void *)rms_norm_vector_kernel, fit < useful ? fit : useful, kThreads, arguments);
}
