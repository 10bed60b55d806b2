// A mistake on purpose: a loop on the host over device pointers.
#include "silu.h"

#include <cuda_runtime.h>

__global__ void silu_kernel(const float *input, float *output, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        float x = input[i];
        output[i] = x / (1.0f + expf(-x));
    }
}

void silu(float *input, float *output, int n) {
    for (int i = 0; i < n; ++i) {
        output[i] = input[i] / (1.0f + expf(-input[i]));
    }
}
