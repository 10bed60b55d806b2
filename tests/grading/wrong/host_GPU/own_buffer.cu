// A mistake on purpose: the function allocates a buffer of its own.
#include "copy_first_column.h"

#include <cuda_runtime.h>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    cudaMalloc(&d_A, rows * sizeof(float));
    for (int r = 0; r < rows; ++r) {
        cudaMemcpy(d_A + r, h_A + r * cols, sizeof(float), cudaMemcpyHostToDevice);
    }
}
