// A mistake on purpose: float4 loads, also of rows that do not start at a multiple of 16 bytes.
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
    const float4 *x4 = reinterpret_cast<const float4 *>(x);
    for (int c = tid; c < cols / 4; c += kThreads) {
        float4 v = x4[c];
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    for (int c = cols / 4 * 4 + tid; c < cols; c += kThreads) {
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
    float scale = rsqrtf(sums[0] / cols + epsilon);
    for (int c = tid; c < cols; c += kThreads) {
        y[c] = x[c] * scale * weight[c];
    }
}

void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon) {
    rms_norm_matrix_kernel<<<rows, kThreads>>>(input, weight, output, rows, cols, epsilon);
}
