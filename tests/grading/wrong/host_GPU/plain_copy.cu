// A mistake on purpose: a plain copy of the first `rows` floats.
#include "copy_first_column.h"

#include <cuda_runtime.h>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    cudaMemcpy(d_A, h_A, rows * sizeof(float), cudaMemcpyHostToDevice);
}
