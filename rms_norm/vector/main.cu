// Checks and times rms_norm_vector.cu:  cmake -B build && cmake --build build && ./build/rms_norm_vector [cols]
//
// The result is compared with a double-precision reference; the speed with a copy of as many floats.
#include "rms_norm_vector.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                                  \
    do {                                                                                             \
        cudaError_t error_ = (call);                                                                 \
        if (error_ != cudaSuccess) {                                                                 \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
            exit(1);                                                                                 \
        }                                                                                            \
    } while (0)

// The ceiling: the faster of two kernels that only copy, since which it is differs between GPUs. One vector of 16 bytes
// a thread, or four in flight with the hint that nothing is used twice.
__global__ void copy_kernel(const float4 *from, float4 *to, size_t count) {
    size_t at = static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x;
    if (at < count) to[at] = from[at];
}

__global__ void copy_streamed_kernel(const float4 *from, float4 *to, size_t count) {
    size_t first = static_cast<size_t>(blockIdx.x) * 1024 + threadIdx.x;
    float4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (first + i * 256 < count) v[i] = __ldcs(&from[first + i * 256]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (first + i * 256 < count) __stcs(&to[first + i * 256], v[i]);
}

// Seconds a call: the median of 5 rounds of `calls` calls between two events.
template <class F> double seconds(F call, int calls) {
    cudaEvent_t start, end;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    for (int i = 0; i < calls; ++i) call(i);
    std::vector<float> rounds;
    for (int round = 0; round < 5; ++round) {
        float milliseconds = 0;
        CHECK(cudaEventRecord(start));
        for (int i = 0; i < calls; ++i) call(i);
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&milliseconds, start, end));
        rounds.push_back(milliseconds * 1e-3f / calls);
    }
    std::sort(rounds.begin(), rounds.end());
    return rounds[2];
}

int main(int argc, char **argv) {
    const int cols = argc > 1 ? atoi(argv[1]) : 1 << 20;
    const float epsilon = 1e-6f;
    if (cols < 4) {
        fprintf(stderr, "usage: rms_norm_vector [cols], at least 4\n");
        return 2;
    }
    const size_t count = static_cast<size_t>(cols), weights = static_cast<size_t>(cols);
    std::vector<float> x(count), w(weights), y(count);
    unsigned state = 1;
    auto random = [&] { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1.0f; };
    for (float &v : x) v = 3.0f * random();
    for (float &v : w) v = 1.0f + 0.5f * random();

    // Several sets of buffers, used in turn, so that no call finds its data in the cache.
    int l2_bytes = 0;
    CHECK(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, 0));
    size_t set_bytes = (2 * count + weights) * sizeof(float);
    int sets = static_cast<int>(std::min<size_t>(std::max<size_t>(1, 4 * size_t(l2_bytes) / set_bytes + 1), 32));
    std::vector<float *> input(sets), weight(sets), output(sets);
    for (int i = 0; i < sets; ++i) {
        CHECK(cudaMalloc(&input[i], count * sizeof(float)));
        CHECK(cudaMalloc(&weight[i], weights * sizeof(float)));
        CHECK(cudaMalloc(&output[i], count * sizeof(float)));
        CHECK(cudaMemcpy(input[i], x.data(), count * sizeof(float), cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(weight[i], w.data(), weights * sizeof(float), cudaMemcpyHostToDevice));
        CHECK(cudaMemset(output[i], 0xFF, count * sizeof(float)));  // NaN: what is not written shows
    }
    auto run = [&](int i) { rms_norm_vector(input[i % sets], weight[i % sets], output[i % sets], cols, epsilon); };
    run(0);
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(y.data(), output[0], count * sizeof(float), cudaMemcpyDeviceToHost));

    double sum = 0;
    for (float v : x) sum += static_cast<double>(v) * v;
    for (size_t i = 0; i < count; ++i) {
        double expected = x[i] / std::sqrt(sum / cols + epsilon) * w[i];
        if (!(std::abs(y[i] - expected) <= 1e-4 * std::abs(expected) + 1e-6)) {
            printf("wrong: element %zu is %.7g, expected %.7g\n", i, y[i], expected);
            return 1;
        }
    }

    double bytes = 3.0 * count * sizeof(float);
    size_t copied = count / 4;
    double own = seconds(run, 20);
    auto from = [&](int i) { return reinterpret_cast<float4 *>(input[i % sets]); };
    auto to = [&](int i) { return reinterpret_cast<float4 *>(output[i % sets]); };
    double copy = seconds([&](int i) { copy_kernel<<<(copied + 255) / 256, 256>>>(from(i), to(i), copied); }, 20);
    double streamed = seconds(
        [&](int i) { copy_streamed_kernel<<<(copied + 1023) / 1024, 256>>>(from(i), to(i), copied); }, 20);
    CHECK(cudaGetLastError());
    double copy_speed = 2.0 * copied * sizeof(float4) / std::min(copy, streamed);
    printf("correct. %.1f us, %.0f GB/s; a copy kernel: %.0f GB/s; share: %.0f %%\n", own * 1e6, bytes / own * 1e-9,
           copy_speed * 1e-9, 100.0 * bytes / own / copy_speed);
    return 0;
}
