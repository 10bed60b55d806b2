// What timing needs from inside CUDA, linked into the same library as the learner's file: the copy kernel that is the
// ceiling, CUDA graphs of launches on the default stream, and the wall time of copy_first_column.
//
// Everything here and the learner's file are compiled with `--default-stream per-thread`: the legacy default stream, to
// which a plain <<<grid, block>>> goes, cannot be captured into a graph; the per-thread one can.
#include <cuda_runtime.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <vector>

// The ceiling of the labs: the faster of two copies, since which it is differs between GPUs. One vector of 16 bytes a
// thread, or four in flight with the hint that nothing is used twice.
static __global__ void tlab_copy_kernel(const float4 *from, float4 *to, size_t count) {
    size_t at = static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x;
    if (at < count) to[at] = from[at];
}

static __global__ void tlab_copy_streamed_kernel(const float4 *from, float4 *to, size_t count) {
    size_t first = static_cast<size_t>(blockIdx.x) * 1024 + threadIdx.x;
    float4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (first + i * 256 < count) v[i] = __ldcs(&from[first + i * 256]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (first + i * 256 < count) __stcs(&to[first + i * 256], v[i]);
}

extern "C" void tlab_copy(const float *from, float *to, size_t floats, int streamed) {
    size_t vectors = floats / 4;
    auto source = reinterpret_cast<const float4 *>(from);
    auto target = reinterpret_cast<float4 *>(to);
    if (streamed)
        tlab_copy_streamed_kernel<<<(vectors + 1023) / 1024, 256>>>(source, target, vectors);
    else
        tlab_copy_kernel<<<(vectors + 255) / 256, 256>>>(source, target, vectors);
}

// Every function below returns a cudaError_t; 0 is success.
extern "C" const char *tlab_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
extern "C" int tlab_synchronize() {
    cudaError_t error = cudaDeviceSynchronize(), earlier = cudaGetLastError();
    return error ? error : earlier;
}

// Relaxed: a learner's call may allocate or ask for attributes while it is captured. A call that waits for the device
// cannot be captured: tlab_graph_end then returns an error, and the caller times it without a graph.
extern "C" int tlab_graph_begin() { return cudaStreamBeginCapture(cudaStreamPerThread, cudaStreamCaptureModeRelaxed); }
extern "C" int tlab_graph_end(void **executable) {
    cudaGraph_t graph = nullptr;
    cudaError_t error = cudaStreamEndCapture(cudaStreamPerThread, &graph);
    cudaGraphExec_t made = nullptr;
    if (!error) error = cudaGraphInstantiate(&made, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();  // a capture that failed must not be found by the next call
    *executable = made;
    return error;
}
extern "C" int tlab_graph_launch(void *executable) {
    // In torch's stream, between torch's events.
    return cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable), cudaStreamLegacy);
}

// Throws one line out of all the host's caches. A write through a large buffer would not do: memset's stores may go
// round the caches.
static void flush_line(const void *line) {
#if defined(__x86_64__)
    asm volatile("clflush (%0)" : : "r"(line) : "memory");
#elif defined(__aarch64__)
    asm volatile("dc civac, %0" : : "r"(line) : "memory");
#endif
}
static void flushes_done() {
#if defined(__x86_64__)
    asm volatile("mfence" : : : "memory");
#elif defined(__aarch64__)
    asm volatile("dsb sy" : : : "memory");
#endif
}

// Wall time of function(h_A, d_A, rows, cols) and a cudaDeviceSynchronize, `repeats` times into `microseconds`. The
// matrix is page-locked and mapped, in pages as large as the system gives. Before each call the first column gets new
// values, leaves the host's caches, and d_A is filled with NaN; after it d_A is compared. *wrong counts calls whose
// result was not the column.
extern "C" int tlab_time_first_column(void (*function)(float *, float *, int, int), int rows, int cols, int repeats,
                                      double *microseconds, int *wrong) {
    constexpr size_t kLargePage = size_t{2} << 20;
    size_t stride = cols, bytes = stride * rows * sizeof(float);
    size_t mapped = (bytes + kLargePage - 1) / kLargePage * kLargePage + kLargePage;
    void *memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return cudaErrorMemoryAllocation;
    auto *matrix = reinterpret_cast<float *>((reinterpret_cast<size_t>(memory) + kLargePage - 1) / kLargePage * kLargePage);
#ifdef MADV_HUGEPAGE
    madvise(matrix, mapped - kLargePage, MADV_HUGEPAGE);
#endif
    for (size_t i = 0; i < stride * rows; i += 1024) matrix[i] = -1.0f;  // touches every page
    float *column = nullptr;
    cudaError_t error = cudaHostRegister(matrix, bytes, cudaHostRegisterMapped);
    if (!error) error = cudaMalloc(&column, rows * sizeof(float));
    std::vector<float> got(rows);
    *wrong = 0;
    for (int call = -2; call < repeats && !error; ++call) {  // two calls warm up
        for (int row = 0; row < rows; ++row) matrix[row * stride] = static_cast<float>((row + 7919 * (call + 3)) % 1000003);
        for (int row = 0; row < rows; ++row) flush_line(&matrix[row * stride]);
        flushes_done();
        cudaMemset(column, 0xFF, rows * sizeof(float));
        cudaDeviceSynchronize();
        auto start = std::chrono::steady_clock::now();
        function(matrix, column, rows, cols);
        error = cudaDeviceSynchronize();
        auto end = std::chrono::steady_clock::now();
        if (!error) error = cudaGetLastError();
        if (call >= 0) microseconds[call] = std::chrono::duration<double, std::micro>(end - start).count();
        if (!error) error = cudaMemcpy(got.data(), column, rows * sizeof(float), cudaMemcpyDeviceToHost);
        bool same = true;
        for (int row = 0; row < rows; ++row) same = same && got[row] == matrix[row * stride];
        *wrong += !same;
    }
    cudaFree(column);
    cudaHostUnregister(matrix);
    munmap(memory, mapped);
    return error;
}
