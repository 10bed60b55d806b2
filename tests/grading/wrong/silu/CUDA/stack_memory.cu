// A mistake on purpose: the kernel gets a local array of the host's.
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
    float copy[n];
    cudaMemcpy(copy, input, n * sizeof(float), cudaMemcpyDeviceToHost);
    int threads = 256;
    int blocks = (n + threads - 1) / threads;
    silu_kernel<<<blocks, threads>>>(copy, output, n);
}
