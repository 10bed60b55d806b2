// Step 2: 16 bytes a load. A quarter of the threads, a quarter of the load and store instructions.
//
// What changed: a thread takes one float4; the last n % 4 elements are taken one by one by the first threads. expf became
// __expf, which is two instructions instead of eight and as good for this purpose: its error grows with |x|, but there
// the result is 0 or x.
// Predicted: a little above step 1; what is left is the same cause: one load in flight a thread.
// Measured: not yet.
#include "silu.h"

#include <cuda_runtime.h>

__device__ float silu_of(float x) { return x / (1.0f + __expf(-x)); }

__global__ void silu_kernel(const float *input, float *output, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, vectors = n / 4;
    if (i < vectors) {
        float4 x = reinterpret_cast<const float4 *>(input)[i];
        reinterpret_cast<float4 *>(output)[i] = make_float4(silu_of(x.x), silu_of(x.y), silu_of(x.z), silu_of(x.w));
    }
    int rest = vectors * 4 + i;
    if (i < 4 && rest < n) output[rest] = silu_of(input[rest]);
}

void silu(float *input, float *output, int n) {
    constexpr int kThreads = 256;
    int vectors = n / 4 + 1;  // at least one thread, for the rest
    silu_kernel<<<(vectors + kThreads - 1) / kThreads, kThreads>>>(input, output, n);
}
