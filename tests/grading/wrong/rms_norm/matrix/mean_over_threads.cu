// A mistake on purpose: the sum is divided by the number of threads.
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
    sums[tid] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (tid < half) {
            sums[tid] += sums[tid + half];
        }
        __syncthreads();
    }
    float scale = rsqrtf(sums[0] / blockDim.x + epsilon);
    for (int c = tid; c < cols; c += kThreads) {
        y[c] = x[c] * scale * weight[c];
    }
}

void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon) {
    rms_norm_matrix_kernel<<<rows, kThreads>>>(input, weight, output, rows, cols, epsilon);
}
