// Checks and times copy_first_column.cu, and measures copies between host and device into transfer.csv:
//     cmake -B build && cmake --build build && ./build/copy_first_column [rows cols] && python plot_transfer.py
// (README.md has the line for a machine without CMake.)
//
// The column's time is wall time of the call with cudaDeviceSynchronize, median of 100; before each call the column gets
// new values and is thrown out of the host's caches.
#include "copy_first_column.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <sys/mman.h>
#include <vector>

#define CHECK(call)                                                                                  \
    do {                                                                                             \
        cudaError_t error_ = (call);                                                                 \
        if (error_ != cudaSuccess) {                                                                 \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
            exit(1);                                                                                 \
        }                                                                                            \
    } while (0)

static double now_us() {
    using namespace std::chrono;
    return duration<double, std::micro>(steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

// Throws the line that holds *pointer out of all the host's caches. (Writing through a large buffer need not: memset may
// store past the caches.)
static void flush_line(const void *pointer) {
#if defined(__x86_64__)
    asm volatile("clflush (%0)" : : "r"(pointer) : "memory");
#elif defined(__aarch64__)
    asm volatile("dc civac, %0" : : "r"(pointer) : "memory");
#endif
}
static void wait_for_flushes() {
#if defined(__x86_64__)
    asm volatile("mfence" : : : "memory");
#elif defined(__aarch64__)
    asm volatile("dsb sy" : : : "memory");
#endif
}

// Memory in pages of 2 MiB where the system gives them: 8192 rows then lie in 1024 pages, not 8192, and both the GPU and
// the bus translate fewer addresses.
static float *allocate_matrix(size_t bytes) {
    constexpr size_t kLargePage = size_t{2} << 20;
    void *memory = aligned_alloc(kLargePage, (bytes + kLargePage - 1) / kLargePage * kLargePage);
#ifdef MADV_HUGEPAGE
    if (memory) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<float *>(memory);
}

static int first_column(int rows, int cols) {
    size_t count = static_cast<size_t>(rows) * cols;
    float *matrix = allocate_matrix(count * sizeof(float));
    if (!matrix) {
        fprintf(stderr, "no host memory for a %d x %d matrix\n", rows, cols);
        return 1;
    }
    for (size_t i = 0; i < count; ++i) matrix[i] = static_cast<float>(i % 8191);
    CHECK(cudaHostRegister(matrix, count * sizeof(float), cudaHostRegisterMapped));
    float *column = nullptr;
    CHECK(cudaMalloc(&column, rows * sizeof(float)));

    std::vector<float> got(rows);
    std::vector<double> times;
    for (int call = -1; call < 100; ++call) {  // the first one is not timed
        for (int r = 0; r < rows; ++r) matrix[size_t(r) * cols] = static_cast<float>((r + 7919 * (call + 2)) % 1000003);
        for (int r = 0; r < rows; ++r) flush_line(&matrix[size_t(r) * cols]);
        wait_for_flushes();
        CHECK(cudaMemset(column, 0xFF, rows * sizeof(float)));  // NaN: what is not written shows
        CHECK(cudaDeviceSynchronize());
        double start = now_us();
        copy_first_column(matrix, column, rows, cols);
        CHECK(cudaDeviceSynchronize());
        if (call >= 0) times.push_back(now_us() - start);
        CHECK(cudaGetLastError());
        CHECK(cudaMemcpy(got.data(), column, rows * sizeof(float), cudaMemcpyDeviceToHost));
        for (int r = 0; r < rows; ++r)
            if (got[r] != matrix[size_t(r) * cols]) {
                printf("wrong: call %d, row %d is %.7g, expected %.7g\n", call + 2, r, got[r], matrix[size_t(r) * cols]);
                return 1;
            }
    }
    printf("correct. %.1f us (median of 100) for %d rows of %d\n", median(times), rows, cols);
    CHECK(cudaHostUnregister(matrix));
    CHECK(cudaFree(column));
    free(matrix);
    return 0;
}

static double copy_us(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    std::vector<double> times;
    for (int i = 0; i < 21; ++i) {
        double start = now_us();
        CHECK(cudaMemcpy(to, from, bytes, kind));
        CHECK(cudaDeviceSynchronize());
        times.push_back(now_us() - start);
    }
    return median(times);
}

// bytes,memory,direction,time_us,gb_per_s for 2^0 to 2^26 bytes; transfer.json says where it was measured.
static void transfers() {
    constexpr size_t kMost = size_t{1} << 26;
    void *device = nullptr, *pinned = nullptr, *pageable = malloc(kMost);
    CHECK(cudaMalloc(&device, kMost));
    CHECK(cudaMallocHost(&pinned, kMost));
    memset(pageable, 1, kMost);
    memset(pinned, 1, kMost);
    FILE *csv = fopen("transfer.csv", "w");
    if (!csv) {
        fprintf(stderr, "transfer.csv cannot be written here\n");
        exit(2);
    }
    fprintf(csv, "bytes,memory,direction,time_us,gb_per_s\n");
    for (size_t bytes = 1; bytes <= kMost; bytes *= 2)
        for (bool is_pinned : {false, true})
            for (bool to_device : {true, false}) {
                void *host = is_pinned ? pinned : pageable;
                double us = to_device ? copy_us(device, host, bytes, cudaMemcpyHostToDevice)
                                      : copy_us(host, device, bytes, cudaMemcpyDeviceToHost);
                fprintf(csv, "%zu,%s,%s,%.3f,%.4f\n", bytes, is_pinned ? "pinned" : "pageable",
                        to_device ? "host to device" : "device to host", us, bytes / us * 1e-3);
                fflush(csv);
            }
    fclose(csv);
    cudaDeviceProp properties;
    int driver = 0, runtime = 0;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaRuntimeGetVersion(&runtime));
    char when[32];
    time_t seconds = time(nullptr);
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", gmtime(&seconds));
    if (FILE *json = fopen("transfer.json", "w")) {
        fprintf(json, "{\"device\": \"%s\", \"driver\": %d, \"runtime\": %d, \"utc\": \"%s\", \"repeats\": 21}\n",
                properties.name, driver, runtime, when);
        fclose(json);
    }
    printf("wrote transfer.csv and transfer.json; draw them with plot_transfer.py\n");
}

int main(int argc, char **argv) {
    int rows = argc > 2 ? atoi(argv[1]) : 8192, cols = argc > 2 ? atoi(argv[2]) : 65536;
    if (rows < 1 || cols < 1) {
        fprintf(stderr, "usage: copy_first_column [rows cols]\n");
        return 2;
    }
    transfers();
    return first_column(rows, cols);
}
