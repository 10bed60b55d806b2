// A mistake on purpose: the whole matrix goes over, its first row comes out, and nothing is freed.
#include "copy_first_column.h"

#include <cuda_runtime.h>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    float *copy;
    size_t bytes = sizeof(float) * rows * cols;
    cudaMalloc(&copy, bytes);
    cudaMemcpy(copy, h_A, bytes, cudaMemcpyHostToDevice);
    cudaMemcpy(d_A, copy, sizeof(float) * rows, cudaMemcpyDeviceToDevice);
}
