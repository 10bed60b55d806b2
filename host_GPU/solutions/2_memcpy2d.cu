// Step 2: one strided copy. A column is a matrix of `rows` rows of 4 bytes, whose rows lie cols * 4 bytes apart.
//
// What changed: one call instead of 8192; the copy engine walks the rows itself.
// Predicted: a hundred times quicker than step 1, and still limited by the engine's handling of each 4-byte row, not by
// the bus: PCIe 5 moves 32 KiB in under a microsecond.
// Measured: 123.7 us (one H200, wall time, median of 100): 169 times quicker, 15 ns a row, and within the course's 150.
#include "copy_first_column.h"

#include <cuda_runtime.h>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    cudaMemcpy2D(d_A, sizeof(float), h_A, static_cast<size_t>(cols) * sizeof(float), sizeof(float), rows,
                 cudaMemcpyHostToDevice);
}
