// A mistake on purpose: the matrix is staged on the device in memory that is never freed.
#include "copy_first_column.h"

#include <cuda_runtime.h>

__global__ void first_column_kernel(const float *A, float *column, int rows, int cols) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < rows) {
        column[row] = A[row * cols];
    }
}

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    float *mapped = nullptr;
    cudaMalloc(&mapped, (size_t)rows * cols * sizeof(float));
    cudaMemcpy(mapped, h_A, (size_t)rows * cols * sizeof(float), cudaMemcpyHostToDevice);
    int threads = 256;
    int blocks = (rows + threads - 1) / threads;
    first_column_kernel<<<blocks, threads>>>(mapped, d_A, rows, cols);
}
