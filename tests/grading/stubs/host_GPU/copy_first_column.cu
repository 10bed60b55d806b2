// Lab: from the host to the GPU. Fill in the TODOs, then grade:  python host_GPU/grade.py
//
// h_A is a row-major host matrix (rows x cols). Copy its first column to the device: d_A[r] = h_A[r * cols], for
// 0 <= r < rows. The elements lie cols * 4 bytes apart, so most of the work is finding a way that does not move the
// whole matrix, and does not pay for each element on its own.
//
// h_A is page-locked and mapped (cudaHostRegisterMapped): the GPU can read it. d_A is device memory. The copy must be
// done when a cudaDeviceSynchronize() after the call returns. README.md in this folder has the idea, a figure, and how
// it is graded.
#include "copy_first_column.h"

#include <cuda_runtime.h>

void copy_first_column(float *h_A, float *d_A, int rows, int cols) {
    // TODO 1: one call of cudaMemcpy2D copies a column: what are its width, its height and its two pitches, in bytes?
    // TODO 2: time it with main.cu. How long would 8192 separate copies take? How long does the data itself need?
    // TODO 3: let a kernel read the host's memory through the pointer that cudaHostGetDevicePointer gives, one thread
    //         a row.
    // TODO 4: what limits the kernel now? README.md says what to try.
}
