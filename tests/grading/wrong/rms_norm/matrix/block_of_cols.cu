// A mistake on purpose: the block has as many threads as the row has columns.
#include "rms_norm_matrix.h"

#include <cuda_runtime.h>

constexpr int kThreads = 256;

__global__ void rms_norm_matrix_kernel(const float *input, const float *weight, float *output, int rows, int cols,
                                       float epsilon) {
    __shared__ float sums[1024];
    int row = blockIdx.x;
    int tid = threadIdx.x;
    const float *x = input + static_cast<size_t>(row) * cols;
    float *y = output + static_cast<size_t>(row) * cols;

    float sum = 0.0f;
    for (int c = tid; c < cols; c += blockDim.x) {
        sum += x[c] * x[c];
    }
    sums[tid] = sum;
    __syncthreads();
    if (tid == 0) {
        for (int i = 1; i < blockDim.x; ++i) {
            sums[0] += sums[i];
        }
    }
    __syncthreads();
    float scale = rsqrtf(sums[0] / cols + epsilon);
    for (int c = tid; c < cols; c += blockDim.x) {
        y[c] = x[c] * scale * weight[c];
    }
}

void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon) {
    rms_norm_matrix_kernel<<<rows, cols>>>(input, weight, output, rows, cols, epsilon);
}
