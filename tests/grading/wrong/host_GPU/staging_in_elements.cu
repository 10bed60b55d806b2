// A mistake on purpose: the copy's size is the number of elements.
#include "copy_first_column.h"

#include <cuda_runtime.h>

#include <vector>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    std::vector<float> column(rows);
    for (int r = 0; r < rows; ++r) {
        column[r] = h_A[r * cols];
    }
    cudaMemcpy(d_A, column.data(), rows, cudaMemcpyHostToDevice);
}
