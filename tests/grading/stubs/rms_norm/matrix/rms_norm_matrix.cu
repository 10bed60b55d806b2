// Lab: RMSNorm over the rows of a matrix. Fill in the TODOs, then grade:  python rms_norm/matrix/grade.py
//
// For each row of `input` (row-major, rows x cols):
//
//     output[row][c] = input[row][c] / sqrt(mean over the row of input^2 + epsilon) * weight[c]
//
// input, weight and output are device pointers. Any rows, cols >= 1 must work. The call must not change its inputs.
// README.md in this folder has the idea, a figure, and how it is graded.
#include "rms_norm_matrix.h"

#include <cuda_runtime.h>

__global__ void rms_norm_matrix_kernel(const float *input, const float *weight, float *output, int rows, int cols,
                                       float epsilon) {
    // TODO 2: which row is this block's? Let each thread add up the squares of its share of the row
    //         (threadIdx.x, threadIdx.x + blockDim.x, ...).
    // TODO 3: add the threads' sums: in shared memory, halving the number of adders each step, with a
    //         __syncthreads() between steps; or with warp shuffles.
    // TODO 4: let every thread scale its share of the row by 1 / sqrt(sum / cols + epsilon), times weight.
}

void rms_norm_matrix(float *input, float *weight, float *output, int rows, int cols, float epsilon) {
    // TODO 1: launch the kernel, one block a row. How many threads does a block get?
    // TODO 5: it is right: now make it fast. README.md says what limits it.
}
