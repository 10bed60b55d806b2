// Lab: SiLU in CUDA. Fill in the TODOs, then grade:  python silu/CUDA/grade.py
//
//     output[i] = input[i] * sigmoid(input[i]),   sigmoid(x) = 1 / (1 + exp(-x)),   for 0 <= i < n
//
// input and output are device pointers to n floats. Any n >= 1 must work. The call must not change its input.
// README.md in this folder has the idea, a figure, and how it is graded.
#include "silu.h"

#include <cuda_runtime.h>

__global__ void silu_kernel(const float *input, float *output, int n) {
    // TODO 2: which element is this thread's? Is there one?
    // TODO 3: compute it. What does your formula give for x = 100, and for x = -100?
}

void silu(float *input, float *output, int n) {
    // TODO 1: launch the kernel with a thread for every element, also when n is no multiple of the block.
    // TODO 4: it is right: now make it fast. README.md says what limits it.
}
