// Memory, errors and events of the emulated device; see memory.h and runtime_api.h.
#include "runtime_api.h"
#include "memory.h"
#include "sanitizers.h"
#include "scheduler.h"

#include <map>
#include <time.h>
#include <vector>

struct CUevent_st { double milliseconds; };

namespace emu {

struct Region { size_t bytes; bool device, mapped, registered; const char *of_caller = nullptr; };
static std::map<const char *, Region> regions;  // by start
static Counts totals{};
static cudaError_t last_error = cudaSuccess;
static size_t dynamic_limit = kSharedPerBlock;
static int open_depth = 0;

static std::map<const char *, Region>::iterator find(const void *pointer) {
    auto after = regions.upper_bound(static_cast<const char *>(pointer));
    if (after == regions.begin()) return regions.end();
    auto it = std::prev(after);
    return static_cast<const char *>(pointer) < it->first + (it->second.bytes ? it->second.bytes : 1) ? it : regions.end();
}

void *allocate_filled(size_t bytes, size_t alignment) {
    static const int pattern = getenv("EMU_FILL") ? static_cast<int>(strtol(getenv("EMU_FILL"), nullptr, 0)) : 0xFF;
    void *memory = nullptr;
    if (alignment < sizeof(void *)) alignment = sizeof(void *);
    if (posix_memalign(&memory, alignment, bytes ? bytes : 1)) return nullptr;
    memset(memory, pattern, bytes);
    if (!bytes) __asan_poison_memory_region(memory, 1);
    return memory;
}

DeviceMemoryOpen::DeviceMemoryOpen() {
    if (open_depth++ == 0)
        for (auto &r : regions)
            if (r.second.device) __asan_unpoison_memory_region(r.first, r.second.bytes);
}
DeviceMemoryOpen::~DeviceMemoryOpen() {
    if (--open_depth == 0)
        for (auto &r : regions)
            if (r.second.device) __asan_poison_memory_region(r.first, r.second.bytes);
}

static std::vector<std::pair<void *, size_t>> shut;
extern "C" char **environ;  // lies above everything on the stack
void shut_host_memory(const void *pointer) {
    if (!pointer || find(pointer) != regions.end()) return;
    if (pointer > __builtin_frame_address(0) && pointer < static_cast<const void *>(environ))
        fatal("host-pointer", "a kernel is given the address of a local variable of the host's");
#ifdef EMU_ASAN
    char name[1];
    void *start = nullptr;
    size_t bytes = 0;
    const char *kind = __asan_locate_address(const_cast<void *>(pointer), name, sizeof name, &start, &bytes);
    if (strcmp(kind, "heap") != 0) return;
    __asan_poison_memory_region(start, bytes);
    shut.emplace_back(start, bytes);
#endif
}
void open_host_memory() {
    for (auto &memory : shut) __asan_unpoison_memory_region(memory.first, memory.second);
    shut.clear();
}

void check_argument(const void *address) {
    auto region = find(address);
    if (region != regions.end() && region->second.device)
        fatal("kernel-arguments", "an entry of a launch's arguments is device memory, not the address of a host's variable");
}

void count_launch() { ++totals.launches; }
Counts counts() { return totals; }
void name_buffer(const char *name, const void *start, size_t bytes) {
    finding("buffer", "%s %p %zu", name, start, bytes);
    if (auto it = find(start); it != regions.end()) it->second.of_caller = name;
}
void give_back(const void *start) {
    if (auto it = find(start); it != regions.end()) it->second.of_caller = nullptr;
}
size_t shared_memory_limit() { return dynamic_limit; }
unsigned resident_blocks(int threads, size_t shared_bytes) {
    if (threads < 1 || threads > 1024) return 0;
    unsigned blocks = kThreadsPerMultiprocessor / ((threads + 31) / 32 * 32);
    size_t by_shared = kSharedPerMultiprocessor / (shared_bytes + 1024);  // a block's own kilobyte, as on real devices
    if (by_shared < blocks) blocks = static_cast<unsigned>(by_shared);
    return blocks < kBlocksPerMultiprocessor ? blocks : kBlocksPerMultiprocessor;
}

// A copy's end must lie in memory of the kind that the direction names.
static cudaError_t check_range(const char *which, const void *pointer, size_t pitch, size_t width, size_t height, bool device) {
    auto it = find(pointer);
    bool is_device = it != regions.end() && it->second.device;
    if (device && it == regions.end() && __asan_address_is_poisoned(pointer)) {
        finding("copy-out-of-bounds", "the %s of a copy begins outside every allocation (a pointer counts elements, not bytes)", which);
        return cudaErrorInvalidValue;
    }
    if (is_device != device) {
        finding("copy-direction", "the %s of a copy is %s memory, the direction says %s", which,
                is_device ? "device" : "host", device ? "device" : "host");
        return cudaErrorInvalidValue;
    }
    size_t need = pitch * (height - 1) + width;
    if (it != regions.end() && static_cast<const char *>(pointer) + need > it->first + it->second.bytes) {
        finding("copy-out-of-bounds", "the %s of a copy needs %zu bytes, its allocation has %zu from there", which, need,
                static_cast<size_t>(it->first + it->second.bytes - static_cast<const char *>(pointer)));
        return cudaErrorInvalidValue;
    }
    return cudaSuccess;
}

}  // namespace emu

using namespace emu;

cudaError_t emu_last(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}
cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t emu_malloc(void **pointer, size_t bytes) {
    if (bytes > size_t{1} << 31 || !(*pointer = allocate_filled(bytes, 256))) return emu_last(cudaErrorMemoryAllocation);
    regions[static_cast<char *>(*pointer)] = {bytes, true, false, false};
    totals.allocated_bytes += bytes;
    if (open_depth == 0) __asan_poison_memory_region(*pointer, bytes);
    return cudaSuccess;
}
static cudaError_t release(void *pointer, bool device) {
    if (!pointer) return cudaSuccess;
    auto it = regions.find(static_cast<char *>(pointer));
    if (it == regions.end() || it->second.device != device || it->second.registered) return emu_last(cudaErrorInvalidValue);
    if (it->second.of_caller) fatal("caller-memory", "`%s` is freed", it->second.of_caller);
    if (device) totals.allocated_bytes -= it->second.bytes;
    __asan_unpoison_memory_region(pointer, it->second.bytes);
    regions.erase(it);
    free(pointer);
    return cudaSuccess;
}
cudaError_t cudaFree(void *pointer) { return release(pointer, true); }
cudaError_t cudaFreeHost(void *pointer) { return release(pointer, false); }
cudaError_t emu_host_alloc(void **pointer, size_t bytes, unsigned) {
    if (!(*pointer = allocate_filled(bytes, 4096))) return emu_last(cudaErrorMemoryAllocation);
    regions[static_cast<char *>(*pointer)] = {bytes, false, true, false};
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned) {
    if (find(pointer) != regions.end()) return emu_last(cudaErrorHostMemoryAlreadyRegistered);
    regions[static_cast<char *>(pointer)] = {bytes, false, true, true};
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *pointer) {
    auto it = regions.find(static_cast<char *>(pointer));
    if (it == regions.end() || !it->second.registered) return emu_last(cudaErrorHostMemoryNotRegistered);
    regions.erase(it);
    return cudaSuccess;
}
cudaError_t emu_host_device_pointer(void **device, void *host) {
    auto it = find(host);
    if (it == regions.end() || !it->second.mapped) return emu_last(cudaErrorInvalidValue);
    *device = host;
    return cudaSuccess;
}
cudaError_t cudaMemset(void *device, int value, size_t bytes) {
    if (!bytes) return cudaSuccess;
    if (cudaError_t error = check_range("target", device, bytes, bytes, 1, true)) return emu_last(error);
    ++totals.copies;
    DeviceMemoryOpen open;
    memset(device, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
    if (!width || !height) return cudaSuccess;
    if (width > to_pitch || width > from_pitch) {
        finding("copy-pitch", "width %zu, pitches %zu (target) and %zu (source)", width, to_pitch, from_pitch);
        return emu_last(cudaErrorInvalidPitchValue);
    }
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return emu_last(cudaErrorInvalidMemcpyDirection);
    if (kind != cudaMemcpyDefault) {
        bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
        bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
        if (cudaError_t error = check_range("target", to, to_pitch, width, height, to_device)) return emu_last(error);
        if (cudaError_t error = check_range("source", from, from_pitch, width, height, from_device)) return emu_last(error);
    }
    ++totals.copies;
    DeviceMemoryOpen open;
    for (size_t row = 0; row < height; ++row)
        memmove(static_cast<char *>(to) + row * to_pitch, static_cast<const char *>(from) + row * from_pitch, width);
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) {
    static const std::map<cudaError_t, const char *> names = {
        {cudaSuccess, "cudaSuccess"},
        {cudaErrorInvalidValue, "cudaErrorInvalidValue"},
        {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation"},
        {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration"},
        {cudaErrorInvalidPitchValue, "cudaErrorInvalidPitchValue"},
        {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection"},
        {cudaErrorInvalidDevice, "cudaErrorInvalidDevice"},
        {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered"},
        {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered"},
        {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge"}};
    auto it = names.find(error);
    return it == names.end() ? "another CUDA error" : it->second;
}
const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    static const std::map<cudaDeviceAttr, size_t> values = {
        {cudaDevAttrMaxThreadsPerBlock, 1024},
        {cudaDevAttrMaxSharedMemoryPerBlock, kSharedPerBlock},
        {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMultiProcessorCount, kMultiprocessors},
        {cudaDevAttrCanMapHostMemory, 1},
        {cudaDevAttrL2CacheSize, 1 << 20},
        {cudaDevAttrMaxThreadsPerMultiProcessor, kThreadsPerMultiprocessor},
        {cudaDevAttrUnifiedAddressing, 1},
        {cudaDevAttrComputeCapabilityMajor, 9},
        {cudaDevAttrComputeCapabilityMinor, 0},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, kSharedPerMultiprocessor},
        {cudaDevAttrCooperativeLaunch, 1},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, kSharedPerBlockOptIn}};
    auto it = values.find(attribute);
    if (device || it == values.end()) return emu_last(device ? cudaErrorInvalidDevice : cudaErrorInvalidValue);
    *value = static_cast<int>(it->second);
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    if (device) return emu_last(cudaErrorInvalidDevice);
    *properties = cudaDeviceProp{};
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = new CUevent_st{0.0}, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->milliseconds = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    return *milliseconds = static_cast<float>(end->milliseconds - start->milliseconds), cudaSuccess;
}

cudaError_t emu_occupancy(int *blocks, int threads, size_t shared_bytes) {
    *blocks = static_cast<int>(resident_blocks(threads, shared_bytes));
    return threads < 1 ? emu_last(cudaErrorInvalidValue) : cudaSuccess;
}
cudaError_t emu_set_shared_limit(cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || static_cast<size_t>(value) > kSharedPerBlockOptIn) return emu_last(cudaErrorInvalidValue);
    dynamic_limit = static_cast<size_t>(value) > dynamic_limit ? static_cast<size_t>(value) : dynamic_limit;
    return cudaSuccess;
}
