// A mistake on purpose: the last column.
#include "copy_first_column.h"

#include <cuda_runtime.h>

__global__ void first_column_kernel(const float *A, float *column, int rows, int cols) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < rows) {
        column[row] = A[row * cols + cols - 1];
    }
}

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    float *mapped = nullptr;
    cudaHostGetDevicePointer(&mapped, h_A, 0);
    int threads = 256;
    int blocks = (rows + threads - 1) / threads;
    first_column_kernel<<<blocks, threads>>>(mapped, d_A, rows, cols);
}
