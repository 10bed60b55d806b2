// A mistake on purpose: source and target are exchanged.
#include "copy_first_column.h"

#include <cuda_runtime.h>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    cudaMemcpy2D(h_A, cols * sizeof(float), d_A, sizeof(float), sizeof(float), rows, cudaMemcpyHostToDevice);
}
