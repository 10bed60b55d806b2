// A mistake on purpose: the data goes to the host and back, and the host computes.
#include "silu.h"

#include <cuda_runtime.h>

#include <cmath>
#include <vector>

void silu(float *input, float *output, int n) {
    std::vector<float> x(n);
    cudaMemcpy(x.data(), input, n * sizeof(float), cudaMemcpyDeviceToHost);
    for (float &v : x) {
        v = v / (1.0f + std::exp(-v));
    }
    cudaMemcpy(output, x.data(), n * sizeof(float), cudaMemcpyHostToDevice);
}
