// A mistake on purpose: a pointer to floats moves by elements, and bytes are added to it.
#include "copy_first_column.h"

#include <cuda_runtime.h>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
        cudaMemcpy(d_A + r * sizeof(float), h_A + r * cols, sizeof(float), cudaMemcpyHostToDevice);
    }
}
