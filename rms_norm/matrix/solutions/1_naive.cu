// Step 1: one thread a row. Right, and the slowest thing that uses the GPU at all.
//
// Predicted: far from the copy's speed. Neighbouring threads read addresses a whole row apart, so each 32-byte sector
// that is fetched serves one float, and a matrix of 8192 rows keeps only 8192 threads busy, where an H200 has room for
// 270,336.
// Measured: 1,683 us = 319 GB/s (one H200, CUDA graph over distinct buffers), 8 % of the copy; the course asks for 300.
// As predicted; which of the two reasons it is, the time does not tell. If each sector served one float, 6.4 GB would
// move, 1.5 ms at the copy's speed. If it served all eight (the sectors of 64 threads fit in L1), a thread waited 0.8 us
// for each sector, about a trip to memory. A profile would tell. In an earlier run the graph took 2,115 us (254 GB/s)
// and a single launch 1,707; why is not known. A single launch of this run took 1,693.
#include "rms_norm_matrix.h"

#include <cuda_runtime.h>

__global__ void rms_norm_matrix_kernel(const float *input, const float *weight, float *output, int rows, int cols,
                                       float epsilon) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const float *x = input + static_cast<size_t>(row) * cols;
    float *y = output + static_cast<size_t>(row) * cols;
    float sum = 0.0f;
    for (int c = 0; c < cols; ++c) sum += x[c] * x[c];
    float scale = rsqrtf(sum / cols + epsilon);
    for (int c = 0; c < cols; ++c) y[c] = x[c] * scale * weight[c];
}

void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon) {
    constexpr int kThreads = 64;
    rms_norm_matrix_kernel<<<(rows + kThreads - 1) / kThreads, kThreads>>>(input, weight, output, rows, cols, epsilon);
}
