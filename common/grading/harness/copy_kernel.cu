// The ceiling of the labs: a kernel that only copies, 16 bytes a load, four loads in flight a thread.
#include <cuda_runtime.h>

__global__ void copy_kernel(const float4 *from, float4 *to, size_t count) {
    size_t first = static_cast<size_t>(blockIdx.x) * 1024 + threadIdx.x;
    float4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (first + i * 256 < count) v[i] = __ldcs(&from[first + i * 256]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (first + i * 256 < count) __stcs(&to[first + i * 256], v[i]);
}

extern "C" void copy_floats(const float *from, float *to, size_t floats) {
    size_t vectors = floats / 4;
    copy_kernel<<<(vectors + 1023) / 1024, 256>>>(reinterpret_cast<const float4 *>(from), reinterpret_cast<float4 *>(to), vectors);
}
