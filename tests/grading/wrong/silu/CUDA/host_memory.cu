// A mistake on purpose: the kernel writes to memory of malloc, which only the host can reach.
#include "silu.h"

#include <cstdlib>
#include <cuda_runtime.h>

__global__ void silu_kernel(const float *input, float *output, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        output[i] = input[i] / (1.0f + expf(-input[i]));
    }
}

void silu(float *input, float *output, int n) {
    float *result = static_cast<float *>(malloc(n * sizeof(float)));
    silu_kernel<<<(n + 255) / 256, 256>>>(input, result, n);
    cudaMemcpy(output, result, n * sizeof(float), cudaMemcpyHostToDevice);
    free(result);
}
