// A mistake on purpose: the whole matrix is copied into the column.
#include "copy_first_column.h"

#include <cuda_runtime.h>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    cudaMemcpy(d_A, h_A, (size_t)rows * cols * sizeof(float), cudaMemcpyHostToDevice);
}
