// The host side of the CUDA runtime that the labs use. Streams run at once, in order; events read the CPU's clock.
#pragma once
#include "memory.h"
#include "types.h"

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidPitchValue = 12, cudaErrorInvalidMemcpyDirection = 21, cudaErrorInvalidDevice = 101,
    cudaErrorHostMemoryAlreadyRegistered = 712, cudaErrorHostMemoryNotRegistered = 713,
    cudaErrorCooperativeLaunchTooLarge = 720
};
typedef cudaError_t cudaError;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
                      cudaMemcpyDefault };
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16, cudaDevAttrCanMapHostMemory = 19, cudaDevAttrL2CacheSize = 38,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39, cudaDevAttrUnifiedAddressing = 41,
    cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81, cudaDevAttrCooperativeLaunch = 95,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaHostAllocWriteCombined = 4,
       cudaHostRegisterDefault = 0, cudaHostRegisterPortable = 1, cudaHostRegisterMapped = 2, cudaDeviceMapHost = 8,
       cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventBlockingSync = 1,
       cudaEventDisableTiming = 2 };
struct cudaDeviceProp {  // of the emulated device; its sizes are in memory.h
    char name[256] = "emulated device";
    size_t totalGlobalMem = size_t{1} << 31, sharedMemPerBlock = emu::kSharedPerBlock,
           sharedMemPerMultiprocessor = emu::kSharedPerMultiprocessor, sharedMemPerBlockOptin = emu::kSharedPerBlockOptIn;
    int warpSize = 32, maxThreadsPerBlock = 1024, maxThreadsDim[3] = {1024, 1024, 64};
    int maxGridSize[3] = {0x7fffffff, 65535, 65535}, major = 9, minor = 0, multiProcessorCount = emu::kMultiprocessors;
    int canMapHostMemory = 1, unifiedAddressing = 1, concurrentKernels = 1, cooperativeLaunch = 1;
    int maxThreadsPerMultiProcessor = emu::kThreadsPerMultiprocessor;
    int maxBlocksPerMultiProcessor = emu::kBlocksPerMultiprocessor, l2CacheSize = 1 << 20;
    int regsPerBlock = 65536, regsPerMultiprocessor = 65536;
};
typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
static cudaStream_t const cudaStreamPerThread = nullptr, cudaStreamLegacy = nullptr;

cudaError_t emu_malloc(void **pointer, size_t bytes);
cudaError_t emu_host_alloc(void **pointer, size_t bytes, unsigned flags);
cudaError_t emu_host_device_pointer(void **device, void *host);
cudaError_t emu_last(cudaError_t error);  // remembers a failure for cudaGetLastError and returns it
template <class T> cudaError_t cudaMalloc(T **p, size_t n) { return emu_malloc((void **)p, n); }
template <class T> cudaError_t cudaMallocAsync(T **p, size_t n, cudaStream_t) { return emu_malloc((void **)p, n); }
template <class T> cudaError_t cudaHostAlloc(T **p, size_t n, unsigned flags) { return emu_host_alloc((void **)p, n, flags); }
template <class T> cudaError_t cudaMallocHost(T **p, size_t n, unsigned flags = 0) { return emu_host_alloc((void **)p, n, flags); }
template <class T> cudaError_t cudaHostGetDevicePointer(T **d, void *h, unsigned) { return emu_host_device_pointer((void **)d, h); }
cudaError_t cudaFree(void *pointer);
inline cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaFreeHost(void *pointer);
cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void *pointer);
cudaError_t cudaMemset(void *device, int value, size_t bytes);
inline cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t = 0) { return cudaMemset(d, v, n); }
cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind);
inline cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind kind, cudaStream_t = 0) {
    return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind);
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    return cudaMemcpy2D(to, n, from, n, n, n ? 1 : 0, kind);
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t = 0) {
    return cudaMemcpy(to, from, n, kind);
}
// __device__ and __constant__ variables are plain variables here.
template <class T> cudaError_t cudaMemcpyToSymbol(T &symbol, const void *from, size_t n, size_t offset = 0,
                                                  cudaMemcpyKind = cudaMemcpyHostToDevice) {
    if (offset + n > sizeof symbol) return emu_last(cudaErrorInvalidValue);
    memcpy((char *)&symbol + offset, from, n);
    return cudaSuccess;
}
template <class T> cudaError_t cudaMemcpyFromSymbol(void *to, const T &symbol, size_t n, size_t offset = 0,
                                                    cudaMemcpyKind = cudaMemcpyDeviceToHost) {
    if (offset + n > sizeof symbol) return emu_last(cudaErrorInvalidValue);
    memcpy(to, (const char *)&symbol + offset, n);
    return cudaSuccess;
}
template <class T> cudaError_t cudaGetSymbolAddress(void **pointer, T &symbol) { return *pointer = &symbol, cudaSuccess; }

const char *cudaGetErrorString(cudaError_t error);
const char *cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
inline cudaError_t cudaDeviceSynchronize() { return cudaPeekAtLastError(); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device ? emu_last(cudaErrorInvalidDevice) : cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }

inline cudaError_t cudaStreamCreate(cudaStream_t *stream) { return *stream = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return *stream = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaPeekAtLastError(); }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event);
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t = 0);
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end);

cudaError_t emu_occupancy(int *blocks, int threads_per_block, size_t shared_bytes);
cudaError_t emu_set_shared_limit(cudaFuncAttribute attribute, int value);
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void (*)(P...), int threads, size_t shared_bytes) {
    return emu_occupancy(blocks, threads, shared_bytes);
}
template <class... P> cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute attribute, int value) {
    return emu_set_shared_limit(attribute, value);
}
