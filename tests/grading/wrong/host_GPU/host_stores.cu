// A mistake on purpose: the host writes through the device pointer.
#include "copy_first_column.h"

#include <cuda_runtime.h>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    for (int r = 0; r < rows; ++r) {
        d_A[r] = h_A[r * cols];
    }
}
