// A mistake on purpose: the array of arguments is one short.
#include "rms_norm_vector.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace cg = cooperative_groups;

constexpr int kThreads = 256;

__device__ float total;

__global__ void rms_norm_vector_kernel(const float *input, const float *weight, float *output, int cols, float epsilon) {
    __shared__ float sums[kThreads];
    cg::grid_group grid = cg::this_grid();
    int tid = threadIdx.x;
    if (grid.thread_rank() == 0) {
        total = 0.0f;
    }
    grid.sync();

    float sum = 0.0f;
    for (int i = grid.thread_rank(); i < cols; i += grid.size()) {
        sum += input[i] * input[i];
    }
    sums[tid] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (tid < half) {
            sums[tid] += sums[tid + half];
        }
        __syncthreads();
    }
    if (tid == 0) {
        atomicAdd(&total, sums[0]);
    }
    grid.sync();

    float scale = rsqrtf(total / cols + epsilon);
    for (int i = grid.thread_rank(); i < cols; i += grid.size()) {
        output[i] = input[i] * scale * weight[i];
    }
}

void rms_norm_vector(float *input, float *weight, float *output, int cols, float epsilon) {
    int device = 0, multiprocessors = 0, per_multiprocessor = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, rms_norm_vector_kernel, kThreads, 0);
    int blocks = multiprocessors * per_multiprocessor;
    void *arguments[] = {&input, &weight, &output, &cols};
    cudaLaunchCooperativeKernel((void *)rms_norm_vector_kernel, blocks, kThreads, arguments);
}
