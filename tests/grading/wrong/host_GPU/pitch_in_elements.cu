// A mistake on purpose: the source pitch is in elements.
#include "copy_first_column.h"

#include <cuda_runtime.h>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    cudaMemcpy2D(d_A, sizeof(float), h_A, cols, sizeof(float), rows, cudaMemcpyHostToDevice);
}
