// A mistake on purpose: the rest is done first, so the float4 that follow begin at no multiple of four elements.
#include "silu.h"

#include <cuda_runtime.h>

__device__ float silu_of(float x) { return x / (1.0f + expf(-x)); }

__global__ void silu_kernel(const float *input, float *output, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int rest = n % 4;
    if (i < rest) output[i] = silu_of(input[i]);
    if (i < n / 4) {
        float4 v = reinterpret_cast<const float4 *>(input + rest)[i];
        v.x = silu_of(v.x);
        v.y = silu_of(v.y);
        v.z = silu_of(v.z);
        v.w = silu_of(v.w);
        reinterpret_cast<float4 *>(output + rest)[i] = v;
    }
}

void silu(float *input, float *output, int n) {
    int threads = 256;
    int blocks = (n / 4 + threads) / threads;
    silu_kernel<<<blocks, threads>>>(input, output, n);
}
