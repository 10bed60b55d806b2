// A mistake on purpose: float4 from the second element on.
#include "silu.h"

#include <cuda_runtime.h>

__global__ void silu_kernel(const float *input, float *output, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i == 0 && n > 8) {
        float4 v = *reinterpret_cast<const float4 *>(input + 1);
        output[1] = v.x;
    }
    if (i < n) {
        float x = input[i];
        output[i] = x / (1.0f + expf(-x));
    }
}

void silu(float *input, float *output, int n) {
    int threads = 256;
    int blocks = (n + threads - 1) / threads;
    silu_kernel<<<blocks, threads>>>(input, output, n);
}
