// A mistake on purpose: a shuffle of width 16 stays within half a warp.
#include "rms_norm_matrix.h"

#include <cuda_runtime.h>

constexpr int kThreads = 256;

__global__ void rms_norm_matrix_kernel(const float *input, const float *weight, float *output, int rows, int cols,
                                       float epsilon) {
    __shared__ float sums[kThreads];
    int row = blockIdx.x;
    int tid = threadIdx.x;
    const float *x = input + static_cast<size_t>(row) * cols;
    float *y = output + static_cast<size_t>(row) * cols;

    float sum = 0.0f;
    for (int c = tid; c < cols; c += kThreads) {
        sum += x[c] * x[c];
    }
    if (tid == 0) {
        sums[0] = 0.0f;
    }
    __syncthreads();
    for (int step = 16; step > 0; step /= 2) {
        sum += __shfl_down_sync(0xffffffff, sum, step, 16);
    }
    if (tid % 32 == 0) atomicAdd(&sums[0], sum);
    __syncthreads();
    float scale = rsqrtf(sums[0] / cols + epsilon);
    for (int c = tid; c < cols; c += kThreads) {
        y[c] = x[c] * scale * weight[c];
    }
}

void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon) {
    rms_norm_matrix_kernel<<<rows, kThreads>>>(input, weight, output, rows, cols, epsilon);
}
